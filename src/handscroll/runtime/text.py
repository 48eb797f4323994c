"""A prompt becomes embeddings, by the rules of Sana's pipeline in diffusers (SanaPipeline.encode_prompt)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from handscroll.errors import NumericsError
from handscroll.events import OnEvent, Progress
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.inputs import TextRead
from handscroll.plan.plan import Plan
from handscroll.plan.stages import TEXT
from handscroll.request import Request
from handscroll.runtime.modules import load_rows, load_tokenizer
from handscroll.runtime.session import Session
from handscroll.runtime.text_cache import Text, load_text, save_text, text_key
from handscroll.runtime.text_encoder import EMBEDDING_TABLE
from handscroll.runtime.tokenizer import errors_named
from handscroll.units import one_line
from handscroll.weights.dtypes import DTYPES

LAST_TOKENS_SHOWN = 8  # of a prompt that is cut


@dataclass(frozen=True)
class Texts:
    """What a picture is denoised by: the prompt, and the negative prompt where guidance needs one."""

    prompt: Text
    negative: Text | None = None


def encode_prompts(session: Session, plan: Plan, request: Request, on_event: OnEvent) -> Texts:
    """The prompt's embeddings, and the negative prompt's where guidance needs them.

    The text encoder is opened only for what the cache of embeddings does not know.
    """
    spec, dtype = session.spec, DTYPES[plan.precision.text_encoder]
    storage = plan.precision.text_encoder_storage

    @cache
    def opened() -> tuple[Any, Any]:
        return session.open_text_encoder(plan), load_tokenizer(spec)

    def text_of(prompt: str, instruction: str) -> Text:
        return encoded(spec, prompt, instruction, dtype, opened, device=plan.device, storage=storage)

    on_event(Progress(TEXT.name, 0, 1))
    prompt = text_of(request.prompt, instruction_of(spec))
    negative = text_of(request.negative, "") if plan.guided and not spec.is_sprint else None
    on_event(Progress(TEXT.name, 1, 1))
    return Texts(prompt, negative)


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


def encoded(
    spec: CheckpointSpec,
    prompt: str,
    instruction: str,
    dtype: torch.dtype,
    open_encoder: Callable[[], tuple[nn.Module, Any]],
    *,
    device: torch.device | str = "cpu",
    storage: str = "",
) -> Text:
    """`encode_prompt` with a memory: a prompt that was encoded before is read from the cache, to the same bits.

    open_encoder: gives the text encoder in `dtype` on `device`, and the tokenizer; called only where the cache does
    not know. Raises what it raises, and NumericsError for embeddings that are not finite.
    """
    device = torch.device(device)
    key = text_key(spec, normalised(prompt), instruction, dtype, device, storage)
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


def read_of(spec: CheckpointSpec, tokenizer: Any, prompt: str, instruction: str = "") -> TextRead:
    """How much of a prompt is read: `encode_prompt` cuts what is longer than the checkpoint's `max_prompt_tokens`.

    Tokens are the prompt's own. The instruction's are always read, and so are the special ones that every text gets.
    """
    with errors_named(spec):
        before = len(tokenizer.encode(instruction))
        whole = len(tokenizer([instruction + normalised(prompt)]).input_ids[0])
        length = _length(spec, tokenizer, instruction)
        own = max(0, whole - before)
        if whole <= length:
            return TextRead(own, own)
        ids, _ = _tokens(spec, tokenizer, prompt, instruction)
        read = min(own, max(0, length - before))
        ends = tokenizer.decode(ids[0, -min(read, LAST_TOKENS_SHOWN) :], skip_special_tokens=True) if read else ""
    return TextRead(own, read, one_line(ends.replace("\ufffd", "")))


def most_tokens(spec: CheckpointSpec, prompt: str, instruction: str = "") -> int:
    """As many tokens as `encode_prompt` can give the encoder to read, for who has no tokenizer: one a byte, and two."""
    before = len(instruction.encode()) + 2
    return before + min(len(normalised(prompt).encode()), spec.max_prompt_tokens)


def _length(spec: CheckpointSpec, tokenizer: Any, instruction: str) -> int:
    """To how many tokens a text is cut."""
    return spec.max_prompt_tokens + (len(tokenizer.encode(instruction)) - 2 if instruction else 0)


def _tokens(spec: CheckpointSpec, tokenizer: Any, prompt: str, instruction: str) -> tuple[Tensor, Tensor]:
    """Token ids and the mask of those that are no padding, both [1, length]."""
    text = instruction + normalised(prompt)
    with errors_named(spec):
        length = _length(spec, tokenizer, instruction)
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
