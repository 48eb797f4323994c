"""The linear solution that the autoencoder starts from: principal components, written into AutoencoderDC's weights.

Five steps of 2x2 pixels each keep the strongest combinations of what they see, then one last projection keeps 32.
`AutoencoderDC` can hold such a chain exactly where it goes down by `Conv` and up by `pixel_shuffle`: each down and up
convolution becomes the step's matrix minus what its shortcut adds, and every residual branch starts silent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC
from numpy.typing import NDArray
from torch import Tensor, nn

PATCH = 32
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Components:
    """`steps[k]` maps 2x2 neighbours ([c * 4 + dy * 2 + dx]) to that step's channels; `last` maps those to latents.

    Rows of `steps` are orthogonal with length 1/2, so that channels average pixels and stay near 1: where they sum
    them, the strongest grow to 30, and every small step of the optimiser on a weight that reads them shakes the
    picture. `gain` scales each latent channel and `mean` is the latents' mean after scaling.
    """

    steps: tuple[Doubles, ...]
    last: Doubles
    gain: Doubles
    mean: Doubles


def _unshuffle(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    n, c, h, w = maps.shape
    return maps.reshape(n, c, h // 2, 2, w // 2, 2).transpose(0, 1, 3, 5, 2, 4).reshape(n, c * 4, h // 2, w // 2)


def _strongest(maps: NDArray[np.float32], keep: int) -> Doubles:
    """The `keep` strongest directions of the channels, as rows. Not centred: the mean is one more direction."""
    flat = maps.transpose(1, 0, 2, 3).reshape(maps.shape[1], -1)
    flat = flat[:, :: max(1, flat.shape[1] // 400_000)]
    moment = (flat @ flat.T).astype(np.float64) / flat.shape[1]
    _, directions = np.linalg.eigh(moment)
    return directions[:, ::-1][:, : min(keep, len(moment))].T


def fit_components(
    pictures: NDArray[np.float32], channels: tuple[int, ...], latent: int, whitening: float
) -> Components:
    """Fit the chain to pictures in [-1, 1]. `channels` are the maps' widths at 1/2, 1/4 ... 1/32.

    `whitening` 1 gives every latent channel the same variance, 0 leaves them as strong as they are in pixels.
    """
    maps, steps = pictures, []
    for keep in channels:
        maps = _unshuffle(maps)
        step = 0.5 * _strongest(maps, keep)
        maps = np.einsum("oc,nchw->nohw", step.astype(np.float32), maps, optimize=True)
        steps.append(step)
    last = _strongest(maps, latent)
    latents = np.einsum("oc,nchw->nohw", last.astype(np.float32), maps, optimize=True)
    spread = latents.std(axis=(0, 2, 3)).astype(np.float64)
    gain = spread**-whitening
    gain /= np.sqrt(np.mean((spread * gain) ** 2))
    return Components(tuple(steps), last, gain, latents.mean(axis=(0, 2, 3)) * gain)


def _average_of_groups(inputs: int, outputs: int) -> Tensor:
    """The matrix of a shortcut that averages groups of consecutive channels."""
    return torch.eye(outputs).repeat_interleave(inputs // outputs, dim=1) * (outputs / inputs)


def _repeat_of_channels(inputs: int, outputs: int) -> Tensor:
    """The matrix of a shortcut that repeats each channel."""
    return torch.eye(inputs).repeat_interleave(outputs // inputs, dim=0)


def _padded(matrix: Doubles, rows: int, columns: int) -> Tensor:
    out = torch.zeros(rows, columns)
    out[: matrix.shape[0], : matrix.shape[1]] = torch.from_numpy(np.ascontiguousarray(matrix))
    return out


def _silence_residuals(model: AutoencoderDC) -> None:
    """Every residual branch ends in a norm; at zero the branch adds nothing, and still learns."""
    for name, parameter in model.named_parameters():
        if ".norm" in name:
            nn.init.zeros_(parameter)


@torch.no_grad()
def write_components(model: AutoencoderDC, components: Components, constant: float = 12.0, lift: float = 2.0) -> None:
    """Make `model` compute `components` and their inverse.

    The decoder ends in RMSNorm and ReLU. A spare channel held at `constant` keeps the norm nearly a constant factor,
    and `lift` keeps what enters the ReLU positive; both are undone after it.
    """
    _silence_residuals(model)
    _write_encoder(model.encoder, components)
    _write_decoder(model.decoder, components, constant, lift)


# diffusers' Encoder and Decoder are `Any` here: mypy does not follow diffusers, and an nn.Module's parts have no types.
def _write_encoder(encoder: Any, components: Components) -> None:
    downs = [encoder.conv_in] + [
        stage[-1] for stage in encoder.down_blocks if len(stage) and hasattr(stage[-1], "stride")
    ]
    for down, step in zip(downs, components.steps, strict=True):
        rows, columns = down.conv.weight.shape[:2]
        # A step reads channels the step before has kept; columns of channels beyond those stay zero.
        matrix = _padded(step, rows, columns * 4)
        if down.shortcut:
            matrix -= _average_of_groups(columns * 4, rows)
        down.conv.weight.zero_()
        down.conv.weight[:, :, 1:, 1:] = matrix.reshape(rows, columns, 2, 2)
        down.conv.bias.zero_()
    out = encoder.conv_out
    rows, columns = out.weight.shape[:2]
    matrix = _padded(components.last * components.gain[:, None], rows, columns)
    out.weight.zero_()
    out.weight[:, :, 1, 1] = matrix - _average_of_groups(columns, rows)
    out.bias.copy_(torch.from_numpy(-components.mean))


def _write_decoder(decoder: Any, components: Components, constant: float, lift: float) -> None:
    back = (components.last / components.gain[:, None]).T
    first = decoder.conv_in
    rows, columns = first.weight.shape[:2]
    matrix = _padded(back, rows, columns)
    first.bias.copy_(matrix @ torch.from_numpy(components.mean).float())
    first.weight.zero_()
    first.weight[:, :, 1, 1] = matrix - _repeat_of_channels(columns, rows)

    ups = [stage[0] for stage in reversed(decoder.up_blocks) if len(stage) and hasattr(stage[0], "repeats")]
    for up, step in zip(ups, reversed(components.steps[1:]), strict=True):
        rows, columns = up.conv.weight.shape[:2]
        up.conv.weight.zero_()
        up.conv.weight[:, :, 1, 1] = _padded(4 * step.T, rows, columns) - _repeat_of_channels(columns, rows)
        up.conv.bias.zero_()
    ups[-1].conv.bias[-4:] = constant

    used, width = components.steps[0].shape[0], decoder.norm_out.weight.shape[0]
    if used >= width:
        raise ValueError("the constant needs a channel that the first step leaves free")
    factor = constant / width**0.5
    decoder.norm_out.weight.fill_(factor)
    decoder.norm_out.weight[used:] = 0
    decoder.norm_out.bias.zero_()
    decoder.norm_out.bias[:used] = lift
    final = decoder.conv_out.conv
    matrix = _padded(4 * components.steps[0].T, final.weight.shape[0], final.weight.shape[1])
    final.weight.zero_()
    final.weight[:, :, 1, 1] = matrix
    final.bias.copy_(-lift * matrix.sum(dim=1))


@dataclass(frozen=True)
class PatchPCA:
    """Plain principal components of 32x32 patches: what any trained autoencoder of this latent size has to beat."""

    mean: NDArray[np.float32]
    directions: NDArray[np.float32]

    @classmethod
    def fit(cls, pictures: NDArray[np.float32], keep: int) -> PatchPCA:
        patches = cls._cut(pictures)
        mean = patches.mean(axis=0)
        centred = patches - mean
        _, directions = np.linalg.eigh((centred.T @ centred).astype(np.float64))
        return cls(mean, np.ascontiguousarray(directions[:, ::-1][:, :keep].T.astype(np.float32)))

    @staticmethod
    def _cut(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
        n, c, h, w = pictures.shape
        tiles = pictures.reshape(n, c, h // PATCH, PATCH, w // PATCH, PATCH).transpose(0, 2, 4, 1, 3, 5)
        return tiles.reshape(-1, c * PATCH * PATCH)

    def reconstruct(self, pictures: NDArray[np.float32]) -> NDArray[np.float32]:
        n, c, h, w = pictures.shape
        patches = self._cut(pictures)
        back = (patches - self.mean) @ self.directions.T @ self.directions + self.mean
        tiles = back.reshape(n, h // PATCH, w // PATCH, c, PATCH, PATCH).transpose(0, 3, 1, 4, 2, 5)
        return np.ascontiguousarray(tiles.reshape(n, c, h, w))
