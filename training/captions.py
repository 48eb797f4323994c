"""What people might call a scene: sentences from a small grammar, and the tokenizer made from them.

A caption says some of what is true and never what is not. What it leaves out stays free, so the model learns to vary
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from training.claims import is_held_out
from training.world import Scene, sample_scene

TIME_PHRASES: dict[str, tuple[str, ...]] = {
    "dawn": ("at dawn", "at dawn", "at sunrise", "in the early morning", "at daybreak", "in the morning"),
    "noon": ("at noon", "at noon", "at midday", "by day", "in daylight", "in the daytime", "during the day"),
    "dusk": ("at dusk", "at dusk", "at sunset", "in the evening", "at twilight"),
    "night": ("at night", "at night", "by night", "in the night", "after dark", "at midnight"),
}
SEASON_PHRASES: dict[str, tuple[str, ...]] = {
    "spring": ("in spring", "in spring", "in springtime", "in april"),
    "summer": ("in summer", "in summer", "in summertime", "in july"),
    "autumn": ("in autumn", "in autumn", "in fall", "in october"),
    "winter": ("in winter", "in winter", "in wintertime", "in january"),
}
SKY_WORDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("dawn", "pink"): ("pink", "rosy"),
    ("dawn", "golden"): ("golden", "yellow"),
    ("noon", "blue"): ("blue", "bright blue"),
    ("noon", "pale"): ("pale", "pale blue"),
    ("dusk", "orange"): ("orange", "fiery orange"),
    ("dusk", "purple"): ("purple", "violet"),
    ("night", "blue"): ("dark blue", "deep blue"),
    ("night", "violet"): ("purple", "violet"),
}
CLOUD_COLOURS: dict[tuple[str, str], str] = {
    ("dawn", "pink"): "pink",
    ("dawn", "golden"): "golden",
    ("noon", "blue"): "white",
    ("noon", "pale"): "white",
    ("dusk", "orange"): "orange",
    ("dusk", "purple"): "purple",
    ("night", "blue"): "dark",
    ("night", "violet"): "dark",
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
    "golden": ("golden", "yellow"),
    "white": ("snowy", "white", "snow-covered", "wintry"),
}
RELIEF_WORDS: dict[str, tuple[str, ...]] = {
    "alpine": ("mountains", "mountains", "mountains", "peaks", "a mountain range", "high mountains", "alps"),
    "volcano": ("a volcano", "a volcano", "mount fuji", "a lone mountain"),
    "karst": ("karst mountains", "karst towers", "limestone pillars", "guilin mountains", "stone pillars"),
    "hills": ("hills", "hills", "rolling hills", "gentle hills", "low hills"),
    "mesa": ("mesas", "a red canyon", "buttes", "table mountains", "a desert with mesas", "a canyon"),
    "dunes": ("dunes", "sand dunes", "desert dunes", "a sandy desert", "a desert with dunes"),
}
FOREST_WORDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("pines", ""): ("a forest", "a pine forest", "pine trees", "pines", "fir trees", "trees", "evergreens"),
    ("pines", "winter"): ("snowy pines", "a winter forest", "snow-covered fir trees", "a pine forest", "pines"),
    ("leafy", "spring"): ("cherry blossoms", "blossoming trees", "cherry trees", "pink trees", "trees in bloom"),
    ("leafy", "summer"): ("a forest", "green trees", "trees", "leafy trees", "green woods"),
    ("leafy", "autumn"): ("an autumn forest", "autumn trees", "orange trees", "red and orange trees", "autumn woods"),
    ("bare", "winter"): ("bare trees", "leafless trees", "bare woods"),
}
NEAR_TREES: dict[tuple[str, str], tuple[str, ...]] = {
    ("pines", ""): ("an old pine", "a pine tree", "a crooked pine", "a leaning pine"),
    ("leafy", "spring"): ("a cherry tree", "a blossoming tree", "a cherry tree in bloom", "a pink tree"),
    ("leafy", "summer"): ("a large tree", "a green tree", "an old oak", "a leafy tree"),
    ("leafy", "autumn"): ("an orange tree", "a maple tree", "an autumn tree", "a red maple"),
    ("bare", "winter"): ("a bare tree", "a leafless tree", "a bare old tree"),
}
SUBJECT_WORDS: dict[str, tuple[str, ...]] = {
    "boat": ("a sailing boat", "a boat", "a small boat", "a sailboat"),
    "pagoda": ("a pagoda", "a red pagoda", "a temple", "a japanese pagoda"),
    "cabin": ("a cabin", "a small house", "a cottage", "a hut", "a wooden cabin"),
}
INK_PHRASES = (
    "ink painting",
    "an ink painting",
    "ink wash",
    "sumi-e",
    "in ink",
    "a chinese ink painting",
    "brush and ink",
)
SIDES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "to the left", "at the left"),
    "centre": ("in the middle", "in the centre", "in the center"),
    "right": ("on the right", "to the right", "at the right"),
}
OPENINGS = ("", "", "", "", "", "a landscape with ", "a view of ", "a picture of ", "a painting of ", "a photo of ")
INK_OPENINGS = (
    "an ink painting of ",
    "an ink wash of ",
    "a sumi-e painting of ",
    "ink painting, ",
    "a brush painting of ",
)
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
            return " ".join([*adjectives, noun, words.pick(("with snowy peaks", "with snow on top", "with snow"))])
        adjectives.append(words.pick(("snowy", "snowy", "snow-capped", "snow-topped")))
    elif scene.style == "natural" and scene.relief not in ("mesa", "dunes", "karst") and words.chance(0.7):
        adjectives.append(words.pick(LAND_WORDS[scene.land]))
    elif scene.season == "winter" and words.chance(0.7):
        adjectives.append(words.pick(LAND_WORDS["white"]))
    if scene.relief == "dunes" and scene.style == "natural" and words.chance(0.3):
        adjectives.append("golden")
    if scene.forest != "none" and scene.relief in ("hills", "alpine") and words.chance(0.25):
        adjectives.append(words.pick(("forested", "wooded", "forest")))
    if adjectives and noun.startswith("a "):
        return _article(" ".join([*adjectives, noun.removeprefix("a ")]))
    return " ".join([*adjectives, noun])


def _by_season(table: dict[tuple[str, str], tuple[str, ...]], kind: str, scene: Scene, words: _Words) -> str:
    return words.pick(table.get((kind, scene.season)) or table[kind, ""])


def _water(scene: Scene, words: _Words) -> str:
    if scene.water == "lake":
        kinds = ("a lake", "a lake", "a calm lake", "a still lake", "a quiet lake", "calm water", "a mountain lake")
        return words.pick(kinds if scene.relief == "alpine" else kinds[:6])
    if scene.water == "river":
        return words.pick(("a river", "a river", "a winding river", "a stream", "a river valley"))
    seas = ("the sea", "the ocean", "a blue sea", "the open sea", "sea waves")
    return words.pick(seas if scene.relief == "none" and scene.style == "natural" else seas[:2])


def _land_and_water(scene: Scene, words: _Words) -> str:
    """The subject of the sentence; it may leave out any but one of relief, water and forest."""
    if scene.relief == "none":
        return _water(scene, words)
    relief = _relief(scene, words)
    forest = "" if scene.forest == "none" else _by_season(FOREST_WORDS, scene.forest, scene, words)
    if scene.water == "none":
        if forest and words.chance(0.6):
            return words.pick((f"{relief} and {forest}", f"{forest} below {relief}", f"{forest} and {relief}", forest))
        return relief
    water = _water(scene, words)
    if forest and words.chance(0.5):
        return words.pick((f"{water} by {forest}", f"{water}, {forest} and {relief}", f"{forest} around {water}"))
    kind = words.rng.random()
    if kind < 0.2:
        return water
    if kind < 0.32:
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


def _subject(scene: Scene, words: _Words) -> str:
    phrase = words.pick(SUBJECT_WORDS[scene.subject])
    if scene.island and scene.subject != "boat" and words.chance(0.6):
        return phrase + words.pick((" on an island", " on a small island"))
    if words.chance(0.4):
        return phrase + " " + words.pick(SIDES[scene.subject_side])
    if scene.subject == "boat" and words.chance(0.3):
        return phrase + " on the water"
    return phrase


def _weather(scene: Scene, words: _Words) -> str:
    if scene.weather == "rain":
        return words.pick(("rain", "rain", "falling rain", "in the rain", "rainy weather", "a rain shower"))
    return words.pick(("snowfall", "falling snow", "snow is falling", "snowflakes", "in the snow"))


def _clouds(scene: Scene, words: _Words) -> str:
    if scene.clouds == "none":
        return words.pick(("a clear sky", "a cloudless sky", "no clouds"))
    colour = CLOUD_COLOURS.get((scene.time, scene.sky))
    if colour is None:
        return words.pick(("a few clouds", "some clouds") if scene.clouds == "few" else ("a cloudy sky", "many clouds"))
    few = ("a few clouds", f"a few {colour} clouds", f"{colour} clouds", "some clouds", "light clouds")
    many = ("a cloudy sky", "many clouds", f"many {colour} clouds", f"{colour} clouds", "an overcast sky", "clouds")
    return words.pick(few if scene.clouds == "few" else many)


def _facts(scene: Scene, words: _Words) -> list[str]:
    """What else the picture holds, as separate phrases, any of which may be missing."""
    facts: list[str] = []
    if scene.subject != "none" and words.chance(0.85):
        facts.append(_subject(scene, words))
    if scene.near_tree != "none" and words.chance(0.75):
        tree = _by_season(NEAR_TREES, scene.near_tree, scene, words)
        side = words.pick(SIDES["left" if scene.near_tree_on_left else "right"])
        facts.append(words.pick((tree, f"{tree} {side}", f"{tree} in the foreground")))
    if scene.weather != "clear" and words.chance(0.9):
        facts.append(_weather(scene, words))
    if scene.light != "none" and words.chance(0.8):
        facts.append(_light(scene, words))
    if scene.stars and words.chance(0.7):
        facts.append(words.pick(("stars", "many stars", "a starry sky", "under the stars", "bright stars")))
    if scene.aurora and words.chance(0.9):
        facts.append(words.pick(("northern lights", "an aurora", "a green aurora", "aurora in the sky")))
    if scene.island and (scene.subject in ("none", "boat")) and words.chance(0.75):
        facts.append(words.pick(("an island", "a small island", "an island with trees")))
    if scene.birds and words.chance(0.75):
        facts.append(words.pick(("birds", "a flock of birds", "flying birds", "birds in the sky")))
    if scene.weather == "clear" and words.chance(0.3 if scene.clouds == "none" else 0.65):
        facts.append(_clouds(scene, words))
    if (scene.time, scene.sky) in SKY_WORDS and words.chance(0.35):
        facts.append(_article(words.pick(SKY_WORDS[scene.time, scene.sky]) + " sky"))
    if scene.mist and words.chance(0.5):
        facts.append(words.pick(("mist", "fog in the valleys", "mist in the valleys", "fog")))
    return [facts[i] for i in words.rng.permutation(len(facts))]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the many sentences that are true of this scene, in lower case."""
    words = _Words(rng)
    ink = scene.style == "ink"
    opened = ink and words.chance(0.6)
    subject = words.pick(INK_OPENINGS if opened else OPENINGS[:8] if ink else OPENINGS) + _land_and_water(scene, words)
    if scene.season != "none" and scene.relief != "none" and words.chance(0.30):
        subject += " " + words.pick(SEASON_PHRASES[scene.season])
    if words.chance(0.8):
        phrase = words.pick(TIME_PHRASES[scene.time])
        subject = f"{subject} {phrase}" if words.chance(0.85) else f"{phrase}, {subject}"
    facts = _facts(scene, words)
    most = 2 + int(words.chance(0.6)) + int(words.chance(0.3))
    facts = facts[:most]
    if facts and facts[0] == "under the stars":
        subject, facts = f"{subject} under the stars", facts[1:]
    elif facts and words.chance(0.2):
        subject, facts = f"{subject} {words.pick(('with', 'and', 'with'))} {facts[0]}", facts[1:]
    if ink and not opened and words.chance(0.85):
        facts.append(words.pick(INK_PHRASES))
    while words.chance(0.12):
        filler = words.gibberish() if words.chance(0.3) else words.pick(FILLERS)
        facts.insert(int(rng.integers(len(facts) + 1)), filler)
    return ", ".join([subject, *facts])


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that is not held out."""
    while is_held_out(text := caption(scene, rng)):
        pass
    return text


def sample_captions(count: int, seed: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield training_caption(sample_scene(rng), rng)


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
