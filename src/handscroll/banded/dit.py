"""SanaTransformer2DModel in bands of rows.

Everything in a Sana transformer is local but for its ReLU linear attentions, whose sums are small. So of a whole map
only the residual stream exists, `[B, h, w, width]`, and each layer passes over it twice, a band of rows at a time:

    pass A   norm, keys, values -> sums of the attention; the map is read and kept
    pass B   norm, queries -> sums applied -> + x -> attention to the text -> + x -> Mix-FFN -> + x; the map is read and
             freed, the next one written

Several branches (with the prompt and without) pass through a layer one after another, so that its weights are needed
once a step. The Mix-FFN's hidden channels, five times the width, are made a slab of channels at a time: each slab has
line buffers of its own for its depthwise convolution, and only the gated half of them exists for a whole band.

On the CPU predictions are the same to the bit at every band height: linear layers and convolutions are (oneDNN and MKL
see to it, but for a linear layer of a single pixel, which is given twice), and whatever else might not be runs row by
row. The modules are diffusers' own; this file reads their weights. Linear layers of other makes (LoRA, quantised) are
called as the modules that they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from torch import Tensor, nn

from handscroll.banded import backend, triton
from handscroll.banded.backend import Conv, LinearAttentionSums
from handscroll.banded.rows import Pointwise, Residual, RowMap, RowOp, Stage, Strip, Windowed, Workspace, sweep

# Without a plan, a band is as tall as makes the Mix-FFN's hidden channels about this big. On a CPU taller is not
# faster; on a device every band costs its launches.
DEFAULT_BAND_BYTES, DEFAULT_DEVICE_BAND_BYTES = 32 * 2**20, 256 * 2**20
# Hidden channels that the Mix-FFN makes at a time, values and gates each: few enough to stay small beside the band,
# enough for full speed. Slabs are multiples of what a vector register holds, so that no element is an odd one out.
SLAB_CHANNELS = 1120
SLAB_MULTIPLE = 32

# Lends the i-th SanaTransformerBlock with its parameters in memory, for as long as the context is entered.
LendLayer = Callable[[int], AbstractContextManager[Any]]
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Branch:
    """What one forward of the transformer is given, all on its device.

    latent: [B, C, H, W] in the dtype of its weights, H and W multiples of the patch size. text: [B, T, caption
    channels]. mask: [B, T], 1 for tokens that count, or None for all. timestep: [B]. guidance: [B], for a transformer
    with `guidance_embeds`, else None.
    """

    latent: Tensor
    text: Tensor
    mask: Tensor | None
    timestep: Tensor
    guidance: Tensor | None = None


@torch.no_grad()
def predict(
    transformer: Any,
    branches: Sequence[Branch],
    *,
    layer: LendLayer | None = None,
    band_rows: int | None = None,
    new_map: Callable[[int], RowMap] | None = None,
    lay_out: bool = False,
    plain: bool = False,
) -> list[Tensor]:
    """What `SanaTransformer2DModel` gives for each branch, [B, C', H, W] in the dtype of its latent.

    transformer: diffusers' module in eval mode. All but `transformer_blocks` must be in memory, and of that all but
    `patch_embed.pos_embed`, which is computed band by band. layer: called once for each layer, from the first to the
    last; lends that layer's block. None stands for the transformer's own. band_rows: rows of the token map at a time;
    None lets the size decide. new_map: makes the map, given its height, that holds a branch's residual stream.
    lay_out: each layer's matrices are reordered for the CPU's kernels, once for all branches, which takes a layer's
    memory again and saves a twentieth of the time; it changes no bit. plain: by `torch.nn.functional` alone, but for
    norms and sums where Triton is asked for (triton.in_use).

    Raises TypeError for a module that cannot be run in bands, ValueError for a latent that does not fit.
    """
    if band_rows is not None and band_rows < 1:
        raise ValueError(f"bands of {band_rows} rows end nowhere")
    lend = layer or (lambda index: nullcontext(transformer.transformer_blocks[index]))
    make_map = new_map or RowMap
    workspace = Workspace()
    runs = [_Run.of(transformer, branch, band_rows) for branch in branches]
    try:
        for run, branch in zip(runs, branches, strict=True):
            run.refill(make_map, _embedded(transformer.patch_embed, branch.latent, run.band_rows, _Layers(plain)))
        for index in range(len(transformer.transformer_blocks)):
            with lend(index) as block:
                this = _Layers(plain, lay_out, workspace)
                for run in runs:
                    run.refill(make_map, _through_layer(block, run, this))
                del this
            del block
        workspace.memory = None
        return [_projected(transformer, run, _Layers(plain)) for run in runs]
    finally:
        for run in runs:
            run.map.close()


@dataclass
class _Run:
    """A branch on its way: its residual stream, and what every layer needs to know of it.

    text [B, T, width] projected; bias [B, 1, 1, T] or None, added to attention's scores; modulation [B, 6 * width] and
    embedded [B, width] of the timestep.
    """

    rows: int
    columns: int
    band_rows: int
    text: Tensor
    bias: Tensor | None
    modulation: Tensor
    embedded: Tensor
    map: RowMap = field(default_factory=lambda: RowMap(0))

    @staticmethod
    def of(transformer: Any, branch: Branch, band_rows: int | None) -> _Run:
        embed, latent = transformer.patch_embed, branch.latent
        patch, weight = embed.patch_size, embed.proj.weight
        expected = (weight.shape[1], weight.dtype, weight.device)
        given = (latent.shape[1], latent.dtype, latent.device)
        if given != expected or not latent.numel():
            raise ValueError(f"expected channels, type and device {expected}, not {given} of {tuple(latent.shape)}")
        if latent.shape[-2] % patch or latent.shape[-1] % patch:
            raise ValueError(f"a latent of {tuple(latent.shape)} cannot be cut into patches of {patch}x{patch}")
        batch, rows, columns = latent.shape[0], latent.shape[-2] // patch, latent.shape[-1] // patch
        if branch.guidance is None:
            modulation, embedded = transformer.time_embed(branch.timestep, batch_size=batch, hidden_dtype=latent.dtype)
        else:
            modulation, embedded = transformer.time_embed(
                branch.timestep, guidance=branch.guidance, hidden_dtype=latent.dtype
            )
        text = transformer.caption_norm(transformer.caption_projection(branch.text))
        bias = None
        if branch.mask is not None and not branch.mask.all():
            bias = (1 - branch.mask.to(latent.dtype))[:, None, None] * -10000.0
        if band_rows is None:
            config = transformer.config
            width = config.num_attention_heads * config.attention_head_dim
            row_bytes = batch * columns * 2 * int(config.mlp_ratio * width) * latent.element_size()
            band_bytes = DEFAULT_BAND_BYTES if latent.device.type == "cpu" else DEFAULT_DEVICE_BAND_BYTES
            band_rows = max(1, band_bytes // row_bytes)
        return _Run(rows, columns, min(band_rows, rows), text, bias, modulation, embedded)

    def refill(self, new_map: Callable[[int], RowMap], bands: Iterable[Tensor]) -> None:
        """Writes the next map; `bands` read the last one."""
        written = new_map(self.rows)
        try:
            for band in bands:
                written.write(band)
                del band
        except BaseException:
            written.close()
            raise
        self.map.close()
        self.map = written


# ---------------------------------------------------------------------------------------------------------------------
# Before the first layer and after the last


def _embedded(embed: Any, latent: Tensor, band_rows: int, this: _Layers) -> Iterator[Tensor]:
    """`PatchEmbed` in bands: latent [B, C, H, W] -> tokens [B, rows, w, width]."""
    if embed.pos_embed_max_size is not None or embed.layer_norm:
        raise TypeError("a patch embedding with a norm or with cropped positions cannot be run in bands")
    batch, channels, height, width = latent.shape
    patch, proj = embed.patch_size, embed.proj
    rows, columns = height // patch, width // patch
    as_linear = type(proj) is nn.Conv2d and proj.weight.shape[2:] == (patch, patch) and not any(proj.padding)
    project = this.dense(proj.weight.flatten(1), proj.bias) if as_linear else None
    positions = None
    if embed.pos_embed is not None:
        positions = [_sincos(embed, count, latent.device) for count in (columns, rows)]  # [count, width / 2] fp32
    for top in range(0, rows, band_rows):
        band = latent[:, :, top * patch : (top + band_rows) * patch]
        if project is None:
            tokens = proj(band).permute(0, 2, 3, 1).contiguous()
        else:
            patches = band.reshape(batch, channels, -1, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
            tokens = project(patches.reshape(batch, -1, columns, channels * patch * patch))
        if positions is not None:
            of_columns, of_rows = positions
            half = of_columns.shape[-1]
            tokens[..., :half] += of_columns
            tokens[..., half:] += of_rows[top : top + band_rows, None]
        yield tokens


def _sincos(embed: Any, count: int, device: torch.device) -> Tensor:
    """Half of diffusers' position embedding: of a map `count` rows tall, or wide. [count, width / 2] fp32."""
    # The same steps as in get_2d_sincos_pos_embed, for the same roundings; there, for every position of the map.
    grid = torch.arange(count, device=device, dtype=torch.float32)
    grid = grid / (count / embed.base_size) / embed.interpolation_scale
    return get_1d_sincos_pos_embed_from_grid(embed.proj.out_channels // 2, grid, output_type="pt").float()


def _projected(transformer: Any, run: _Run, this: _Layers) -> Tensor:
    """The last norm and projection, and patches put together: the run's map -> [B, C', H, W]."""
    norm, project = transformer.norm_out.norm, this.linear(transformer.proj_out)
    patch = transformer.config.patch_size
    shift, scale = (transformer.scale_shift_table[None] + run.embedded[:, None]).chunk(2, dim=1)
    shift, scale = shift[:, None], 1 + scale[:, None]
    out: Tensor | None = None
    top = 0
    for band in run.map.strips(run.band_rows):
        patches = project(norm(band).mul_(scale).add_(shift))
        del band
        batch, rows, columns, channels = patches.shape
        channels //= patch * patch
        if out is None:
            out = patches.new_empty(batch, channels, run.rows * patch, run.columns * patch)
        patches = patches.view(batch, rows, columns, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
        target = out[:, :, top * patch : (top + rows) * patch]
        target.view(batch, channels, rows, patch, columns, patch).copy_(patches)
        top += rows
    assert out is not None
    return out


# ---------------------------------------------------------------------------------------------------------------------
# A layer


def _through_layer(block: Any, run: _Run, this: _Layers) -> Iterator[Tensor]:
    """`SanaTransformerBlock` on a run's map, which is freed on the way: the bands of the next map."""
    if not isinstance(block.attn1.processor, SanaLinearAttnProcessor2_0):
        raise TypeError(f"a self-attention by {type(block.attn1.processor)} cannot be run in bands")
    if not isinstance(block.attn2.processor, SanaAttnProcessor2_0):
        raise TypeError(f"a cross-attention by {type(block.attn2.processor)} cannot be run in bands")
    batch = len(run.modulation)
    table = block.scale_shift_table[None] + run.modulation.reshape(batch, 6, -1)
    shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = table[:, :, None, None].unbind(1)
    normed = _modulated(block.norm1, shift_attn, scale_attn)
    sums = _attention_sums(block.attn1, normed, run.map.strips(run.band_rows, keep=True), this)
    attend = _self_attention(block.attn1, normed, sums, gate_attn, this)
    read = _cross_attention(block.attn2, run, this)
    feed = MixFFN(block.ff, _modulated(block.norm2, shift_ff, scale_ff), gate_ff, this)
    stages = [Stage(Pointwise(lambda band: read(attend(band))), run.band_rows), Stage(Residual(feed), run.band_rows)]
    return sweep(run.map.strips(run.band_rows), stages)


def _modulated(norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> Function:
    """Norm, scale and shift of [B, rows, w, width], in memory of its own."""
    if type(norm) is not nn.LayerNorm:
        raise TypeError(f"a layer with the norm {type(norm)} cannot be run in bands")
    scale = 1 + scale
    if norm.elementwise_affine:
        return lambda band: norm(band).mul_(scale).add_(shift)
    return lambda band: backend.layer_norm_modulate(band, shift, scale, norm.eps)


def _attention_sums(attention: Any, normed: Function, bands: Iterable[Tensor], this: _Layers) -> LinearAttentionSums:
    to_k, to_v = this.linear(attention.to_k), this.linear(attention.to_v)
    norm_k_, heads = _norm_(attention.norm_k), attention.heads
    sums = LinearAttentionSums()
    for band in bands:
        band = normed(band)
        keys = norm_k_(to_k(band)).unflatten(-1, (heads, -1))
        sums.add(keys, to_v(band).unflatten(-1, (heads, -1)))
        del keys
    return sums


def _self_attention(
    attention: Any, normed: Function, sums: LinearAttentionSums, gate: Tensor, this: _Layers
) -> Function:
    """Once its sums are known: `x + gate * attention(norm(x))` of [B, rows, w, width]."""
    to_q, to_out = this.linear(attention.to_q), this.linear(attention.to_out[0])
    norm_q_, heads = _norm_(attention.norm_q), attention.heads

    def attend(band: Tensor) -> Tensor:
        mixed = norm_q_(to_q(normed(band)))
        mixed = sums.apply_(mixed.unflatten(-1, (heads, -1))).flatten(-2)
        return backend.gate_add_(to_out(mixed), gate, band)

    return attend


def _cross_attention(attention: Any, run: _Run, this: _Layers) -> Function:
    """`x + attention(x, text)` of [B, rows, w, width]."""
    heads, bias, rescale = attention.heads, run.bias, attention.rescale_output_factor
    keys, values = _norm_(attention.norm_k)(this.once(attention.to_k)(run.text)), this.once(attention.to_v)(run.text)
    # A fused attention may give finite answers to keys that are not: let their infinity or NaN through.
    values += keys.abs().amax() * 0

    if run.text.shape[1] == 1 and bias is None:
        # The softmax of a single score is 1: every position reads the same, whatever it asks. So does the branch of an
        # empty negative prompt, a seventh of whose work this saves.
        answer = this.once(attention.to_out[0])(values[:, None])  # [B, 1, 1, width]
        if rescale != 1:
            answer.div_(rescale)
        return lambda band: answer + band

    to_q, to_out, norm_q_ = this.linear(attention.to_q), this.linear(attention.to_out[0]), _norm_(attention.norm_q)
    # [B, heads, T, head_dim]
    keys, values = (each.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous() for each in (keys, values))

    def read(band: Tensor) -> Tensor:
        queries = norm_q_(to_q(band)).unflatten(-1, (heads, -1))  # [B, rows, w, heads, head_dim]
        for rows in _row_by_row(queries):
            asked = rows.flatten(1, 2).transpose(1, 2)
            answer = F.scaled_dot_product_attention(asked, keys, values, bias)
            rows.copy_(answer.transpose(1, 2).view_as(rows))
        out = to_out(queries.flatten(-2))
        if rescale != 1:
            out.div_(rescale)
        return out.add_(band)

    return read


class MixFFN(RowOp):
    """`gate * GLUMBConv(norm(x))`: 1x1 expand, SiLU, 3x3 depthwise, gate, 1x1 project. Lags one row.

    Of the hidden channels a slab exists at a time: values and the gates that belong to them.
    """

    def __init__(self, feed_forward: Any, normed: Function, gate: Tensor, this: _Layers) -> None:
        expand, depthwise = feed_forward.conv_inverted, feed_forward.conv_depth
        activation = feed_forward.nonlinearity
        if feed_forward.norm is not None or feed_forward.residual_connection or type(activation) is not nn.SiLU:
            raise TypeError("a Mix-FFN with a norm, a shortcut or another activation than SiLU cannot be run in bands")
        if type(depthwise) is not nn.Conv2d or depthwise.kernel_size != (3, 3) or depthwise.groups == 1:
            raise TypeError(f"a Mix-FFN with {type(depthwise)} for its depthwise convolution cannot be run in bands")
        self.normed, self.gate = normed, gate
        self.project = this.linear(feed_forward.conv_point)
        self.hidden = depthwise.out_channels // 2
        sliceable = type(expand) is nn.Conv2d
        in_one = not this.plain and triton.in_use(depthwise.weight)
        self.slabs: list[_Slab] = []
        for first, end in _slabs(self.hidden) if sliceable else [(0, self.hidden)]:
            makes, weights, biases = [], [], []
            for start, stop in ((first, end), (self.hidden + first, self.hidden + end)):
                makes.append(this.linear(expand, activation, (start, stop)) if sliceable else None)
                weights.append(depthwise.weight[start:stop])
                biases.append(None if depthwise.bias is None else depthwise.bias[start:stop])
            if in_one:
                ops = [Windowed(_itself, 3, workspace=each) for each in (this.workspace, this.workspace_of_gates)]
                combine, halo_rows = _convolve_and_gate(weights, biases), 2
            else:
                convs = [Conv(w, b, groups=len(w), plain=this.plain) for w, b in zip(weights, biases, strict=True)]
                ops = [Windowed(convolve, 3, workspace=this.workspace) for convolve in convs]
                combine, halo_rows = _gate, 0
            self.slabs.append(_Slab(first, end, makes[0], ops[0], makes[1], ops[1], combine, halo_rows))
        self.expand_whole = None if sliceable else this.linear(expand, activation)

    def push(self, strip: Strip, last: bool) -> Strip:
        source = None if strip is None else self.normed(strip)
        del strip
        if self.expand_whole is not None and source is not None:
            source = self.expand_whole(source)
        gated: Tensor | None = None
        for slab in self.slabs:
            gates = slab.gates.push(self._made(slab.make_gates, source, self.hidden, slab), last)
            values = slab.values.push(self._made(slab.make_values, source, 0, slab), last)
            if gates is None or values is None:
                continue
            if gated is None:
                rows = values.shape[1] - slab.halo_rows
                gated = values.new_empty(values.shape[0], rows, values.shape[2], self.hidden)
            slab.combine(values, gates, gated[..., slab.first : slab.end])
            del gates, values
        del source
        return None if gated is None else self.project(gated).mul_(self.gate)

    @staticmethod
    def _made(make: Function | None, strip: Strip, offset: int, slab: _Slab) -> Strip:
        if strip is None or make is not None:
            return None if strip is None or make is None else make(strip)
        return strip[..., offset + slab.first : offset + slab.end]


@dataclass(frozen=True)
class _Slab:
    """Hidden channels `first ... end - 1` of the Mix-FFN, and as many gates: how each is made and convolved.

    combine: writes what values and gates are together. It may be given `halo_rows` more than it writes, still to be
    convolved.
    """

    first: int
    end: int
    make_values: Function | None
    values: RowOp
    make_gates: Function | None
    gates: RowOp
    combine: Callable[[Tensor, Tensor, Tensor], None]
    halo_rows: int


def _itself(window: Tensor) -> Tensor:
    """A window as it is, in its workspace: gone when the next slab's is made."""
    return window


def _convolve_and_gate(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Callable[[Tensor, Tensor, Tensor], None]:
    """The depthwise convolution of values and gates, and the gate, in one pass over windows of both."""

    def combine(values: Tensor, gates: Tensor, out: Tensor) -> None:
        triton.depthwise_gate(values, gates, (weights[0], weights[1]), (biases[0], biases[1]), out)

    return combine


def _gate(values: Tensor, gates: Tensor, out: Tensor) -> None:
    """`values * silu(gates)`, into `out`; a row at a time is still in cache when it is multiplied."""
    for value, gate, target in zip(_row_by_row(values), _row_by_row(gates), _row_by_row(out), strict=True):
        torch.mul(value, F.silu(gate), out=target)


def _slabs(hidden: int) -> list[tuple[int, int]]:
    """Cuts so many channels into slabs of nearly equal size."""
    count = -(-hidden // SLAB_CHANNELS)
    size = -(-hidden // (count * SLAB_MULTIPLE)) * SLAB_MULTIPLE
    return [(first, min(first + size, hidden)) for first in range(0, hidden, size)]


def _row_by_row(strip: Tensor) -> Iterator[Tensor]:
    """`[B, rows, w, ...]` as `[B, 1, w, ...]` on a CPU, where the same call on the same shape gives the same bits."""
    return iter(strip.split(1, dim=1) if strip.device.type == "cpu" else (strip,))


# ---------------------------------------------------------------------------------------------------------------------
# Layers on every pixel


class _Layers:
    """Makes what a layer computes with out of its parameters, for all branches that pass through it.

    With `lay_out`, matrices are reordered for oneDNN when they are first asked for, and stay so for as long as this
    lives. Without, they are used as they are.
    """

    def __init__(self, plain: bool, lay_out: bool = False, workspace: Workspace | None = None) -> None:
        self.plain = plain
        self.workspace = Workspace() if workspace is None else workspace
        self.workspace_of_gates = Workspace()  # where windows of values and of gates are needed at a time
        self.laid_out: dict[tuple[Any, ...], Tensor] | None = {} if lay_out and not plain else None

    def linear(
        self, layer: Any, activation: nn.Module | None = None, channels: tuple[int, int] | None = None
    ) -> Function:
        """A linear layer or 1x1 convolution on the last axis, then SiLU if that is asked for.

        channels: only those from the first up to the second.
        """
        if type(layer) in (nn.Linear, nn.Conv2d):
            if any(size != 1 for size in layer.weight.shape[2:]):
                raise TypeError(f"a convolution of {tuple(layer.weight.shape)} is not a linear layer")
            weight, bias = layer.weight.flatten(1), layer.bias
            if channels is not None:
                chosen = slice(*channels)
                weight, bias = weight[chosen], None if bias is None else bias[chosen]
            return self.dense(weight, bias, activation, key=(layer, channels))
        if channels is not None:
            raise TypeError(f"single channels of {type(layer)} are not known")
        has_image = getattr(layer, "kernel_size", None) is not None

        def run(strip: Tensor) -> Tensor:
            out = layer(strip.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous() if has_image else layer(strip)
            return out if activation is None else activation(out)

        return _never_single(run)

    def once(self, layer: Any) -> Function:
        """As `linear`, for so few rows that no matrix is worth reordering."""
        return _Layers(self.plain).linear(layer)

    def dense(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activation: nn.Module | None = None,
        key: tuple[Any, ...] | None = None,
    ) -> Function:
        """A matrix [C', C] on the last axis; `key` says which it is, where it is to be laid out."""
        if self.plain or not backend.has_onednn(weight):
            if activation is None:
                return _never_single(lambda strip: F.linear(strip, weight, bias))
            return _never_single(lambda strip: F.silu(F.linear(strip, weight, bias), inplace=True))
        fused = "none" if activation is None else "swish"
        if self.laid_out is not None and key is not None:
            if key not in self.laid_out:
                self.laid_out[key] = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            weight = self.laid_out[key]
        return _never_single(lambda strip: torch.ops.mkldnn._linear_pointwise(strip, weight, bias, fused, [], ""))


def _never_single(function: Function) -> Function:
    """Gives a single position twice: of one, a product is made by other code, which rounds otherwise."""

    def run(strip: Tensor) -> Tensor:
        if strip.shape[:-1].numel() > 1:
            return function(strip)
        return function(torch.cat([strip, strip], dim=-2)).narrow(-2, 0, 1)

    return run


def _norm_(norm: Any) -> Function:
    """A norm of queries or keys [..., width] that may write over its input."""
    if norm is None:
        return lambda strip: strip
    if type(norm) is RMSNorm:
        return lambda strip: backend.rms_norm_(strip, norm.weight, norm.bias, norm.eps)
    return norm
