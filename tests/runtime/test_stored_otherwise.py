"""Checkpoints that other tools wrote: the same tensors and tokens under other names, and more than is read."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from handscroll import Request
from handscroll.errors import CheckpointError
from handscroll.events import Progress
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.pipeline import plan_of
from handscroll.runtime.modules import Component, load_module, load_rows, load_tokenizer
from handscroll.weights.folder import candidates, find_weight_files

Miniature = Callable[..., Path]
WEIGHTS: dict[Component, str] = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
pytestmark = pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated:FutureWarning")


@pytest.fixture
def folder(miniature: Miniature, tmp_path: Path) -> Path:
    return Path(shutil.copytree(miniature("1.6b"), tmp_path / "copy"))


def loaded(folder: Path, component: Component) -> tuple[dict[str, torch.Tensor], list[Progress]]:
    """The module's tensors, and what was told."""
    told: list[Progress] = []
    spec = CheckpointSpec.from_folder(folder)
    module = load_module(spec, component, dtype=torch.float32, device="cpu", on_event=told.append)
    return dict(module.state_dict()), told


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


# Shards.


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("index", ["{}.index.bf16.json", "{}.bf16.index.json", "{}.index.json"])
def test_a_variant_named_after_the_number_of_a_shard(folder: Path, component: Component, index: str) -> None:
    plain, _ = loaded(folder, component)
    file = folder / component / WEIGHTS[component]
    tensors = load_file(file)
    file.unlink()
    base, names = file.name.removesuffix(".safetensors"), sorted(tensors)
    of: dict[str, str] = {}
    for number, some in enumerate((names[::2], names[1::2]), 1):
        shard = f"{base}-0000{number}-of-00002.bf16.safetensors"
        save_file({name: tensors[name] for name in some}, file.with_name(shard))
        of |= dict.fromkeys(some, shard)
    file.with_name(index.format(f"{base}.safetensors")).write_text(json.dumps({"weight_map": of}))
    assert same(loaded(folder, component)[0], plain)


def test_every_place_of_a_variant_is_one_candidate() -> None:
    new = ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]
    old = ["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"]
    plain = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for shards in (new, old):
        (one,) = candidates([*shards, "model.safetensors.index.fp16.json"])
        assert (one.variant, list(one.names)) == ("fp16", shards)
    both = candidates([*old, *plain, "model.safetensors.fp16.index.json", "model.safetensors.index.json"])
    assert [(each.variant, list(each.names)) for each in both] == [(None, plain), ("fp16", old)]


def test_shards_without_their_index_are_named(folder: Path) -> None:
    file = folder / "transformer" / WEIGHTS["transformer"]
    file.rename(file.with_name("diffusion_pytorch_model-00001-of-00002.bf16.safetensors"))
    with pytest.raises(CheckpointError, match=r"not the index of its shards, .*\.index\.json; fetch that too"):
        find_weight_files(file.parent)


# Tied tensors.


def test_tied_tensors_are_found_under_the_other_name(folder: Path) -> None:
    plain, _ = loaded(folder, "text_encoder")
    whole = Gemma2ForCausalLM(Gemma2Config.from_pretrained(folder / "text_encoder"))
    whole.model.load_state_dict(plain)
    file = folder / "text_encoder" / WEIGHTS["text_encoder"]
    save_model(whole, str(file))
    assert "lm_head.weight" in load_file(file)
    assert "model.embed_tokens.weight" not in load_file(file)

    ours, told = loaded(folder, "text_encoder")
    assert same(ours, plain)
    assert not told
    rows = load_rows(CheckpointSpec.from_folder(folder), "text_encoder", "embed_tokens.weight", torch.tensor([3, 7]))
    assert rows.equal(plain["embed_tokens.weight"][[3, 7]])

    save_file(load_file(file), file)  # without metadata, as some tools write it
    assert same(loaded(folder, "text_encoder")[0], plain)


@pytest.mark.parametrize("component", WEIGHTS)
def test_any_tensor_may_be_stored_under_another_name(folder: Path, component: Component) -> None:
    file = folder / component / WEIGHTS[component]
    tensors = load_file(file)
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in tensors.items():
        by_shape.setdefault(tuple(tensor.shape), []).append(name)
    kept, other = next(names for names in by_shape.values() if len(names) > 1)[:2]
    tensors[other] = tensors[kept].clone()
    save_file(tensors, file)
    plain, _ = loaded(folder, component)
    del tensors[other]
    save_file(tensors, file, metadata={other: kept, "format": "pt"})
    assert same(loaded(folder, component)[0], plain)
    save_file(tensors, file, metadata={other: "nowhere"})
    with pytest.raises(CheckpointError, match="is missing"):
        loaded(folder, component)


# More than is read.


@pytest.mark.parametrize(
    "name",
    ["loss.input_scale", "lora_step", "x.g_idx", "logvar.absmax", "head.SCB", "ema_model.lora.up"],
)
def test_names_of_quantised_weights_beside_no_layer_are_left_out_too(folder: Path, name: str) -> None:
    plain, _ = loaded(folder, "transformer")
    file = folder / "transformer" / WEIGHTS["transformer"]
    save_file({**load_file(file), name: torch.zeros(3)}, file)
    found, told = loaded(folder, "transformer")
    assert same(found, plain)
    assert name in told[0].detail


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_large_tensors_of_other_types_do_not_choose_the_precision(folder: Path, dtype: torch.dtype) -> None:
    before = CheckpointSpec.from_folder(folder).dtype_of("transformer")
    file = folder / "transformer" / WEIGHTS["transformer"]
    save_file({**load_file(file), "ema.shadow": torch.zeros(10**6, dtype=dtype)}, file)
    assert CheckpointSpec.from_folder(folder).dtype_of("transformer") == before


@pytest.mark.parametrize("component", WEIGHTS)
def test_tensors_that_no_network_reads_are_left_out_and_told(folder: Path, component: Component) -> None:
    plain, _ = loaded(folder, component)
    file = folder / component / WEIGHTS[component]
    more = {"logvar_linear.weight": torch.ones(1, 4), "logvar_linear.bias": torch.ones(1), "step": torch.tensor(7)}
    save_file({**load_file(file), **more}, file)
    ours, (event,) = loaded(folder, component)
    assert same(ours, plain)
    assert event.stage == "notice"
    assert "logvar_linear" in event.detail or "step" in event.detail
    assert "and 2 more" in event.detail


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["blocks.0.to_q.lora_A.weight", "blocks.0.to_q.lora_B.weight"], "LoRA adapter that is not fused"),
        (["proj_out.weight.absmax", "proj_out.weight.quant_map"], "bitsandbytes, 4 bits"),
        (["proj_out.scale_weight"], "fp8 with scales"),
    ],
)
def test_tensors_that_would_change_the_picture_are_refused(folder: Path, names: list[str], says: str) -> None:
    file = folder / "transformer" / WEIGHTS["transformer"]
    save_file({**load_file(file), **{name: torch.ones(2) for name in names}}, file)
    with pytest.raises(CheckpointError, match=says):
        loaded(folder, "transformer")


# Tokenizers.

PROMPTS = ("a fox in the snow", "", "Ünïcode, 雪 and \U0001f600", "x " * 200)


def tokens(folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(CheckpointSpec.from_folder(folder))
    assert tokenizer.padding_side == "right"
    return [
        tokenizer([prompt], padding="max_length", max_length=64, truncation=True)["input_ids"][0] for prompt in PROMPTS
    ] + [tokenizer.encode(prompt) for prompt in PROMPTS]


def names_class(folder: Path, name: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "tokenizer": ["transformers", name]}))


@pytest.mark.parametrize("kept", [("tokenizer.json",), ("tokenizer.json", "tokenizer_config.json")])
def test_a_tokenizer_of_one_file_gives_the_same_tokens(folder: Path, kept: tuple[str, ...]) -> None:
    expected = tokens(folder)
    for file in (folder / "tokenizer").iterdir():
        if file.name not in kept:
            file.unlink()
    assert tokens(folder) == expected
    if len(kept) == 2:  # settings that name no class
        file = folder / "tokenizer" / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        del settings["tokenizer_class"]
        file.write_text(json.dumps(settings))
        assert tokens(folder) == expected


def test_the_built_in_tokenizer_of_one_file_gives_the_same_tokens(tmp_path: Path) -> None:
    from handscroll.models.registry import BY_NAME

    builtin = BY_NAME["tiny-landscape"].builtin_folder
    assert builtin is not None
    folder = Path(shutil.copytree(builtin, tmp_path / "tiny"))
    expected = tokens(folder)
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    assert tokens(folder) == expected


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_the_class_that_the_index_names_is_made(folder: Path, name: str) -> None:
    expected = tokens(folder)
    names_class(folder, name)
    assert tokens(folder) == expected


def test_gemmas_own_class_is_made(folder: Path) -> None:
    for name in ("GemmaTokenizerFast", "GemmaTokenizer"):
        names_class(folder, name)
        assert type(load_tokenizer(CheckpointSpec.from_folder(folder))).__name__ == "GemmaTokenizer"


@pytest.mark.parametrize("name", ["NoSuchTokenizer", "os.system", "Gemma2Model", ""])
def test_a_class_that_is_no_tokenizer_is_refused(folder: Path, name: str) -> None:
    names_class(folder, name)
    with pytest.raises(CheckpointError, match=r"model_index\.json: .*tokenizer"):
        load_tokenizer(CheckpointSpec.from_folder(folder))


@pytest.mark.parametrize("text", ["{}", "not json", '{"version": "1.0"}', "", "[" * 10_000])
def test_a_broken_tokenizer_is_named_in_one_line(folder: Path, text: str) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="tokenizer") as caught:
        load_tokenizer(CheckpointSpec.from_folder(folder))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_model_alone_says_what_it_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(b"\x0a\x0b\x0a\x05<pad>\x15\x00\x00\x00\x00\x18\x03")
    find = importlib.util.find_spec
    lacking = ("sentencepiece", "google.protobuf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in lacking else find(name))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: .*`pip install sentencepiece protobuf`"):
        load_tokenizer(CheckpointSpec.from_folder(folder))


def test_a_tokenizer_without_padding_takes_the_text_encoders(folder: Path) -> None:
    expected = tokens(folder)
    file = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    assert tokens(folder) == expected
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token_id": None}))
    with pytest.raises(CheckpointError, match="names no token for padding"):
        load_tokenizer(CheckpointSpec.from_folder(folder))


@pytest.mark.parametrize("settings", [None, {"add_bos_token": True, "pad_token": "<pad>"}])
@pytest.mark.parametrize("name", ["GemmaTokenizerFast", "GemmaTokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_model_alone_gives_sentencepieces_tokens(
    folder: Path, tmp_path: Path, settings: dict[str, object] | None, name: str
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    words = re.findall(r"\w+", "snowy mountains at dusk with a frozen lake a red sun green bamboo in ink of 12 345 6")
    sentences = [" ".join(words[start::step]) for start in range(12) for step in (1, 2, 3, 5)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        hard_vocab_limit=False,
        **{f"{kind}_id": number for number, kind in enumerate(("pad", "eos", "bos", "unk"))},
        **{f"{kind}_piece": f"<{kind}>" for kind in ("pad", "eos", "bos", "unk")},
        user_defined_symbols=["<mask>", "<start_of_turn>"],
        minloglevel=2,
    )
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    shutil.copy(tmp_path / "spm.model", folder / "tokenizer" / "tokenizer.model")
    if settings is not None:
        (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    names_class(folder, name)

    tokenizer = load_tokenizer(CheckpointSpec.from_folder(folder))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    for prompt in (*sentences[:5], "", "a  red   sun 1234", "雪 é", "unseen words & signs"):
        assert tokenizer.encode(prompt) == [2, *theirs.encode(prompt)]
    padded = tokenizer(["a lake"], padding="max_length", max_length=20)["input_ids"][0]
    assert padded[0] == 2
    assert padded[-1] == 0


# Of a tokenizer's own file: parts that the library reads and cannot work with, in Rust's panics and Python's errors.
BROKEN_PARTS = {
    "steps of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a table of nothing": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "replacing nothing": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "a"}},
    "no special tokens": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {},
        }
    },
}


@pytest.mark.parametrize("part", BROKEN_PARTS)
def test_a_tokenizer_that_cannot_work_is_one_line(folder: Path, part: str) -> None:
    table = folder / "tokenizer" / "tokenizer.json"
    table.write_text(json.dumps(json.loads(table.read_text()) | BROKEN_PARTS[part]))
    with pytest.raises(CheckpointError, match=r"^[^\n]*tokenizer[^\n]*$"):
        plan_of(Request("a lake", model=str(folder), width=64, height=64, steps=1, seed=1))


def test_a_prompt_of_any_length_is_read_in_silence(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan_of(Request("ab " * 6000, model=str(folder), width=64, height=64, steps=1, seed=1))
    assert capfd.readouterr().err == ""
