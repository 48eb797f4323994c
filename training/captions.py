"""What people might call a scene: sentences from a small grammar, and the tokenizer made from them.

A caption says some of what is true and never what is not. What it leaves out stays free, so the model learns to vary
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from training.world import Scene, sample_scene

TIME_PHRASES: dict[str, tuple[str, ...]] = {
    "dawn": ("at dawn", "at dawn", "at sunrise", "in the early morning", "at daybreak"),
    "noon": ("at noon", "at noon", "at midday", "by day", "in daylight", "in the daytime"),
    "dusk": ("at dusk", "at dusk", "at sunset", "in the evening", "at twilight"),
    "night": ("at night", "at night", "by night", "in the night", "after dark"),
}
SKY_WORDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("dawn", "pink"): ("pink", "rosy"),
    ("dawn", "golden"): ("golden", "yellow"),
    ("noon", "blue"): ("blue", "bright blue"),
    ("noon", "pale"): ("pale", "grey"),
    ("dusk", "orange"): ("orange", "fiery orange"),
    ("dusk", "purple"): ("purple", "violet"),
    ("night", "blue"): ("dark blue", "deep blue"),
    ("night", "black"): ("black", "dark"),
}
CLOUD_COLOURS: dict[tuple[str, str], str] = {
    ("dawn", "pink"): "pink",
    ("dawn", "golden"): "golden",
    ("noon", "blue"): "white",
    ("noon", "pale"): "white",
    ("dusk", "orange"): "orange",
    ("dusk", "purple"): "purple",
    ("night", "blue"): "dark",
    ("night", "black"): "dark",
}
LIGHT_COLOURS: dict[str, tuple[str, ...]] = {
    "white": ("white", "pale"),
    "golden": ("golden", "yellow"),
    "orange": ("orange",),
    "red": ("red", "red", "crimson"),
}
LAND_WORDS: dict[str, tuple[str, ...]] = {
    "green": ("green", "grassy"),
    "grey": ("grey", "rocky", "stony"),
    "red": ("red", "reddish"),
    "golden": ("golden", "sandy", "yellow"),
    "white": ("snowy", "white", "snow-covered", "wintry"),
}
RELIEF_WORDS: dict[str, tuple[str, ...]] = {
    "mountains": ("mountains", "mountains", "mountains", "peaks", "a mountain range", "high mountains"),
    "hills": ("hills", "hills", "rolling hills", "gentle hills", "low hills"),
}
SIDES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "to the left", "at the left"),
    "centre": ("in the middle", "in the centre", "in the center"),
    "right": ("on the right", "to the right", "at the right"),
}
OPENINGS = ("", "", "", "", "", "a landscape with ", "a view of ", "a picture of ", "a painting of ", "a photo of ")
# Words people add that say nothing about the scene; the model learns to pass over them.
FILLERS = (
    "beautiful",
    "highly detailed",
    "4k",
    "8k",
    "masterpiece",
    "peaceful",
    "majestic",
    "serene",
    "epic",
    "breathtaking",
    "wide angle",
    "digital art",
    "oil painting",
    "watercolor",
    "panorama",
    "scenic",
    "dramatic",
    "stunning",
    "quiet",
    "high quality",
    "nature",
    "illustration",
)


class _Words:
    """Choices drawn from one generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def gibberish(self) -> str:
        letters = self.rng.integers(97, 123, int(self.rng.integers(3, 9)))
        return "".join(map(chr, letters))


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _relief(scene: Scene, words: _Words) -> str:
    """ "snowy mountains", "misty green hills", "golden dunes" ..."""
    noun = words.pick(RELIEF_WORDS[scene.relief])
    adjectives: list[str] = []
    if scene.mist and words.chance(0.45):
        adjectives.append(words.pick(("misty", "foggy", "hazy")))
    if scene.snow_caps and words.chance(0.8):
        if words.chance(0.25):
            return " ".join(
                [*adjectives, noun.removeprefix("a "), words.pick(("with snowy peaks", "with snow on top"))]
            )
        adjectives.append(words.pick(("snowy", "snowy", "snow-capped", "snow-topped")))
        if words.chance(0.3):
            adjectives.append(words.pick(LAND_WORDS[scene.land]))
    elif words.chance(0.8):
        if scene.relief == "hills" and scene.land == "golden" and not scene.forest and words.chance(0.5):
            return words.pick(("desert dunes", "golden dunes", "sand dunes", "a desert with dunes"))
        adjectives.append(words.pick(LAND_WORDS[scene.land]))
    if scene.forest and words.chance(0.3):
        adjectives.append(words.pick(("forested", "wooded", "forest")))
    if noun.startswith("a ") and adjectives:
        return _article(" ".join([*adjectives, noun.removeprefix("a ")]))
    return " ".join([*adjectives, noun])


def _forest(scene: Scene, words: _Words) -> str:
    if scene.land == "golden":
        return words.pick(("an autumn forest", "autumn trees", "orange trees", "an orange forest", "autumn woods"))
    if scene.land == "white" and words.chance(0.4):
        return words.pick(("a winter forest", "frosted trees", "snowy pines"))
    return words.pick(("a forest", "a pine forest", "pine trees", "trees", "dark woods", "fir trees"))


def _water(scene: Scene, words: _Words) -> str:
    if scene.water == "lake":
        return words.pick(
            ("a lake", "a calm lake", "a still lake", "a mountain lake", "a quiet lake", "calm water")[:6]
        )
    return words.pick(
        ("the sea", "the ocean", "a blue sea", "the open sea", "sea waves")[: 5 if scene.relief == "none" else 3]
    )


def _land_and_water(scene: Scene, words: _Words) -> str:
    """The subject of the sentence; it may leave out any but one of relief, water and forest."""
    if scene.relief == "none":
        return _water(scene, words)
    relief = _relief(scene, words)
    if scene.water == "none":
        if scene.forest and words.chance(0.6):
            forest = _forest(scene, words)
            return words.pick((f"{relief} and {forest}", f"{forest} below {relief}", f"{forest} and {relief}", forest))
        return relief
    water = _water(scene, words)
    if scene.water == "lake" and scene.relief == "hills":
        water = water.replace("mountain lake", "lake")
    if scene.forest and words.chance(0.5):
        forest = _forest(scene, words)
        return words.pick((f"{water} by {forest}", f"{water}, {forest} and {relief}", f"{forest} around {water}"))
    kind = words.rng.random()
    if kind < 0.2:
        return water
    if kind < 0.35:
        return relief
    return words.pick(
        (f"{water} below {relief}", f"{relief} by {water}", f"{relief} and {water}", f"{water} and {relief}")
    )


def _light(scene: Scene, words: _Words) -> str:
    adjectives: list[str] = []
    if scene.light_is_large and words.chance(0.6):
        adjectives.append(words.pick(("big", "large", "huge")))
    elif not scene.light_is_large and words.chance(0.12):
        adjectives.append("small")
    if words.chance(0.75):
        adjectives.append(words.pick(LIGHT_COLOURS[scene.light_colour]))
    noun = "sun"
    if scene.light == "moon":
        noun = words.pick(("crescent moon", "crescent") if scene.crescent else ("moon", "moon", "full moon"))
    elif scene.time == "dawn" and words.chance(0.15):
        noun = "rising sun"
    elif scene.time == "dusk" and words.chance(0.15):
        noun = "setting sun"
    phrase = _article(" ".join([*adjectives, noun]))
    if words.chance(0.55):
        phrase += " " + words.pick(SIDES[scene.light_side])
    elif words.chance(0.3):
        low = ("low in the sky", "low", "near the horizon")
        phrase += " " + words.pick(low if scene.light_is_low else ("high in the sky", "high up"))
    return phrase


def _sky_facts(scene: Scene, words: _Words) -> list[str]:
    """What the sky holds, as separate phrases, any of which may be missing."""
    facts: list[str] = []
    if scene.light != "none" and words.chance(0.8):
        facts.append(_light(scene, words))
    if scene.stars and words.chance(0.7):
        facts.append(words.pick(("stars", "many stars", "a starry sky", "under the stars", "bright stars")))
    if scene.aurora and words.chance(0.9):
        facts.append(words.pick(("northern lights", "an aurora", "a green aurora", "aurora in the sky")))
    if scene.clouds == "none" and words.chance(0.3):
        facts.append(words.pick(("a clear sky", "a cloudless sky", "no clouds")))
    elif scene.clouds != "none" and words.chance(0.65):
        colour = CLOUD_COLOURS[scene.time, scene.sky]
        few = ("a few clouds", f"a few {colour} clouds", f"{colour} clouds", "some clouds", "light clouds")
        many = ("a cloudy sky", "many clouds", f"many {colour} clouds", f"{colour} clouds", "an overcast sky", "clouds")
        facts.append(words.pick(few if scene.clouds == "few" else many))
    if words.chance(0.4):
        facts.append(_article(words.pick(SKY_WORDS[scene.time, scene.sky]) + " sky"))
    if scene.mist and words.chance(0.5):
        facts.append(
            words.pick(
                ("mist", "fog in the valleys", "mist in the valleys", "morning mist" if scene.time == "dawn" else "fog")
            )
        )
    order = words.rng.permutation(len(facts))
    return [facts[i] for i in order]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the many sentences that are true of this scene, in lower case."""
    words = _Words(rng)
    subject = words.pick(OPENINGS) + _land_and_water(scene, words)
    if words.chance(0.85):
        phrase = words.pick(TIME_PHRASES[scene.time])
        subject = f"{subject} {phrase}" if words.chance(0.85) else f"{phrase}, {subject}"
    facts = _sky_facts(scene, words)
    if len(facts) > 3:
        facts = facts[:3]
    if facts and facts[0] == "under the stars":
        subject, facts = f"{subject} under the stars", facts[1:]
    elif facts and words.chance(0.2):
        subject, facts = f"{subject} {words.pick(('with', 'and', 'under'))} {facts[0]}", facts[1:]
    while words.chance(0.12):
        facts.insert(int(rng.integers(len(facts) + 1)), words.gibberish() if words.chance(0.3) else words.pick(FILLERS))
    return ", ".join([subject, *facts])


def sample_captions(count: int, seed: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield caption(sample_scene(rng), rng)


def build_tokenizer(captions: Iterator[str], size: int = 1024, longest: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE: the grammar's words become one token each, and any other text still has tokens."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=8,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", special.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )
