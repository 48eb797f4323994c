"""A model that is not here is planned as it will be once it is: from its small files, or from known figures."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

import miniatures
from handscroll.cli import main as cli
from handscroll.errors import FetchError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.known import TRANSFORMERS, known_spec, known_specs
from handscroll.models.listing import stored_in
from handscroll.models.opening import open_checkpoint
from handscroll.models.registry import BY_NAME, ENTRIES
from handscroll.pipeline import plan_of
from handscroll.plan.inputs import Hardware, PlanInputs
from handscroll.plan.plan import Plan
from handscroll.plan.search import make_plan
from handscroll.request import Request

OFFICIAL = [entry.name for entry in ENTRIES if entry.hub_id]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMMIT = "89abcdef" * 5
# Millions of parameters of the transformers, as counted in their files.
COUNTED = {"0.6b": 591.7, "1.6b": 1604.5, "1.5-1.6b": 1604.6, "1.5-4.8b": 4721.8, "sprint-0.6b": 593.5}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the hub is here, fetching is allowed, and whoever reaches for it fails the test."""

    def reached(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"the network was reached for: {arguments}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", reached)
    monkeypatch.setattr(socket, "getaddrinfo", reached)


def put(folder: Path, hub_id: str, *, weights: bool) -> Path:
    """A checkpoint's folder as the hub's cache holds it, with its weights or without."""
    place = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id, repo_type="model")
    shutil.rmtree(place, ignore_errors=True)
    left_out = None if weights else shutil.ignore_patterns("*.safetensors")
    snapshot = Path(shutil.copytree(folder, place / "snapshots" / COMMIT, ignore=left_out))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    return snapshot


def row_of(name: str) -> str:
    """The miniature of the same kind."""
    kind = name.removeprefix("sana-").removesuffix("-fp16").removesuffix("-multiling")
    return {"0.6b-512": "0.6b", "1.6b-512": "1.6b-512"}.get(kind, kind)


# Figures


def test_every_official_model_is_known() -> None:
    assert list(TRANSFORMERS) == OFFICIAL
    for name, spec in known_specs().items():
        entry = BY_NAME[name]
        assert (spec.name, spec.native_px, spec.published) == (name, entry.native_px, entry.precision)
        assert spec.is_sprint is ("sprint" in name)
        assert spec.default_steps == (2 if spec.is_sprint else 20)
        assert spec.transformer.sample_size * 32 == entry.native_px
        assert spec.from_figures


@pytest.mark.parametrize("name", OFFICIAL)
def test_known_shapes_have_the_parameters_that_were_counted(name: str) -> None:
    spec = known_specs()[name]
    size = name.removeprefix("sana-")
    kind = max((each for each in COUNTED if size.startswith(each)), key=len, default=None)
    if kind is not None:
        assert spec.transformer.parameter_count / 1e6 == pytest.approx(COUNTED[kind], abs=0.05)
    assert spec.text_encoder.parameter_count / 1e6 == pytest.approx(2614.3, abs=0.05)
    assert spec.autoencoder.encoder_parameter_count / 1e6 == pytest.approx(153.0, abs=0.05)
    assert spec.autoencoder.decoder_parameter_count / 1e6 == pytest.approx(159.2, abs=0.05)


# With weights and without


def plans(name: str, inputs: PlanInputs, **options: Any) -> Plan:
    spec = open_checkpoint(name, weights_too=False)
    return make_plan(spec, Request.of("a lake", model=name, **options), inputs, 0)


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("stored", ["as its pipeline runs", "as the hub has it"])
def test_a_plan_without_weights_is_the_plan_with_them(
    miniature: Callable[..., Path], tmp_path: Path, name: str, stored: str
) -> None:
    """The hub has every autoencoder in fp32, and beside transformers that are meant for fp16 also shards in fp32."""
    entry = BY_NAME[name]
    assert entry.hub_id is not None
    folder = miniature(row_of(name), dtype=DTYPES[entry.precision])
    if stored == "as the hub has it":
        mixed = tmp_path / "mixed"
        shutil.copytree(folder, mixed)
        replaced = {"vae": torch.float32, "text_encoder": torch.bfloat16}
        if entry.precision == "fp16":
            replaced["transformer"] = torch.float32
        for part, dtype in replaced.items():
            shutil.copytree(miniature(row_of(name), dtype=dtype) / part, mixed / part, dirs_exist_ok=True)
        folder = mixed
    for hardware in (Hardware("cpu"), Hardware("cpu", bf16_is_faster=True), Hardware("cuda:0", free_bytes=2**34)):
        inputs = PlanInputs(hardware, tokens=20)
        for options in ({}, {"precision": "bf16"}, {"memory": "40GiB", "size": 512}):
            put(folder, entry.hub_id, weights=False)
            without = plans(name, inputs, **options)
            put(folder, entry.hub_id, weights=True)
            whole = open_checkpoint(name, weights_too=False)
            assert whole.n_bytes > 0
            assert plans(name, inputs, **options) == without
            found = {part: whole.dtype_of(part) for part in ("text_encoder", "transformer", "vae")}
            if stored == "as its pipeline runs":
                assert set(found.values()) == {entry.precision}
            else:
                assert (found["text_encoder"], found["vae"]) == ("bf16", "fp32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plan_of_the_configs_alone_is_the_plan_of_the_folder(miniature: Callable[..., Path], dtype: str) -> None:
    folder = miniature("1.6b", dtype=DTYPES[dtype])
    whole = CheckpointSpec.from_folder(folder)
    bare = dataclasses.replace(CheckpointSpec.from_configs(folder), published=dtype)
    for hardware in (Hardware("cpu"), Hardware("cpu", bf16_is_faster=True), Hardware("cuda:0", free_bytes=2**34)):
        inputs = PlanInputs(hardware, tokens=20)
        request = Request("a lake", width=512, height=512)
        assert make_plan(bare, request, inputs, 0) == make_plan(whole, request, inputs, 0)


@pytest.mark.parametrize(
    ("names", "bytes_each", "half", "expected"),
    [
        (["{}/model.bf16.safetensors"], 2, "fp16", "bf16"),
        (["{}/model.fp16.safetensors"], 2, "bf16", "fp16"),
        (["{}/model-00001-of-00002.safetensors", "{}/model-00002-of-00002.safetensors"], 4, "bf16", "fp32"),
        (["{}/model.safetensors"], 2, "fp16", "fp16"),
        (["{}/model.safetensors"], 4, "fp16", "fp32"),
        (["{}/model.bf16.safetensors"], 4, "fp16", "fp32"),
    ],
)
def test_a_listing_tells_the_precision(names: list[str], bytes_each: int, half: str, expected: str) -> None:
    spec = known_specs()["sana-1.6b"]
    counts = {
        "text_encoder": spec.text_encoder.parameter_count,
        "transformer": spec.transformer.parameter_count,
        "vae": spec.autoencoder.parameter_count,
    }
    files = {name.format(part): count * bytes_each // len(names) for part, count in counts.items() for name in names}
    assert dict(stored_in(files, spec, half)) == dict.fromkeys(counts, expected)
    assert stored_in(dict.fromkeys(files, 0), spec, half) == ()


# Without a network


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_model_is_planned_without_a_network(name: str) -> None:
    spec, plan, minimum_bytes = plan_of(Request("a lake", model=name, memory_bytes=2**40))
    assert (plan.width, plan.height) == (BY_NAME[name].native_px,) * 2
    assert minimum_bytes is not None
    assert any("planned from known figures, and nothing was fetched" in line for line in plan.notices)
    assert any("tokens" in line for line in plan.notices)
    assert plan.prompt_read is None
    assert spec.from_figures


@pytest.mark.parametrize("model", ["{}", "{}@main", "https://huggingface.co/{}", "sana-1.6b-4k@main"])
def test_an_official_model_by_any_of_its_names_is_the_model(model: str) -> None:
    hub_id = BY_NAME["sana-1.6b-4k"].hub_id
    assert hub_id is not None
    known = known_specs()["sana-1.6b-4k"]
    assert open_checkpoint(model.format(hub_id), weights_too=False) == known
    assert open_checkpoint(model.format(hub_id.lower()), weights_too=False) == known
    assert open_checkpoint("sana-1.6b-4k", "main", weights_too=False) == known


def test_the_command_says_what_it_planned_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "--model", "sana-1.6b-4k"]) == 0
    out, err = capsys.readouterr()
    assert "sana-1.6b-4k, 4096x4096, 20 steps" in out
    assert "nothing was fetched" in err
    assert cli.run(["plan", "--model", "sana-1.6b-4k", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["planned_from"] == "known figures"
    assert any("nothing was fetched" in line for line in found["notices"])
    assert "prompt_tokens" not in found


def test_known_figures_are_planned_with_no_fewer_tokens_than_there_are(miniature: Callable[..., Path]) -> None:
    """The miniatures' tokens are bytes, the most that a text can have."""
    from handscroll.runtime.modules import load_tokenizer
    from handscroll.runtime.text import count_tokens, instruction_of, most_tokens

    spec = CheckpointSpec.from_folder(miniature("1.6b"))
    tokenizer = load_tokenizer(spec)
    for prompt in ("a lake", "雪山と湖", "x" * 299, "long " * 500, ""):
        for instruction in ("", instruction_of(spec)):
            counted = count_tokens(spec, tokenizer, prompt, instruction)
            assert counted <= most_tokens(spec, prompt, instruction) <= counted + 4


# What is not known


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_revision_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    with pytest.raises(FetchError, match=r"revision v1 of Efficient-Large-Model/.* is not on this machine"):
        plan_of(Request("a lake", model="sana-1.6b", revision="v1"))


def test_an_unknown_hub_id_needs_its_small_files(
    monkeypatch: pytest.MonkeyPatch, miniature: Callable[..., Path]
) -> None:
    offline(monkeypatch)
    with pytest.raises(FetchError, match="someone/else is not on this machine") as caught:
        plan_of(Request("a lake", model="someone/else"))
    assert "\n" not in str(caught.value)
    put(miniature("1.6b", dtype=torch.bfloat16), "someone/else", weights=False)
    spec, plan, _ = plan_of(Request("a lake", model="someone/else"))
    assert plan.notices == ()
    assert spec.dtype_of("transformer") == "bf16"  # as its text encoder's config says


def test_the_built_in_model_needs_no_figures() -> None:
    with pytest.raises(KeyError):
        known_spec(BY_NAME["tiny-landscape"])
    assert set(miniatures.ROWS) >= {row_of(name) for name in OFFICIAL}
