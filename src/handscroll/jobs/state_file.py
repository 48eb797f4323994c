"""A sampler between two steps on disk: safetensors, held to its header before a number of it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from handscroll.errors import CheckpointError
from handscroll.weights.header import TensorEntry, read_header, read_metadata
from handscroll.weights.tensor_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from handscroll.runtime.sampling.state import SamplerState

MAX_TIMESTEPS = 4096
MAX_GENERATOR_BYTES = 16_384  # PyTorch's on a CPU takes 5,056
MAX_OUTPUTS = 8  # a solver's order is 3 at most


def write_state(path: Path, state: SamplerState, facts: Mapping[str, str], part: Path) -> None:
    """Writes a state whole, with the run's `facts`, by way of `part`. Raises OSError."""
    tensors = {"latent": state.latent, "timesteps": state.timesteps, "generator": state.generator}
    tensors |= {f"model_output.{number}": output for number, output in enumerate(state.model_outputs)}
    own = {
        "steps_done": state.steps_done,
        "lower_order_nums": state.lower_order_nums,
        "steps_before": state.steps_before,
    }
    write_tensors(path, tensors, {**facts, **{name: str(value) for name, value in own.items()}}, part=part)


def read_state(path: Path, latent_shapes: Mapping[int, tuple[int, ...]]) -> tuple[SamplerState, dict[str, str]]:
    """A state, and the facts that it was written with.

    latent_shapes: of the sizes that the picture grows through, by the steps before each; nothing else is read. Empty
    where they are not known. Raises CheckpointError for a file that is no whole state of such a picture.
    """
    from handscroll.runtime.sampling.state import SamplerState

    try:
        _check_header(path, latent_shapes)
        tensors, facts = read_tensors(path)
        state = SamplerState(
            steps_done=int(facts["steps_done"]),
            latent=tensors["latent"],
            timesteps=tensors["timesteps"],
            generator=tensors["generator"],
            model_outputs=tuple(tensors[f"model_output.{number}"] for number in range(len(tensors) - 3)),
            lower_order_nums=int(facts["lower_order_nums"]),
            steps_before=int(facts["steps_before"]),
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not a sampler's state") from error
    return state, facts


def _check_header(path: Path, latent_shapes: Mapping[int, tuple[int, ...]]) -> None:
    """Raises CheckpointError, KeyError or ValueError."""
    entries = {entry.name: entry for entry in read_header(path)}
    latent, timesteps, generator = (entries.pop(name) for name in ("latent", "timesteps", "generator"))
    before = int(read_metadata(path)["steps_before"])
    if not (
        len(latent.shape) == 4
        and latent.dtype == "fp32"
        and latent_shapes.get(before, None if latent_shapes else latent.shape) == latent.shape
        and all(_is_like(latent, entries[f"model_output.{number}"]) for number in range(len(entries)))
        and len(entries) <= MAX_OUTPUTS
        and len(timesteps.shape) == 1 <= timesteps.shape[0] <= MAX_TIMESTEPS
        and len(generator.shape) == 1
        and generator.dtype == "uint8"
        and generator.n_bytes <= MAX_GENERATOR_BYTES
    ):
        raise ValueError


def _is_like(latent: TensorEntry, output: TensorEntry) -> bool:
    return (output.shape, output.dtype) == (latent.shape, latent.dtype)
