"""Weights that are in memory only while their module is called: the same bits, and nothing left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.transformer import TransformerSpec
from handscroll.plan.inputs import Hardware, PlanInputs
from handscroll.plan.search import make_plan
from handscroll.request import Request
from handscroll.runtime.session import Session, embedder_units
from quantised_cases import branches_of, true_transformer

Miniature = Callable[..., Path]


@pytest.mark.parametrize("storage", ["", "int8", "int4"])
@pytest.mark.parametrize("row", ["1.6b", "sprint-1.6b"])
def test_embedders_that_pass_change_no_bit(miniature: Miniature, row: str, storage: str) -> None:
    spec = CheckpointSpec.from_folder(miniature(row))
    request = Request("a lake", width=64, height=64, device="cpu", precision=f"{storage}+fp32" if storage else "fp32")
    plan = make_plan(spec, request, PlanInputs(hardware=Hardware("cpu"), tokens=6), seed=1)
    assert plan.denoise is not None
    found: list[Any] = []
    for resident, passes in ((spec.transformer.num_layers, False), (0, True)):
        denoise = dataclasses.replace(plan.denoise, resident_layers=resident, embedders_pass=passes)
        with Session(spec) as session:
            transformer = session.open_transformer(dataclasses.replace(plan, denoise=denoise))
            units = embedder_units(transformer.module)
            assert all(unit.weight.is_meta == passes for unit in units)
            branches = branches_of(transformer.module, torch.float32)
            found.append([transformer.predict(branches), transformer.predict(branches)])
            assert all(unit.weight.is_meta == passes for unit in units)
            assert sum(map(transformer.stream.bytes_of, units)) == 4 * sum(spec.transformer.embedder_units)
    for ours, theirs in zip(found[0] + found[1], found[1] + found[0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["sana-1.6b-4k", "sana-1.5-4.8b", "sana-sprint-0.6b"])
def test_units_are_those_of_the_modules(name: str) -> None:
    from diffusers import SanaTransformer2DModel

    spec: TransformerSpec = true_transformer(name)
    with torch.device("meta"):
        module = SanaTransformer2DModel(**dataclasses.asdict(dataclasses.replace(spec, num_layers=1, sample_size=32)))
    counts = [sum(each.numel() for each in unit.parameters(recurse=False)) for unit in embedder_units(module)]
    assert sorted(counts) == sorted(spec.embedder_units)
    assert sum(each.numel() for each in module.parameters()) == dataclasses.replace(spec, num_layers=1).parameter_count
