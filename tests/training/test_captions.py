"""Captions say what is true, and the tokenizer takes any text."""

from __future__ import annotations

import re

import numpy as np
import pytest
from training.captions import build_tokenizer, caption, sample_captions
from training.world import Scene, sample_scene
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(sample_captions(3000, seed=1))


def captioned(count: int) -> list[tuple[Scene, str]]:
    rng = np.random.default_rng(0)
    return [(scene, caption(scene, rng)) for scene in (sample_scene(rng) for _ in range(count))]


# A word, and what has to hold of a scene whose caption uses it.
CLAIMS = {
    r"\bdawn|sunrise|daybreak|morning": lambda s: s.time == "dawn",
    r"\bnoon|midday|\bday\b|daylight|daytime": lambda s: s.time == "noon",
    r"\bdusk|sunset|twilight|evening": lambda s: s.time == "dusk",
    r"\bat night|after dark|midnight": lambda s: s.time == "night",
    r"\bin (spring|april)": lambda s: s.season == "spring",
    r"\bin (summer|july)": lambda s: s.season == "summer",
    r"\bin (autumn|fall|october)": lambda s: s.season == "autumn",
    r"\bin (winter|january)|wintry": lambda s: s.season == "winter",
    r"\bink\b|sumi-e|brush": lambda s: s.style == "ink",
    r"\bsun\b": lambda s: s.light == "sun",
    r"\bmoon\b|crescent": lambda s: s.light == "moon",
    r"crescent": lambda s: s.crescent,
    r"(red|crimson)( rising| setting)? sun": lambda s: s.light_colour == "red",
    r"(sun|moon|crescent) (to|on|at) the left": lambda s: s.light_side == "left",
    r"(sun|moon|crescent) (to|on|at) the right": lambda s: s.light_side == "right",
    r"(boat|pagoda|temple|cabin|hut) (to|on|at) the left": lambda s: s.subject_side == "left",
    r"tree (to|on|at) the left": lambda s: s.near_tree_on_left,
    r"stars|starry": lambda s: s.stars,
    r"northern lights|aurora": lambda s: s.aurora,
    r"no clouds|cloudless|clear sky": lambda s: s.clouds == "none" and s.weather == "clear",
    r"(?<!no )clouds": lambda s: s.clouds != "none",
    r"\brain": lambda s: s.weather == "rain",
    r"snowfall|falling snow|snow is falling|snowflakes": lambda s: s.weather == "snowfall",
    r"(?<!karst )(?<!table )(?<!guilin )mountains|peaks|mountain range|alps": lambda s: (
        s.relief in ("alpine", "volcano")
    ),
    r"karst|limestone|guilin": lambda s: s.relief == "karst",
    r"volcano|fuji": lambda s: s.relief == "volcano",
    r"mesas|buttes|canyon": lambda s: s.relief == "mesa",
    r"dunes|sandy": lambda s: s.relief == "dunes",
    r"\bhills": lambda s: s.relief == "hills",
    r"\blake\b": lambda s: s.water == "lake",
    r"\bsea\b|\bocean\b": lambda s: s.water == "sea",
    r"\briver|stream": lambda s: s.water == "river",
    r"island": lambda s: s.island,
    r"\bforest\b|woods|wooded": lambda s: s.forest != "none",
    r"\bpines|fir trees|evergreens": lambda s: s.forest == "pines",
    r"bare trees|leafless trees|bare woods": lambda s: s.forest == "bare",
    r"blossoms|cherry trees|trees in bloom": lambda s: s.forest == "leafy" and s.season == "spring",
    r"pine tree\b|old pine|crooked|leaning": lambda s: s.near_tree == "pines",
    r"boat": lambda s: s.subject == "boat",
    r"pagoda|temple": lambda s: s.subject == "pagoda",
    r"cabin|cottage|\bhut\b|house": lambda s: s.subject == "cabin",
    r"\bbirds": lambda s: s.birds,
    r"\bmist|\bfog|hazy": lambda s: s.mist,
    r"snowy|snow on top|snow-capped|snow-covered": lambda s: s.snow_caps or s.season == "winter",
    r"orange sky|orange clouds": lambda s: s.sky == "orange",
}


def test_captions_mention_only_what_is_true() -> None:
    for scene, text in captioned(2500):
        for claim, holds in CLAIMS.items():
            if re.search(claim, text):
                assert holds(scene), f"{text!r} claims {claim!r} of {scene}"


def test_every_claim_is_made_by_some_caption() -> None:
    everything = "\n".join(text for _, text in captioned(2500))
    assert [claim for claim in CLAIMS if not re.search(claim, everything)] == []


def test_captions_are_deterministic_varied_and_lower_case() -> None:
    scene = sample_scene(np.random.default_rng(5))
    assert caption(scene, np.random.default_rng(1)) == caption(scene, np.random.default_rng(1))
    assert len({caption(scene, np.random.default_rng(i)) for i in range(40)}) > 20
    assert all(text == text.lower() for _, text in captioned(100))


@pytest.mark.parametrize("text", ["snowy mountains at dusk, a red sun", "un été brûlant", "雪の山", "x", "a  b\tc 😀"])
def test_any_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    tokens = tokenizer(text).input_ids
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in tokens
    assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == text


def test_words_of_the_grammar_are_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    for word in ("mountains", "dusk", "sun", "lake", "clouds"):
        assert len(tokenizer(word).input_ids) == 2


def test_padding_is_on_the_right_and_masked(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = tokenizer(["", "a lake"], padding="max_length", max_length=8)
    assert batch.attention_mask == [[1] + [0] * 7, [1, 1, 1] + [0] * 5]
    assert batch.input_ids[0] == [tokenizer.bos_token_id] + [tokenizer.pad_token_id] * 7
