"""(spec, request, hardware) -> a frozen Plan: every default filled in, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from handscroll.errors import SizeError, UsageError
from handscroll.plan.hardware import Hardware
from handscroll.plan.precision import Precision, resolve_precision
from handscroll.request import MAX_SIDE_PX, Request
from handscroll.spec import CheckpointSpec


@dataclass(frozen=True)
class Plan:
    """What will run. Sizes in pixels; `latent_height` and `latent_width` in latent pixels; `seeds` one a picture."""

    width: int
    height: int
    latent_width: int
    latent_height: int
    steps: int
    guidance: float
    seeds: tuple[int, ...]
    precision: Precision
    device: str
    decode: str
    patches: int
    strip_rows: int | None

    @property
    def guided(self) -> bool:
        """Whether each step needs a second forward with the negative prompt (never for few-step models)."""
        return self.guidance > 1

    @property
    def exact(self) -> bool:
        """Whether the picture is the one that the whole network makes. Tiling is the only way here that is not."""
        return self.decode != "tiled"


def make_plan(spec: CheckpointSpec, request: Request, hardware: Hardware, seed: int) -> Plan:
    """Fills in a request's defaults from the checkpoint. `seed` stands in for one that was left out.

    Raises SizeError where the model has a largest size, UsageError for what this kind of model cannot do.
    """
    factor = spec.autoencoder.spatial_compression_ratio * spec.transformer.patch_size
    width = request.width or request.height or spec.native_px
    height = request.height or request.width or spec.native_px
    if max(width, height) > MAX_SIDE_PX:
        raise SizeError(f"size {width}x{height} is out of range; use at most {MAX_SIDE_PX} pixels a side")
    if spec.is_sprint and request.negative:
        raise UsageError(f"{spec.name} is a few-step model and takes no negative prompt; leave --negative out")
    first = seed if request.seed is None else request.seed
    return Plan(
        width=width,
        height=height,
        latent_width=-(-width // factor) * spec.transformer.patch_size,
        latent_height=-(-height // factor) * spec.transformer.patch_size,
        steps=request.steps or spec.default_steps,
        guidance=spec.default_guidance if request.guidance is None else request.guidance,
        seeds=tuple(first + index for index in range(request.count)),
        precision=resolve_precision(spec, request.precision, hardware.device, hardware.bf16_is_faster),
        device=hardware.device,
        decode=request.decode,
        patches=request.patches,
        strip_rows=request.strip_rows,
    )
