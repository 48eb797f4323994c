"""A prompt becomes embeddings, by the rules of Sana's pipeline in diffusers (SanaPipeline.encode_prompt)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from handscroll.errors import NumericsError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.runtime.modules import load_rows, open_module
from handscroll.runtime.text_cache import Text, load_text, save_text, text_key
from handscroll.weights.stream import WeightStream

EMBEDDING_TABLE = "embed_tokens.weight"


def instruction_of(spec: CheckpointSpec) -> str:
    """The 'complex human instruction' that goes before a positive prompt, or an empty string.

    The text is the checkpoint's own, or the default that diffusers' pipeline carries.
    """
    if not spec.instruction:
        return ""
    lines: Any = spec.instruction_lines
    if lines is None:
        from diffusers.pipelines.sana.pipeline_sana import SanaPipeline

        lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)


def open_text_encoder(
    spec: CheckpointSpec, *, dtype: torch.dtype, device: torch.device | str
) -> tuple[nn.Module, WeightStream]:
    """A `Gemma2Model` that runs in the memory of one decoder layer, and the stream to close when it is done with.

    Its own `forward` is what runs: each layer is lent its weights just before it is called and gives them back right
    after, while the next layer's are read ahead. The embedding table stays in the file, so the model takes
    `inputs_embeds`, as `encode_prompt` gives them. Values are those of the loaded model, bit for bit.

    Memory: a layer's weights in `dtype` (78 M of them for gemma-2-2b; twice that on a CUDA device), and 16 MiB where
    dtypes are converted. Raises CheckpointError as `load_module` does, and when a layer cannot be read.
    """
    encoder: Any
    encoder, stream = open_module(spec, "text_encoder", dtype=dtype, device=device, leave={EMBEDDING_TABLE})
    stream.keep(encoder, but=[encoder.layers])
    _lend_in_turn(stream, list(encoder.layers))
    return encoder, stream


def _lend_in_turn(stream: WeightStream, layers: list[nn.Module]) -> None:
    for index, layer in enumerate(layers):
        lent = ExitStack()
        following = layers[index + 1 : index + 2]

        def before(layer: nn.Module, _: Any, lent: ExitStack = lent, following: list[nn.Module] = following) -> None:
            lent.enter_context(stream.lend(layer))
            stream.prefetch(*following)

        def after(_: nn.Module, __: Any, ___: Any, lent: ExitStack = lent) -> None:
            lent.close()

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after, always_call=True)


def encoded(
    spec: CheckpointSpec,
    prompt: str,
    instruction: str,
    dtype: torch.dtype,
    open_encoder: Callable[[], tuple[nn.Module, Any]],
    *,
    device: torch.device | str = "cpu",
) -> Text:
    """`encode_prompt` with a memory: a prompt that was encoded before is read from the cache, to the same bits.

    open_encoder: gives the text encoder in `dtype` on `device`, and the tokenizer; called only where the cache does
    not know. Raises what it raises, and NumericsError for embeddings that are not finite.
    """
    device = torch.device(device)
    key = text_key(spec, normalised(prompt), instruction, dtype, device)
    text = load_text(key)
    if text is None:
        encoder, tokenizer = open_encoder()
        text = encode_prompt(spec, encoder, tokenizer, prompt, instruction)
        if not torch.isfinite(text.embeddings).all():
            raise NumericsError("the text encoder gave numbers that are not finite", "text_encoder")
        save_text(key, text)
    return text.to(device)


def normalised(prompt: str) -> str:
    """A prompt as the tokenizer gets it."""
    return prompt.lower().strip()


def count_tokens(spec: CheckpointSpec, tokenizer: Any, prompt: str, instruction: str = "") -> int:
    """How many tokens `encode_prompt` gives the encoder to read."""
    _, mask = _tokens(spec, tokenizer, prompt, instruction)
    return int(mask.sum()) or mask.numel()


def _tokens(spec: CheckpointSpec, tokenizer: Any, prompt: str, instruction: str) -> tuple[Tensor, Tensor]:
    """Token ids and the mask of those that are no padding, both [1, length]."""
    length = spec.max_prompt_tokens
    if instruction:
        length += len(tokenizer.encode(instruction)) - 2
    text = instruction + normalised(prompt)
    tokens = tokenizer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask.bool()


def encode_prompt(spec: CheckpointSpec, encoder: nn.Module, tokenizer: Any, prompt: str, instruction: str = "") -> Text:
    """Runs the text encoder over `instruction` + `prompt` as `SanaPipeline` does, without its padding.

    The pipeline pads to instruction tokens + max - 2, runs, then keeps the first token and the last max - 1. The
    encoder is causal and padding comes last, so real tokens never see it; cross-attention masks it out. Both are
    left out here, which changes no value. (A tokenizer that gives an empty prompt no token at all is the exception:
    then every position is padding, attention is spread over all of them, and so they are kept.)

    encoder: `Gemma2Model` whose embedding table may have been left on the meta device; rows come from the file then.
    """
    ids, mask = _tokens(spec, tokenizer, prompt, instruction)
    length, real = mask.shape[1], int(mask.sum())
    if real:
        ids = ids[:, :real]
    hidden = _run(spec, encoder, ids, None if real else mask)
    keep = torch.tensor([0, *range(max(1, length - spec.max_prompt_tokens + 1), length)])
    if real:
        return Text(hidden[:, keep[keep < real].to(hidden.device)])
    return Text(hidden[:, keep.to(hidden.device)], mask[:, keep].to(hidden.device))


def _run(spec: CheckpointSpec, encoder: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """[1, T] token ids -> [1, T, C] hidden states, reading of the embedding table only the rows that are needed."""
    final_norm = encoder.norm.weight
    table = encoder.embed_tokens
    if table.weight.is_meta:
        rows = load_rows(spec, "text_encoder", EMBEDDING_TABLE, ids)
        rows = rows.to(final_norm.device, final_norm.dtype) * table.embed_scale.to(final_norm.device, final_norm.dtype)
        inputs = {"inputs_embeds": rows}
    else:
        inputs = {"input_ids": ids.to(final_norm.device)}
    mask = None if mask is None else mask.to(final_norm.device)
    return encoder(**inputs, attention_mask=mask, use_cache=False).last_hidden_state
