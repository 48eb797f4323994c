"""Sizes in configs that no model has: refused at once, before anything is made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fuzz
from handscroll.cli import main as cli
from handscroll.errors import CheckpointError, HandscrollError, UsageError, printable
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.runtime.modules import load_module, load_scheduler
from handscroll.units import first_line, one_line

Miniature = Callable[..., Path]
HUGE = (10**9, 10**18, 2**64, 10**30, 10**400, -1, -(10**9), 0)
TRANSFORMER, VAE, TEXT = "transformer/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER, OWN = "scheduler/scheduler_config.json", "handscroll.json"
SIZES = [
    *((TRANSFORMER, field) for field in ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels")),
    *((TRANSFORMER, field) for field in ("out_channels", "num_cross_attention_heads", "cross_attention_head_dim")),
    *((TRANSFORMER, field) for field in ("cross_attention_dim", "caption_channels", "sample_size", "patch_size")),
    *((VAE, field) for field in ("in_channels", "latent_channels", "attention_head_dim")),
    *((TEXT, field) for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")),
    *((TEXT, field) for field in ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")),
    *((OWN, field) for field in ("native_px", "default_steps", "max_prompt_tokens", "compose_px")),
]


@pytest.fixture
def folder(miniature: Miniature, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(miniature("1.6b"), tmp_path / "copy"))
    (copy / OWN).write_text("{}")
    return copy


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(folder: Path, *says: str) -> None:
    outcome = fuzz.judged(lambda: CheckpointSpec.from_folder(folder))
    assert outcome.said is not None
    assert not outcome.faults
    for part in says:
        assert part in outcome.said


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize(("file", "field"), SIZES)
def test_a_size_that_no_model_has_is_refused(folder: Path, file: str, field: str, value: int) -> None:
    edit(folder / file, **{field: value})
    refused(folder, str(folder / file), field.removesuffix("_dim"))


@pytest.mark.parametrize("value", [v for v in HUGE if v])
@pytest.mark.parametrize(
    "field", ["layers_per_block", "block_out_channels", "qkv_multiscales", "block_types", "norm_types"]
)
def test_a_size_of_one_stage_is_refused(folder: Path, field: str, value: int) -> None:
    name = f"decoder_{field}"
    default = json.loads((folder / VAE).read_text())[name]
    values = [default] * 6 if isinstance(default, str) else list(default)
    values[3] = [value] if field == "qkv_multiscales" else value
    edit(folder / VAE, **{name: values})
    refused(folder, name)


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        (VAE, {"decoder_block_out_channels": [8] * 100_000}, "decoder_block_out_channels"),
        (VAE, {"decoder_qkv_multiscales": [[3] * 10_000] * 6}, "scales for a stage"),
        (VAE, {"scaling_factor": 1e-300}, "scaling_factor"),
        (VAE, {"scaling_factor": 1e300}, "scaling_factor"),
        (TRANSFORMER, {"mlp_ratio": 1e9}, "mlp_ratio"),
        (TRANSFORMER, {"mlp_ratio": 1e-9}, "mlp_ratio"),
        (TRANSFORMER, {"interpolation_scale": 0}, "interpolation_scale"),
        (TRANSFORMER, {"norm_eps": 1e400}, "norm_eps"),
        (TEXT, {"pad_token_id": 10**9}, "pad_token_id"),
        (TEXT, {"num_key_value_heads": 3}, "no multiple of num_key_value_heads"),
        (SCHEDULER, {"num_train_timesteps": 10**9}, "num_train_timesteps"),
        (SCHEDULER, {"solver_order": 10**9}, "solver_order"),
        (SCHEDULER, {"trained_betas": [0.1] * 200_000}, "at most 100000"),
        (OWN, {"licence": "x" * 100_000}, "at most 20000"),
        (OWN, {"default_guidance": 1e300}, "default_guidance"),
        (TRANSFORMER, {"comment": "x" * 2**20}, "longer than what is read"),
        (TRANSFORMER, {"comment": [[]] * 200_000}, ""),
    ],
)
def test_other_values_that_no_model_has_are_refused(
    folder: Path, file: str, changes: dict[str, Any], says: str
) -> None:
    edit(folder / file, **changes)
    if says:
        refused(folder, says, str(folder / file))
    else:  # read, and within the bounds
        assert not fuzz.judged(lambda: CheckpointSpec.from_folder(folder)).faults


def test_labels_of_a_text_encoder_are_not_made(folder: Path) -> None:
    edit(folder / TEXT, num_labels=10**9)
    spec = CheckpointSpec.from_folder(folder)
    outcome = fuzz.judged(lambda: load_module(spec, "text_encoder", dtype=torch.float32, device="cpu"))
    assert outcome.said is None
    assert not outcome.faults


@pytest.mark.parametrize(
    ("file", "field", "component"),
    [(TRANSFORMER, "num_layers", "transformer"), (TEXT, "num_hidden_layers", "text_encoder")],
)
def test_more_layers_than_are_stored_are_refused_before_they_are_made(
    folder: Path, file: str, field: str, component: Any
) -> None:
    edit(folder / file, **{field: 512})
    spec = CheckpointSpec.from_folder(folder)
    outcome = fuzz.judged(lambda: load_module(spec, component, dtype=torch.float32, device="cpu"))
    assert outcome.said is not None
    assert "they do not belong together" in outcome.said
    assert not outcome.faults


@pytest.mark.parametrize(
    "changes", [{"num_train_timesteps": "many"}, {"solver_order": [1]}, {"algorithm_type": 3}, {"beta_schedule": "no"}]
)
def test_settings_that_a_scheduler_does_not_take_are_named(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder / SCHEDULER, **changes)
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json") as caught:
        load_scheduler(CheckpointSpec.from_folder(folder))
    assert "\n" not in str(caught.value)


# What a terminal would obey.

ORDERS = "\x1b[31mred\x1b]0;title\x07\u202egnp\r\n\x9b2J\u2028"


def test_no_message_passes_on_what_a_terminal_obeys() -> None:
    for kind in (HandscrollError, CheckpointError, UsageError):
        line = str(kind(f"{ORDERS}: no"))
        assert line.isprintable()
        assert line.startswith(r"\x1b[31mred\x1b]0;title\x07\u202egnp")
    assert one_line(ORDERS).isprintable()
    assert first_line(ValueError(ORDERS)).isprintable()
    assert printable("हिन्दी 雪 \U0001f469\u200d\U0001f680 é") == "हिन्दी 雪 \U0001f469\u200d\U0001f680 é"
    assert printable("\udcff") == r"\udcff"


def test_info_shows_names_without_obeying_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.safetensors"
    name, key = json.dumps(f"a{ORDERS}"), json.dumps(f"k{ORDERS}")
    text = f'{{"__metadata__":{{{key}:{key}}},{name}:{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}'
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(4))
    assert cli.run(["info", str(file)]) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert r"a\x1b[31mred" in out
    assert cli.run(["info", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"] == {f"k{ORDERS}": f"k{ORDERS}"}


def test_a_checkpoints_own_texts_are_shown_without_obeying_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / OWN).write_text(json.dumps({"name": f"n{ORDERS}", "licence": f"l{ORDERS}"}))
    spec = CheckpointSpec.from_folder(folder)
    assert spec.name.isprintable()
    assert cli.run(["info", str(folder)]) == 0
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())
