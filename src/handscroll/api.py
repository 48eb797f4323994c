"""handscroll in Python: a checkpoint that is ready to make pictures, and a picture that is ready to be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handscroll.events import OnEvent, ignore
from handscroll.jobs.recovery import Recovery
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.opening import on_fetch, open_checkpoint
from handscroll.options import fields_of
from handscroll.pictures.targets import check_target
from handscroll.pipeline import encode_stage, write_picture
from handscroll.plan.inputs import PlanInputs
from handscroll.plan.plan import Plan
from handscroll.plan.search import make_plan, replan
from handscroll.plan.stages import DECODE, DENOISE
from handscroll.request import DEFAULT_MODEL, Request, random_seed
from handscroll.runtime.decode import decode_rows, whole_picture
from handscroll.runtime.denoise import denoise_picture
from handscroll.runtime.device import scratch_folder
from handscroll.runtime.memory import enforce
from handscroll.runtime.probe import probe
from handscroll.runtime.session import Session


class Handscroll:
    """A checkpoint that is ready to make pictures. Its modules stay in memory between calls, unless there is a budget.

    scroll = Handscroll.from_pretrained("tiny-landscape", memory="2GiB")
    scroll("snowy mountains at dusk, a red sun", width=1024, height=1024, seed=7).save("dusk.png")
    """

    def __init__(
        self, spec: CheckpointSpec, device: str = "auto", precision: str = "auto", memory_bytes: int | None = None
    ) -> None:
        self.spec, self.device, self.precision, self.memory_bytes = spec, device, precision, memory_bytes
        self.session = Session(spec, resident=memory_bytes is None, scratch=scratch_folder(None))

    @classmethod
    def from_pretrained(
        cls, model: str | Path = DEFAULT_MODEL, *, on_event: OnEvent = ignore, **options: Any
    ) -> Handscroll:
        """A model by short name, checkpoint folder or hub id, fetched first if need be.

        options: those that open a model: revision, device, precision, and memory='2GiB', the budget: on a CPU of the
        whole process, so that what it holds already counts; on a CUDA device of what PyTorch reserves. Raises
        HandscrollError.
        """
        fields = fields_of(Request, options, "from_pretrained")
        spec = open_checkpoint(model, fields.pop("revision", None), on_progress=on_fetch(on_event))
        return cls(spec, **fields)

    def __call__(self, prompt: str, *, on_event: OnEvent = ignore, **options: Any) -> Picture:
        """Denoises a prompt; the rows are decoded when the picture is saved or read.

        options: those of `handscroll generate` that describe one picture, as size='1024x512' or width=1024, height=512,
        steps, guidance, negative, seed, compose, decode. Raises HandscrollError, of which BudgetError before anything
        is read.
        """
        own: dict[str, Any] = {"precision": self.precision, "device": self.device, "memory_bytes": self.memory_bytes}
        request = Request(prompt, **own, **fields_of(Request, options, "scroll"))
        inputs = probe(self.spec, request)
        plan = make_plan(self.spec, request, inputs, random_seed())
        enforce(plan.device, plan.budget_bytes)
        recovery = Recovery(self.session, inputs, plan.precision, on_event)
        with torch.inference_mode():
            texts, plan = encode_stage(recovery, plan, request)
            for attempt in recovery.attempts(DENOISE, plan):
                with attempt:
                    latent = denoise_picture(self.session, attempt.plan, texts, 0, recovery.on_event)
        if self.memory_bytes is not None:
            self.session.free()
        return Picture(self.session, attempt.plan, inputs, latent, request, on_event)


class Picture:
    """A denoised picture. Its rows are decoded each time they are asked for and never all held but by `numpy`.

    `latent` [1, C, h, w] fp32; `plan` is what it was made by.
    """

    def __init__(
        self, session: Session, plan: Plan, inputs: PlanInputs, latent: Tensor, request: Request, on_event: OnEvent
    ) -> None:
        self.plan, self.latent = plan, latent
        self._session, self._inputs, self._request, self._on_event = session, inputs, request, on_event
        self.width, self.height = plan.width, plan.height
        self.seed = plan.seeds[0]

    @torch.inference_mode()
    def rows(self) -> Iterator[np.ndarray]:
        """The picture from top to bottom as row blocks [rows, width, 3] uint8."""
        self._session.listener = self._on_event
        yield from decode_rows(self._session, self.plan, self.latent)

    def numpy(self) -> np.ndarray:
        """The whole picture, [height, width, 3] uint8."""
        self._session.listener = self._on_event
        with torch.inference_mode():
            return whole_picture(self._session, self.plan, self.latent)

    def save(self, path: str | Path, *, quality: int | None = None, on_event: OnEvent | None = None) -> Path:
        """Writes the picture row by row in the format of the path's ending.

        on_event: a listener for this alone, in place of the one that the picture was denoised with. Raises as
        `check_target`, and BudgetError where that format's writer does not fit.
        """
        on_event = self._on_event if on_event is None else on_event
        target = check_target(Path(path), self.width, self.height)
        inputs = dataclasses.replace(self._inputs, suffix=target.path.suffix)
        plan = replan(self.plan, self._session.spec, inputs, DECODE)
        enforce(plan.device, plan.budget_bytes)
        recovery = Recovery(self._session, inputs, plan.precision, on_event)
        with torch.inference_mode():
            for attempt in recovery.attempts(DECODE, plan):
                with attempt:
                    listener = recovery.on_event
                    write_picture(self._session, attempt.plan, self.latent, self._request, target, 0, quality, listener)
        return target.path
