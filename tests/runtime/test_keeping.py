"""Jobs of one process, one after the other: the same pictures and plans, with modules that stay where there is room."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from handscroll.errors import BudgetError
from handscroll.events import Progress
from handscroll.pipeline import generate
from handscroll.request import Request
from handscroll.runtime.keeping import Keeping

Miniature = Callable[..., Path]


def asked(model: Path, **options: Any) -> Request:
    return Request("a lake", model=str(model), width=96, height=64, steps=2, seed=3, precision="fp32", **options)


def kept(keeping: Keeping) -> list[str]:
    session = keeping._session
    return [] if session is None else sorted(key.module for key in session.opened)


def test_modules_stay_and_pictures_are_the_same(miniature: Miniature, tmp_path: Path) -> None:
    request, keeping = asked(miniature("1.6b")), Keeping()
    (alone,) = generate(request, tmp_path / "alone.png")
    opened = []
    for number, prompt in enumerate(("a lake", "a bay that nobody has asked for", "a lake")):
        (made,) = generate(dataclasses.replace(request, prompt=prompt), tmp_path / f"{number}.png", keeping=keeping)
        opened.append(kept(keeping))
        assert made.memory["stages"].keys() == alone.memory["stages"].keys()
    # Embeddings of the first prompt are in the cache.
    assert opened == [["decoder", "transformer"], *[["decoder", "text_encoder", "transformer"]] * 2]
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in ("alone", 0, 1, 2)]
    assert pictures[0] == pictures[1] == pictures[3] != pictures[2]


def test_another_model_or_precision_takes_their_place(miniature: Miniature, tmp_path: Path) -> None:
    first, second, keeping = miniature("1.6b"), miniature("sprint-1.6b"), Keeping()
    requests = [asked(first), asked(second), dataclasses.replace(asked(second), precision="bf16"), asked(first)]
    for number, request in enumerate(requests):
        generate(request, tmp_path / "alone.png")
        generate(request, tmp_path / f"{number}.png", keeping=keeping)
        assert (tmp_path / "alone.png").read_bytes() == (tmp_path / f"{number}.png").read_bytes()
        assert {"decoder", "transformer"} <= set(kept(keeping))
    keeping.free()
    assert not kept(keeping)


def test_under_a_budget_nothing_stays_and_the_next_job_fits_too(miniature: Miniature, tmp_path: Path) -> None:
    request, keeping = asked(miniature("1.6b")), Keeping()
    generate(request, tmp_path / "warm.png")  # libraries are imported, kernels compiled
    with pytest.raises(BudgetError) as refused:
        generate(dataclasses.replace(request, memory_bytes=2**20), tmp_path / "x.png")
    tight = dataclasses.replace(request, memory_bytes=refused.value.minimum_bytes + 2**20)
    planned = []
    for number in range(4):
        (made,) = generate(tight, tmp_path / f"{number}.png", keeping=keeping)
        planned.append(made.memory["planned_peak_bytes"])
        assert not kept(keeping)
        assert (tmp_path / f"{number}.png").read_bytes() == (tmp_path / "warm.png").read_bytes()
    assert len(set(planned)) == 1


def test_a_job_that_fails_leaves_the_next_as_it_was(miniature: Miniature, tmp_path: Path) -> None:
    request, keeping = asked(miniature("1.6b")), Keeping()
    (tmp_path / "alone").mkdir()
    generate(request, tmp_path / "alone" / "x.png")

    class Enough(Exception):
        pass

    def listen(event: Progress) -> None:
        if event.stage == "denoise" and event.done == 1:
            raise Enough

    with pytest.raises(Enough):
        generate(request, tmp_path / "x.png", on_event=listen, keeping=keeping)
    generate(request, tmp_path / "x.png", keeping=keeping)
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "alone" / "x.png").read_bytes()


def test_files_that_changed_under_it_are_read_anew(miniature: Miniature, tmp_path: Path) -> None:
    model, keeping = tmp_path / "model", Keeping()
    shutil.copytree(miniature("1.6b"), model)
    generate(asked(model), tmp_path / "0.png", keeping=keeping)
    (weights,) = (model / "transformer").glob("*.safetensors")
    other = next(iter((miniature("1.6b", seed=9) / "transformer").glob("*.safetensors")))
    shutil.copyfile(other, weights)
    generate(asked(model), tmp_path / "alone.png")
    generate(asked(model), tmp_path / "1.png", keeping=keeping)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "alone.png").read_bytes()
