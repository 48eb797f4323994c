"""A checkpoint's settings against the classes that take them, before a weight is read: refused in a moment, or told."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from handscroll.errors import CheckpointError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.config import read_config
from handscroll.runtime.modules import SCHEDULERS, load_scheduler
from handscroll.runtime.sampling.loop import set_schedule
from handscroll.units import first_line, listed

# The classes whose configs name every setting that they take; transformers' take any.
CLASSES = {
    "transformer": ("diffusers.models.transformers.sana_transformer", "SanaTransformer2DModel"),
    "vae": ("diffusers.models.autoencoders.autoencoder_dc", "AutoencoderDC"),
}
# Of a schedule; a multistep solver's order is 3 at most.
TRIED_STEPS = 4


def try_scheduler(spec: CheckpointSpec, steps: int) -> None:
    """Takes the first steps of a schedule on one position of zeros: what fails there would fail after all the reading.

    Raises CheckpointError for settings that do not run, UsageError for a number of steps that does not.
    """
    scheduler = load_scheduler(spec)
    try:
        _first_steps(spec, scheduler, spec.default_steps)
    except Exception as error:  # whatever a setting leads to
        file = spec.folder / "scheduler" / "scheduler_config.json"
        raise CheckpointError(
            f"{file}: a {spec.scheduler.class_name} with these settings does not run: {first_line(error)}"
        ) from error
    if steps != spec.default_steps:
        set_schedule(scheduler, steps, "cpu")


def _first_steps(spec: CheckpointSpec, scheduler: Any, steps: int) -> None:
    sample, generator = torch.zeros(1, spec.transformer.in_channels, 1, 1), torch.Generator()
    for t in set_schedule(scheduler, steps, "cpu")[:TRIED_STEPS]:
        sample = scheduler.step(torch.zeros_like(sample), t, sample, generator=generator, return_dict=False)[0]


def settings_not_taken(spec: CheckpointSpec, *components: str) -> tuple[str, ...]:
    """What the configs of transformer, vae or scheduler set and the installed classes do not know, a line a file.

    diffusers' pipelines paint without it too.
    """
    if spec.from_figures:
        return ()
    return tuple(line for component in components for line in _not_taken(spec, component))


def _not_taken(spec: CheckpointSpec, component: str) -> Iterator[str]:
    if component == "scheduler":
        module, name = SCHEDULERS[spec.scheduler.class_name], spec.scheduler.class_name
        file, config = spec.folder / component / "scheduler_config.json", spec.scheduler.config
    else:
        module, name = CLASSES[component]
        file = spec.folder / component / "config.json"
        config = read_config(file)
    known = inspect.signature(getattr(importlib.import_module(module), name).__init__).parameters
    # How weights are stored is read where they are, or refused there.
    taken = {*known, "quantization_config"}
    others = [key for key, value in config.items() if key not in taken and not key.startswith("_") and _asks(value)]
    if others:
        are = "is no setting" if len(others) == 1 else "are no settings"
        yield f"{file}: {listed(others)} {are} of a {name}, and not used"


def _asks(value: Any) -> bool:
    return value is not None and value is not False and value != [] and value != {}
