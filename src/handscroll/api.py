"""handscroll in Python: a checkpoint that is ready to make pictures, and a picture that is ready to be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handscroll.errors import UsageError
from handscroll.events import OnEvent, listener, notice, warn_of_notices
from handscroll.files import as_path
from handscroll.jobs.recovery import Recovery
from handscroll.jobs.result import picture_facts
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.opening import on_fetch, open_checkpoint
from handscroll.options import fields_of
from handscroll.pictures.formats import check_quality, quality_not_used
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
from handscroll.units import shown


class Handscroll:
    """A checkpoint that is ready to make pictures. Its modules stay in memory between calls, unless there is a budget.

    scroll = Handscroll.from_pretrained("tiny-landscape", memory="2GiB")
    scroll("snowy mountains at dusk, a red sun", width=1024, height=1024, seed=7).save("dusk.png")
    """

    def __init__(
        self, spec: CheckpointSpec, device: str = "auto", precision: str = "auto", memory_bytes: int | None = None
    ) -> None:
        if not isinstance(spec, CheckpointSpec):
            raise UsageError(f"{shown(spec)} is not an open checkpoint; use Handscroll.from_pretrained(model)")
        given = {"device": device, "precision": precision, "memory_bytes": memory_bytes}
        fields = {"device": "auto", "precision": "auto", **fields_of(Request, given, "from_pretrained")}
        self.spec, self.device, self.precision = spec, str(fields["device"]), str(fields["precision"])
        self.memory_bytes: int | None = fields.get("memory_bytes")
        self.session = Session(spec, resident=self.memory_bytes is None, scratch=scratch_folder(None))

    @classmethod
    def from_pretrained(
        cls, model: str | Path = DEFAULT_MODEL, *, on_event: OnEvent | None = None, **options: Any
    ) -> Handscroll:
        """A model by short name, checkpoint folder or hub id, fetched first if need be.

        options: those that open a model: revision, device, precision, and memory='2GiB', the budget: on a CPU of the
        whole process, so that what it holds already counts; on a CUDA device of what PyTorch reserves. Raises
        HandscrollError.
        """
        fields = fields_of(Request, options, "from_pretrained")
        spec = open_checkpoint(model, fields.pop("revision", None), on_progress=on_fetch(listener(on_event)))
        return cls(spec, **fields)

    def __call__(self, prompt: str, *, on_event: OnEvent | None = None, **options: Any) -> Picture:
        """Denoises a prompt; the rows are decoded when the picture is saved or read.

        options: those of `handscroll generate` that describe one picture, as size='1024x512' or width=1024, height=512,
        steps, guidance, negative, seed, compose, decode. Without a listener, what is asked for and not used becomes a
        warning; it is in the picture's `notices` too. Raises HandscrollError, of which BudgetError before anything
        is read.
        """
        own: dict[str, Any] = {"precision": self.precision, "device": self.device, "memory_bytes": self.memory_bytes}
        request = Request(prompt, **own, **fields_of(Request, options, "scroll"))
        on_event = listener(on_event, warn_of_notices)
        inputs = probe(self.spec, request)
        plan = make_plan(self.spec, request, inputs, random_seed())
        for line in plan.notices:
            on_event(notice(line))
        enforce(plan.device, plan.budget_bytes)
        self.session.on_event = on_event
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

    `latent` [1, C, h, w] fp32; `plan` is what it was made by. `notices`: what was asked for and not used, a line each.
    """

    def __init__(
        self, session: Session, plan: Plan, inputs: PlanInputs, latent: Tensor, request: Request, on_event: OnEvent
    ) -> None:
        self.plan, self.latent = plan, latent
        self._session, self._inputs, self._request, self._on_event = session, inputs, request, on_event
        self.width, self.height = plan.width, plan.height
        self.seed = plan.seeds[0]
        self.notices = plan.notices

    @torch.inference_mode()
    def rows(self) -> Iterator[np.ndarray]:
        """The picture from top to bottom as row blocks [rows, width, 3] uint8."""
        self._session.on_event = self._on_event
        yield from decode_rows(self._session, self.plan, self.latent)

    def numpy(self) -> np.ndarray:
        """The whole picture, [height, width, 3] uint8."""
        self._session.on_event = self._on_event
        with torch.inference_mode():
            return whole_picture(self._session, self.plan, self.latent)

    def save(self, path: str | Path, *, quality: int | None = None, on_event: OnEvent | None = None) -> Path:
        """Writes the picture row by row in the format of the path's ending.

        on_event: a listener for this alone, in place of the one that the picture was denoised with. Raises as
        `check_target`, and BudgetError where that format's writer does not fit.
        """
        on_event = self._on_event if on_event is None else listener(on_event)
        path, quality = as_path("path", path), check_quality(quality)
        target = check_target(path, self.width, self.height)
        for line in quality_not_used(path.suffix, quality):
            on_event(notice(line))
        inputs = dataclasses.replace(self._inputs, suffix=target.path.suffix)
        plan = replan(self.plan, self._session.spec, inputs, DECODE)
        enforce(plan.device, plan.budget_bytes)
        self._session.on_event = on_event
        recovery = Recovery(self._session, inputs, plan.precision, on_event)
        with torch.inference_mode():
            for attempt in recovery.attempts(DECODE, plan):
                with attempt:
                    facts = picture_facts(self._request, self._session.spec, attempt.plan, 0)
                    told = recovery.on_event
                    write_picture(self._session, attempt.plan, self.latent, facts, target, 0, quality, told)
        return target.path
