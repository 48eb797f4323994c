"""An AutoencoderDC's decoder and encoder as lists of units: local steps, and attentions at which sweeps end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from handscroll.banded import backend
from handscroll.banded.autoencoder.attention import AttentionSums, Sums, apply_attention, reach_of, whole_attention
from handscroll.banded.autoencoder.blocks import (
    conv_with_mean,
    conv_with_repeat,
    down_block,
    glu_mb_conv,
    res_block,
    up_block,
)
from handscroll.banded.layers import Pass
from handscroll.banded.modules import (
    DCDownBlock2d,
    DCUpBlock2d,
    Decoder,
    Encoder,
    SanaMultiscaleLinearAttention,
    is_down_block,
    is_efficient_vit_block,
    is_res_block,
    is_up_block,
)
from handscroll.banded.rows import Pointwise, RowOp

# What diffusers and accelerate set on a module whose weights they move: its `forward`, and what that one calls.
_HOOKS = frozenset({"forward", "_diffusers_hook", "_hf_hook", "_old_forward"})


class Unit(ABC):
    """One step of the network, made of a diffusers `module`, whose weights are real while it is built.

    `in_scale` is the size of its input map over the size of the network's input, `factor` what it multiplies that by,
    `channels` the most channels it holds for a pixel of its output (the estimate behind default row block heights).
    `reach`: an output row depends on so many input rows above and below its own (on two own ones where it halves).
    """

    module: Any
    in_scale: float
    factor: float = 1.0
    channels: int
    reach: int

    @abstractmethod
    def build(self, this: Pass) -> RowOp:
        """The row operator for one pass; weights are laid out anew, so that they are freed with it."""


@dataclass(frozen=True)
class Local(Unit):
    """A step whose output rows depend on a few input rows."""

    module: Any
    make: Callable[[Pass], RowOp]
    in_scale: float
    channels: int
    factor: float = 1.0
    reach: int = 1

    def build(self, this: Pass) -> RowOp:
        return self.make(this)


@dataclass(frozen=True)
class Attention(Unit):
    """A barrier: linear attention over the whole map. `reach` is that of its rows once the sums are known."""

    module: SanaMultiscaleLinearAttention
    in_scale: float
    channels: int
    factor: float = 1.0

    def is_linear(self, pixels: int) -> bool:
        """diffusers attends quadratically on maps of at most head_dim pixels; `pixels` are the network input's."""
        return round(pixels * self.in_scale**2) > self.module.attention_head_dim

    @property
    def reach(self) -> int:  # type: ignore[override]
        return reach_of(self.module)

    def build(self, this: Pass) -> RowOp:
        return whole_attention(_bare_copy(self.module) if this.copies else self.module)

    def sum(self, this: Pass, given: range | None = None, own: range | None = None) -> AttentionSums:
        return AttentionSums(self.module, this, given, own)

    def apply(self, sums: Sums, this: Pass) -> RowOp:
        return apply_attention(self.module, sums, this)


def _bare_copy(module: Any) -> Any:
    """A module with weights of its own and its class's `forward`: hooks that move weights stay with the original."""
    copied = object.__new__(type(module))
    copied.__dict__.update({name: value for name, value in vars(module).items() if name not in _HOOKS})
    for name in ("_parameters", "_buffers"):
        values = vars(module)[name].items()
        vars(copied)[name] = {key: None if value is None else _own(value) for key, value in values}
    vars(copied)["_modules"] = {
        name: None if child is None else _bare_copy(child) for name, child in module._modules.items()
    }
    return copied


def _own(value: Tensor) -> Tensor:
    copied = value.detach().clone()
    return nn.Parameter(copied, requires_grad=False) if isinstance(value, nn.Parameter) else copied


def _block_units(block: nn.Module, scale: float) -> Iterator[Unit]:
    if is_efficient_vit_block(block):
        attention, feed_forward = block.attn, block.conv_out
        inner_channels = 3 * attention.to_q.out_features * (1 + len(attention.to_qkv_multiscale))
        yield Attention(attention, scale, inner_channels)
        hidden_channels = feed_forward.conv_inverted.out_channels
        yield Local(feed_forward, lambda this: glu_mb_conv(feed_forward, this), scale, hidden_channels)
    elif is_res_block(block):
        yield Local(block, lambda this: res_block(block, this), scale, block.conv1.out_channels, reach=2)
    else:
        raise TypeError(f"rows cannot be streamed through a {type(block)}")


def _conv(conv: nn.Conv2d, scale: float, channels: int) -> Unit:
    return Local(conv, lambda this: this.windowed(this.conv(conv), 3), scale, channels)


def _up(block: DCUpBlock2d, scale: float) -> Unit:
    return Local(block, lambda this: up_block(block, this), scale, block.conv.out_channels, 2.0)


def _down(block: DCDownBlock2d, scale: float) -> Unit:
    return Local(block, lambda this: down_block(block, this), scale, 4 * block.conv.in_channels, 0.5)


def decoder_units(decoder: Decoder) -> list[Unit]:
    """The decoder of an `AutoencoderDC` from latent to pixels, in the order it runs.

    Raises TypeError for a block that is not known.
    """
    repeats = decoder.in_shortcut_repeats if decoder.in_shortcut else 0
    first, final = decoder.conv_in, decoder.conv_out
    assert final is not None
    units: list[Unit] = [Local(first, lambda this: conv_with_repeat(first, repeats, this), 1.0, first.out_channels)]
    scale = 1.0
    for stage in reversed(decoder.up_blocks):
        for block in stage.children():
            if is_up_block(block):
                units.append(_up(block, scale))
                scale *= 2
            else:
                units += _block_units(block, scale)
    norm_out, activation_ = decoder.norm_out, backend.activated(decoder.conv_act)

    def norm_and_activation(this: Pass) -> RowOp:
        norm_ = this.norm_(norm_out)
        return Pointwise(lambda row_block: activation_(norm_(row_block)))

    units.append(Local(norm_out, norm_and_activation, scale, norm_out.dim[0], reach=0))
    units.append(_up(final, scale) if is_up_block(final) else _conv(final, scale, final.in_channels))
    return units


def encoder_units(encoder: Encoder) -> list[Unit]:
    """The encoder of an `AutoencoderDC` from pixels to latent, in the order it runs.

    Raises TypeError for a block that is not known.
    """
    first, final = encoder.conv_in, encoder.conv_out
    scale = 1.0
    units: list[Unit] = []
    if is_down_block(first):
        units.append(_down(first, scale))
        scale /= 2
    else:
        units.append(_conv(first, scale, first.out_channels))
    for stage in encoder.down_blocks:
        for block in stage.children():
            if is_down_block(block):
                units.append(_down(block, scale))
                scale /= 2
            else:
                units += _block_units(block, scale)
    group_size = encoder.out_shortcut_average_group_size if encoder.out_shortcut else 0
    units.append(Local(final, lambda this: conv_with_mean(final, group_size, this), scale, final.in_channels))
    return units
