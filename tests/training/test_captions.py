"""Captions say what is true, and the tokenizer takes any text."""

from __future__ import annotations

import re

import numpy as np
import pytest
from training.captions import build_tokenizer, caption, sample_captions
from training.claims import ATTRIBUTES, BY_NAME, CLAIMS, claims, is_held_out
from training.world import Scene, sample_scene
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(sample_captions(3000, seed=1))


def captioned(count: int) -> list[tuple[Scene, str]]:
    rng = np.random.default_rng(0)
    return [(scene, caption(scene, rng)) for scene in (sample_scene(rng) for _ in range(count))]


def test_captions_claim_only_what_is_true() -> None:
    for scene, text in captioned(3000):
        for name, allowed in claims(text).items():
            answer = BY_NAME[name].of(scene)
            assert answer is None or answer in allowed, f"{text!r} claims {name} {sorted(allowed)} of {scene}"


def test_every_claim_is_made_by_some_caption() -> None:
    everything = "\n".join(text for _, text in captioned(4000))
    assert [pattern for pattern, _, _ in CLAIMS if not re.search(pattern, everything)] == []


def test_every_answer_is_one_of_the_labels() -> None:
    for scene, _ in captioned(500):
        for attribute in ATTRIBUTES:
            assert attribute.of(scene) in (None, *attribute.labels)


def test_sentences_in_other_words_are_understood() -> None:
    assert claims("Snowy mountains at dusk, a red sun") == {
        "time": {"dusk"},
        "light": {"sun"},
        "light colour": {"red"},
        "relief": {"alpine"},
        "snow": {"yes"},
    }
    assert claims("a lake") == {"water": {"lake"}}
    assert claims("") == {}


def test_held_out_sentences_are_not_learnt() -> None:
    assert not any(is_held_out(text) for text in sample_captions(500, seed=2))
    assert any(is_held_out(text) for _, text in captioned(500))


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
