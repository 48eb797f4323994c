"""What a checkpoint's files ask for and handscroll does not do: refused before a weight is read, or said in a line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from handscroll.errors import CheckpointError, UsageError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.index import OTHER_PIPELINES, PIPELINES
from handscroll.pipeline import generate, plan_of
from handscroll.request import Request

Miniature = Callable[..., Path]


@pytest.fixture
def folder(miniature: Miniature, tmp_path: Path) -> Path:
    return Path(shutil.copytree(miniature("1.6b"), tmp_path / "model"))


@pytest.fixture
def few_step(miniature: Miniature, tmp_path: Path) -> Path:
    return Path(shutil.copytree(miniature("sprint-1.6b"), tmp_path / "few-step"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def asked(folder: Path, **options: Any) -> Request:
    return Request.of("a lake", model=folder, **{"size": 64, "steps": 2, "seed": 1, **options})


def refused(folder: Path, *says: str, **options: Any) -> None:
    """Refused by a plan, which reads no weight, in one line."""
    with pytest.raises(CheckpointError) as caught:
        plan_of(asked(folder, **options))
    assert "\n" not in str(caught.value)
    for each in says:
        assert each in str(caught.value)


# Pipelines


@pytest.mark.parametrize("pipeline", OTHER_PIPELINES)
def test_a_pipeline_that_is_not_implemented_says_what_is_missing_and_what_to_do(folder: Path, pipeline: str) -> None:
    edit(folder / "model_index.json", _class_name=pipeline)
    refused(folder, pipeline, "model_index.json", "not implemented", "use ")
    with pytest.raises(CheckpointError, match=pipeline):
        CheckpointSpec.from_configs(folder)  # so is a fetch, after the small files


def test_every_other_pipeline_of_the_family_is_refused(folder: Path) -> None:
    family = [name for name in dir(diffusers) if name.startswith("Sana") and name.endswith("Pipeline")]
    assert set(PIPELINES) <= set(family)
    for name in {*family, "SanaInpaintPipeline", "SanaPipelineOfMyOwn"} - set(PIPELINES):
        edit(folder / "model_index.json", _class_name=name)
        refused(folder, name, "not implemented")


@pytest.mark.parametrize(
    ("pipeline", "changed"),
    [("SanaPAGPipeline", "SanaPipeline"), ("SanaControlNetPipeline", "SanaPipeline")],
)
def test_what_the_line_says_to_do_works(folder: Path, pipeline: str, changed: str) -> None:
    edit(folder / "model_index.json", _class_name=pipeline)
    refused(folder, f'write "{changed}"')
    edit(folder / "model_index.json", _class_name=changed)
    assert plan_of(asked(folder))[1].steps == 2


def test_a_few_step_pipeline_that_begins_from_a_picture(few_step: Path) -> None:
    edit(few_step / "model_index.json", _class_name="SanaSprintImg2ImgPipeline")
    refused(few_step, 'write "SanaSprintPipeline"')


# Components


@pytest.mark.parametrize("name", ["controlnet", "safety_checker", "image_encoder", "adapter", "guider"])
def test_a_component_that_is_not_run_is_refused(folder: Path, name: str) -> None:
    edit(folder / "model_index.json", **{name: ["diffusers", "Something"]})
    refused(folder, name, "take its entry out")
    edit(folder / "model_index.json", **{name: [None, None]})
    assert plan_of(asked(folder))[1].notices == ()


def test_settings_of_the_index_that_nothing_takes_are_told(folder: Path) -> None:
    edit(folder / "model_index.json", requires_safety_checker=False, pag_applied_layers="transformer_blocks.8")
    (line,) = plan_of(asked(folder))[1].notices
    assert "pag_applied_layers" in line
    assert "requires_safety_checker" not in line


@pytest.mark.parametrize("component", ["vae", "transformer", "scheduler", "text_encoder"])
def test_code_that_comes_with_a_checkpoint_is_refused(folder: Path, component: str) -> None:
    entry = json.loads((folder / "model_index.json").read_text())[component]
    edit(folder / "model_index.json", **{component: ["my_module", entry[1]]})
    refused(folder, component, "my_module")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (["my_module", "GemmaTokenizerFast"], "handscroll runs those of transformers"),
        (["diffusers", "GemmaTokenizerFast"], "handscroll runs those of transformers"),
        (["transformers", "GemmaTokenizerFast", "more"], "names no tokenizer"),
        (["transformers", None], "names no tokenizer"),
        ("GemmaTokenizerFast", "names no tokenizer"),
        ({"transformers": "GemmaTokenizerFast"}, "names no tokenizer"),
        (None, "names no tokenizer"),
    ],
    ids=str,
)
def test_a_tokenizer_of_another_library_is_refused(folder: Path, entry: Any, says: str) -> None:
    edit(folder / "model_index.json", tokenizer=entry)
    refused(folder, says)


def test_code_that_a_config_names_is_told_and_not_run(folder: Path) -> None:
    for name in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        edit(folder / name, auto_map={"AutoModel": "modeling_mine.Mine", "AutoTokenizer": ["mine.Mine", None]})
        (folder / name).with_name("modeling_mine.py").write_text("raise SystemExit('it ran')")
    notices = plan_of(Request("a lake", model=str(folder), width=64, height=64))[1].notices
    told = [line for line in notices if "auto_map names code that comes with the checkpoint; it is not run" in line]
    assert [Path(line.split(":")[0]).name for line in told] == ["config.json", "tokenizer_config.json"]


def test_an_adapter_beside_the_weights_is_refused(folder: Path) -> None:
    (folder / "text_encoder" / "adapter_config.json").write_text("{}")
    refused(folder, "adapter_config.json", "fuse")


# Settings


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("transformer/config.json", {"guidance_embeds": True}, ["guidance_embeds", "SanaSprintPipeline"]),
        ("transformer/config.json", {"out_channels": 48}, ["48 channels", "32 or 64"]),
        ("vae/config.json", {"in_channels": 4}, ["4 channels", "pictures have 3"]),
        ("vae/config.json", {"upsample_block_type": "bilinear"}, ["upsample_block_type 'bilinear'"]),
        ("vae/config.json", {"downsample_block_type": "pool"}, ["downsample_block_type 'pool'"]),
        ("vae/config.json", {"decoder_act_fns": "tanh"}, ["decoder_act_fns 'tanh'"]),
        ("vae/config.json", {"decoder_conv_act_fn": "tanh"}, ["decoder_conv_act_fn 'tanh'"]),
        ("vae/config.json", {"decoder_norm_types": "layer_norm"}, ["layer_norm"]),
        ("text_encoder/config.json", {"model_type": "llama", "architectures": None}, ["llama", "gemma2"]),
        ("text_encoder/config.json", {"architectures": "LlamaModel"}, ["text_encoder is 'LlamaModel'", "Gemma2Model"]),
        ("text_encoder/config.json", {"architectures": [["Gemma2Model"]]}, ["text_encoder is ['Gemma2Model']"]),
        ("text_encoder/config.json", {"architectures": {"a": "b"}}, ["text_encoder is {'a': 'b'}"]),
        ("vae/config.json", {"_class_name": ["AutoencoderDC"]}, ["vae is ['AutoencoderDC']", "AutoencoderDC"]),
        ("transformer/config.json", {"_class_name": 5}, ["transformer is 5", "SanaTransformer2DModel"]),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, ["model_index.json"]),
        ("scheduler/scheduler_config.json", {"algorithm_type": "euler"}, ["scheduler_config.json", "euler"]),
        ("scheduler/scheduler_config.json", {"solver_type": "rk4"}, ["scheduler_config.json", "rk4"]),
        ("scheduler/scheduler_config.json", {"prediction_type": "x"}, ["scheduler_config.json", "prediction_type"]),
        ("scheduler/scheduler_config.json", {"final_sigmas_type": "one"}, ["final_sigmas_type"]),
        ("scheduler/scheduler_config.json", {"beta_schedule": "none"}, ["scheduler_config.json"]),
        (
            "scheduler/scheduler_config.json",
            {"use_karras_sigmas": True, "use_exponential_sigmas": True},
            ["scheduler_config.json"],
        ),
        ("scheduler/scheduler_config.json", {"variance_type": "learned_range", "prediction_type": "epsilon"}, ["run"]),
    ],
    ids=str,
)
def test_a_setting_that_does_not_run_is_refused_by_the_plan(
    folder: Path, file: str, changes: dict[str, Any], says: list[str]
) -> None:
    edit(folder / file, **changes)
    refused(folder, *says)


def euler(folder: Path, **settings: Any) -> Path:
    name = "FlowMatchEulerDiscreteScheduler"
    edit(folder / "model_index.json", scheduler=["diffusers", name])
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": name, "shift": 3.0, **settings}))
    return folder


def test_a_shift_that_nobody_gives_is_refused(folder: Path) -> None:
    refused(euler(folder, use_dynamic_shifting=True), "use_dynamic_shifting", "set it to false")


def test_settings_of_another_scheduler_are_told(folder: Path) -> None:
    notices = plan_of(asked(euler(folder, flow_shift=6.0, use_flow_sigmas=True, thresholding=False)))[1].notices
    assert len(notices) == 1
    assert "flow_shift and use_flow_sigmas" in notices[0]


def test_settings_that_a_module_does_not_know_are_told(folder: Path) -> None:
    edit(folder / "transformer/config.json", attention_type="softmax", addition_embed_type=None)
    edit(folder / "vae/config.json", shift_factor=0.1)
    notices = plan_of(asked(folder))[1].notices
    assert [("attention_type" in line, "shift_factor" in line) for line in notices] == [(True, False), (False, True)]
    assert not any("addition_embed_type" in line for line in notices)


def test_a_scheduler_of_the_other_pipeline_is_refused(folder: Path, few_step: Path) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", "SCMScheduler"])
    (folder / "scheduler/scheduler_config.json").write_text('{"_class_name": "SCMScheduler"}')
    refused(folder, "SanaPipeline", "SCMScheduler")
    refused(euler(few_step), "SanaSprintPipeline", "SCMScheduler")


def test_another_prediction_of_a_few_step_model_is_refused(few_step: Path) -> None:
    edit(few_step / "scheduler/scheduler_config.json", prediction_type="epsilon")
    refused(few_step, "prediction_type 'epsilon'", "trigflow")


def test_more_steps_than_a_schedule_has_are_refused_by_the_plan(few_step: Path) -> None:
    edit(few_step / "scheduler/scheduler_config.json", num_train_timesteps=10)
    with pytest.raises(UsageError, match="11 steps do not suit"):
        plan_of(asked(few_step, steps=11))


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm_type": "sde-dpmsolver++"},
        {"solver_order": 3},
        {"solver_type": "heun"},
        {"timestep_spacing": "trailing", "use_flow_sigmas": False},
        {"use_karras_sigmas": True, "use_flow_sigmas": False},
        {"final_sigmas_type": "sigma_min"},
        {"euler_at_final": True},
        {"thresholding": True},
    ],
    ids=str,
)
def test_a_setting_that_runs_makes_the_picture_of_diffusers(folder: Path, settings: dict[str, Any]) -> None:
    """The scheduler itself is diffusers', but the loop around it is not."""
    edit(folder / "scheduler/scheduler_config.json", **settings)
    saved = folder / "latent.safetensors"
    generate(asked(folder, steps=5, guidance=3.0), folder / "a.png", save_latent=saved)
    from safetensors.torch import load_file

    pipe = diffusers.SanaPipeline.from_pretrained(folder)
    expected = pipe(
        "a lake",
        num_inference_steps=5,
        guidance_scale=3.0,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        use_resolution_binning=False,
    ).images
    assert (load_file(saved)["latent"] - expected).abs().max() <= 2e-5 * max(1.0, float(expected.abs().max()))


def test_without_flow_sigmas_no_picture_grows(folder: Path) -> None:
    edit(folder / "scheduler/scheduler_config.json", use_flow_sigmas=False)
    with pytest.raises(UsageError, match="flow sigmas"):
        plan_of(asked(folder, size=256, compose=64, steps=5))
    (folder / "handscroll.json").write_text('{"compose_px": 64}')
    plan = plan_of(asked(folder, size=256, steps=5))[1]
    assert plan.smaller is None
    assert any("do not grow" in line for line in plan.notices)
