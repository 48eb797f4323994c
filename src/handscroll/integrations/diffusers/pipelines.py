"""A pipeline whose autoencoder is attached: what it could not decode at the end is refused before its first step."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import nn

from handscroll.integrations.diffusers.attachment import METHODS, Attachment
from handscroll.integrations.diffusers.wrappers import unwrapped

_CHECK = "check_inputs"
# Names under which pipelines take pictures that they encode.
_PICTURES = ("image", "control_image")


def is_pipeline(target: Any) -> bool:
    from diffusers import DiffusionPipeline

    return isinstance(target, DiffusionPipeline)


def halves_of(pipeline: Any) -> tuple[str, ...]:
    """Which halves of its autoencoder a pipeline uses: one that takes no picture encodes none."""
    takes = inspect.signature(type(pipeline).__call__).parameters
    return ("decoder", "encoder") if any(name in takes for name in _PICTURES) else ("decoder",)


def check_before_steps(pipeline: Any) -> None:
    """Has the pipeline's own `check_inputs` followed by ours. Does nothing for a pipeline without one."""
    if hasattr(type(pipeline), _CHECK):
        pipeline.__dict__[_CHECK] = _Checked(pipeline)


def stop_checking(pipeline: Any) -> None:
    if isinstance(vars(pipeline).get(_CHECK), _Checked):
        del pipeline.__dict__[_CHECK]


def bar_of(pipeline: Any) -> Callable[[int], Any]:
    """Makes the pipeline's own progress bar, by the settings of its `set_progress_bar_config`."""
    of = weakref.ref(pipeline)

    def bar(total: int) -> Any:
        alive = of()
        return _NoBar() if alive is None else alive.progress_bar(total=total)

    return bar


class _NoBar:
    def update(self) -> None:
        """Shows nothing."""

    def close(self) -> None:
        """Ends nothing."""


class _Checked:
    """A pipeline's `check_inputs` with ours behind it. It goes with the pipeline into copies and pickles."""

    def __init__(self, pipeline: Any) -> None:
        self._of = weakref.ref(pipeline)

    def __getstate__(self) -> dict[str, Any]:
        return {"pipeline": self._of()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["pipeline"])  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Checked:
        return _Checked(memo.get(id(self._of()), self._of()))

    def __call__(self, *given: Any, **named: Any) -> None:
        known = self._arguments_of(sys._getframe(1))
        pipeline = known.get("self", self._of())
        if pipeline is None:
            return  # of a copy whose original is gone, and whose own way of calling is not known
        own = getattr(type(pipeline), _CHECK)
        own(pipeline, *given, **named)
        bound = inspect.signature(own).bind(pipeline, *given, **named).arguments
        _check(pipeline, {**known, **bound})

    def _arguments_of(self, caller: FrameType) -> dict[str, Any]:
        """What the pipeline was called with, itself as `self`: a shallow copy of the attached one has this check too.

        `check_inputs` is told neither how many pictures nor whether they are decoded. Read from the frame of the
        pipeline's `__call__`, and nothing where another function calls.
        """
        pipeline = caller.f_locals.get("self")
        is_call = caller.f_code.co_name == "__call__" and getattr(pipeline, "__dict__", {}).get(_CHECK) is self
        return dict(caller.f_locals) if is_call else {}


def _check(pipeline: Any, known: dict[str, Any]) -> None:
    """Raises what decoding at the end, or encoding a picture before, would raise."""
    autoencoder = unwrapped(getattr(pipeline, "vae", None))
    if not isinstance(autoencoder, nn.Module):
        return
    attachment = getattr(vars(autoencoder).get(METHODS["decoder"]), "__self__", None)
    if not isinstance(attachment, Attachment) or not known.get("height") or not known.get("width"):
        return
    batch, height, width = _batch(known), int(known["height"]), int(known["width"])
    if any(known.get(name) is not None for name in _PICTURES):
        attachment.check("encoder", 1, height, width)
    if known.get("output_type") == "latent":
        return
    latents = known.get("latents")
    if latents is not None:
        factor = attachment.autoencoder.spatial_compression_ratio
        batch, (height, width) = len(latents), (side * factor for side in latents.shape[-2:])
    attachment.check_modes()
    attachment.check("decoder", batch, height, width)


def _batch(known: dict[str, Any]) -> int:
    """How many pictures are decoded together."""
    prompt, embeds = known.get("prompt"), known.get("prompt_embeds")
    prompts = len(prompt) if isinstance(prompt, list) else 1 if embeds is None else len(embeds)
    return prompts * (known.get("num_images_per_prompt") or 1)
