"""The sizes through which a large picture grows: composed small, then enlarged and painted on, size by size.

A model lays out a picture well at the sizes that it saw most of; far beyond them suns multiply. So the steps from pure
noise are made small, and each larger size begins from the enlarged picture with noise laid over it again, as in
SDEdit (arXiv 2108.01073): what noise hides is painted anew, what it leaves is kept.
"""

from __future__ import annotations

import dataclasses
import math

from handscroll.errors import UsageError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.plan import Plan

# Of each larger size's schedule the last part, as diffusers counts `strength`: the first time that a picture grows, the
# second, and so on, the last for all that follow. At Sana's flow shift of 6, 0.3 begins at a sigma of 0.72. From 0.8 on
# second suns rise beside the sketch's; the lower it is, the less finest detail is made (training/strength.py).
GROWTH_STRENGTHS: tuple[float, ...] = (0.3,)
# Sides double at most from one size to the next; a picture that is larger by less than this is made as it is.
LARGEST_STEP, SMALLEST_STEP = 2.0, 1.25


def smaller_sizes(width: int, height: int, compose_px: int, multiple: int) -> list[tuple[int, int]]:
    """The sizes before width x height, smallest first, the first of about `compose_px` squared pixels.

    Their sides are multiples of `multiple`, in the ratio nearest to the picture's that there is. The shorter is about
    half of `compose_px` or more, where the picture's is: no model has learnt to compose lower bands. Where growth is
    by powers of two, the sizes of a smaller picture are the first of a larger one's.
    """
    ratio = min(math.sqrt(width * height) / compose_px, 2 * min(width, height) / compose_px)
    if ratio < SMALLEST_STEP:
        return []
    count = max(1, math.ceil(math.log(ratio, LARGEST_STEP) - 1e-9))
    sizes: list[tuple[int, int]] = []
    for index in range(count):
        size = _nearest(width, height, ratio ** (index / count) / ratio, multiple)
        before = sizes[-1] if sizes else (0, 0)
        if before[0] <= size[0] and before[1] <= size[1] and size != before and size != (width, height):
            sizes.append(size)
    return sizes


def _nearest(width: int, height: int, scale: float, multiple: int) -> tuple[int, int]:
    """Of the multiples around both sides times `scale` the pair whose ratio is most like theirs, then the nearest."""

    def around(side: int) -> set[int]:
        below = int(side * scale / multiple)
        return {min(max(1, count) * multiple, side) for count in (below, below + 1)}

    def badness(size: tuple[int, int]) -> tuple[float, float]:
        bent = abs(math.log(size[0] / size[1] * height / width))
        return round(bent, 9), abs(math.log(size[0] * size[1] / (width * height * scale**2)))

    return min(((w, h) for w in sorted(around(width)) for h in sorted(around(height))), key=badness)


def first_step(steps: int, grown: int = 0) -> int:
    """The step of a schedule of so many at which a larger size begins, of a picture that grew so many times before."""
    return steps - max(1, round(steps * GROWTH_STRENGTHS[min(grown, len(GROWTH_STRENGTHS) - 1)]))


def with_smaller_sizes(plan: Plan, spec: CheckpointSpec, compose_px: int | None) -> Plan:
    """The plan with the smaller ones that it grows from; where nobody asked (None), as the checkpoint does.

    Raises UsageError where a few-step model is asked to, or one whose scheduler mixes noise in another way.
    """
    if spec.is_sprint:
        if compose_px:
            raise UsageError(f"{spec.name} is a few-step model and composes at full size; leave --compose out")
        return plan
    if not spec.scheduler.is_flow:
        if compose_px:
            raise UsageError(f"{spec.name} samples without flow sigmas, so that no picture grows; leave --compose out")
        return plan
    compose_px = spec.compose_px if compose_px is None else compose_px
    if not compose_px or not first_step(plan.steps):
        return plan  # of a single step there is no last part to begin a larger size with
    ratio = spec.autoencoder.spatial_compression_ratio
    full, multiple = (plan.latent_width * ratio, plan.latent_height * ratio), ratio * spec.transformer.patch_size
    smaller: Plan | None = None
    sizes = smaller_sizes(*full, compose_px, multiple)
    for index, (width, height) in enumerate(sizes):
        smaller = dataclasses.replace(
            plan,
            width=width,
            height=height,
            latent_width=width // ratio,
            latent_height=height // ratio,
            seeds=(),
            decode="rows",
            strip_rows=None,
            smaller=smaller,
            first_step=first_step(plan.steps, index - 1) if index else 0,
        )
    if smaller is None:
        return plan
    least = smaller.sizes[0]
    return dataclasses.replace(
        plan,
        smaller=smaller,
        first_step=first_step(plan.steps, len(sizes) - 1),
        composed=f"{least.width}x{least.height}",
    )
