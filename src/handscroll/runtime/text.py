"""A prompt becomes embeddings, by the rules of Sana's pipeline in diffusers (SanaPipeline.encode_prompt)."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from handscroll.runtime.checkpoint import map_tensor
from handscroll.spec import CheckpointSpec

EMBEDDING_TABLE = "embed_tokens.weight"


@dataclass(frozen=True)
class Text:
    """Embeddings [1, T, C] of the tokens that count, and a mask [1, T] that is None where all of them do."""

    embeddings: Tensor
    mask: Tensor | None = None


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


def encode_prompt(spec: CheckpointSpec, encoder: nn.Module, tokenizer: Any, prompt: str, instruction: str = "") -> Text:
    """Runs the text encoder over `instruction` + `prompt` as `SanaPipeline` does, without its padding.

    The pipeline pads to instruction tokens + max - 2, runs, then keeps the first token and the last max - 1. The
    encoder is causal and padding comes last, so real tokens never see it; cross-attention masks it out. Both are
    left out here, which changes no value. (A tokenizer that gives an empty prompt no token at all is the exception:
    then every position is padding, attention is spread over all of them, and so they are kept.)

    encoder: `Gemma2Model` whose embedding table may have been left on the meta device; rows come from the file then.
    """
    text = instruction + prompt.lower().strip()
    length = spec.max_prompt_tokens
    if instruction:
        length += len(tokenizer.encode(instruction)) - 2
    tokens = tokenizer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids, mask = tokens.input_ids, tokens.attention_mask.bool()
    real = int(mask.sum())
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
        rows = map_tensor(spec, "text_encoder", EMBEDDING_TABLE)[ids]
        rows = rows.to(final_norm.device, final_norm.dtype) * table.embed_scale.to(final_norm.device, final_norm.dtype)
        inputs = {"inputs_embeds": rows}
    else:
        inputs = {"input_ids": ids.to(final_norm.device)}
    mask = None if mask is None else mask.to(final_norm.device)
    return encoder(**inputs, attention_mask=mask, use_cache=False).last_hidden_state
