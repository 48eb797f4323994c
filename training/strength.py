"""How much of each larger size's schedule growth should run again: what `plan/growth.py` calls its strength.

    python -m training.strength --work WORK --size 2048 --prompts 24 --strengths 0.4 0.3 0.2,0.3

A strength with commas is that of the first time that a picture grows, of the second, and of every further time. For
every strength, of the same held-out prompts and seeds: how much of the sentences the pictures show and how often a sun
or a subject is alone, as `training.evaluate` counts them; the energy of the octaves; and how like its sketch of 512
rows a picture is. Rows are kept in WORK, named after the weights, so that a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handscroll import Handscroll
from handscroll.plan import growth
from training.evaluate import (
    Picture,
    checksum,
    generate,
    held_out_prompts,
    look_at_all,
    model_files,
    octaves,
    report_attributes,
)
from training.scorer import Scorer, load_scorer, read, scorer_file
from training.world import Scene, render

SKETCH_PX = 512
COMPARED_PX = 64

Row = dict[str, Any]
Strength = tuple[float, ...]


def strength_of(text: str) -> Strength:
    return tuple(map(float, text.split(",")))


def name_of(strength: Strength) -> str:
    return ",".join(map(str, strength))


@dataclass(frozen=True)
class Case:
    """One held-out sentence, made once as a sketch and then at full size by every strength."""

    number: int
    prompt: str
    scene: Scene


def likeness(sketch: Picture, large: Picture) -> float:
    """Correlation of two pictures of 64x64: red less blue, without each row's mean, so that no sky counts as alike."""
    a, b = (_without_rows(picture) for picture in (sketch, large))
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def _without_rows(picture: Picture) -> np.ndarray:
    share = len(picture) // COMPARED_PX
    small = picture.astype(np.float64).reshape(COMPARED_PX, share, COMPARED_PX, share, 3).mean(axis=(1, 3))
    warm: np.ndarray = small[..., 0] - small[..., 2]
    return warm - warm.mean(axis=1, keepdims=True)


class Study:
    """Makes and reads the pictures of a case. One for each process."""

    def __init__(self, scroll: Handscroll, scorer: Scorer, size: int, strengths: Sequence[Strength]) -> None:
        self.scroll, self.scorer, self.size, self.strengths = scroll, scorer, size, strengths

    def _seen(self, picture: Picture) -> Row:
        labels = {name: reading.label for name, reading in read(self.scorer, picture).items()}
        return {"labels": labels, "octaves": octaves(picture).tolist()}

    def _made(self, case: Case, size: int) -> Picture:
        guidance = self.scroll.spec.default_guidance
        return generate(self.scroll, case.prompt, size, size, case.number, 20, guidance)

    def __call__(self, case: Case) -> Row:
        sketch = self._made(case, SKETCH_PX)
        row: Row = {
            "prompt": case.prompt,
            "sketch": self._seen(sketch),
            "rendered": self._seen(render(case.scene, self.size, self.size)),
        }
        for strength in self.strengths:
            growth.GROWTH_STRENGTHS = strength
            large = self._made(case, self.size)
            row[name_of(strength)] = {**self._seen(large), "likeness": likeness(sketch, large)}
        return row


_study: Study


def _begin(folder: Path, scorer: Path, size: int, strengths: Sequence[Strength]) -> None:
    global _study
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    _study = Study(Handscroll.from_pretrained(folder), load_scorer(scorer), size, strengths)


def _look(case: Case) -> Row:
    return _study(case)


def report(rows: Sequence[Row], strengths: Sequence[Strength], size: int) -> None:
    for strength in strengths:
        name = name_of(strength)
        print(f"\nstrength {name}")
        report_attributes([{**row, "generated": row[name]} for row in rows], size)
        like = np.asarray([row[name]["likeness"] for row in rows])
        print(f"like its sketch: mean {like.mean():.3f}, least {like.min():.3f}, above 0.75 {np.mean(like > 0.75):.2f}")
        more = [row for row in rows if _lights(row["sketch"]) == "one" and _lights(row[name]) != "one"]
        ones = [row for row in rows if _lights(row["sketch"]) == "one"]
        print(f"one light in the sketch and not one in the large picture: {len(more)} of {len(ones)}", flush=True)


def _lights(seen: Row) -> str:
    return str(seen["labels"]["lights"]) if seen["labels"]["light"] != "none" else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("src/handscroll/builtin/tiny-landscape"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--strengths", nargs="+", type=strength_of, default=[(0.4,), growth.GROWTH_STRENGTHS, (0.2,)])
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    scorer = scorer_file(options.work)
    made_by = checksum([*model_files(options.folder), scorer])
    cases = [Case(number, text, scene) for number, scene, text in held_out_prompts(options.prompts)]
    path = options.work / f"strength-{options.size}-{made_by}-{' '.join(map(name_of, options.strengths))}.jsonl"
    given = (options.folder, scorer, options.size, options.strengths)
    with ProcessPoolExecutor(options.processes, get_context("spawn"), initializer=_begin, initargs=given) as pool:

        def looks(left: Sequence[Case]) -> Iterator[Row]:
            return pool.map(_look, left)

        rows = look_at_all(path, cases, looks)
    report(rows, options.strengths, options.size)


if __name__ == "__main__":
    main()
