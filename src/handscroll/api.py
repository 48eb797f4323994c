"""handscroll in Python: a checkpoint that is ready to make pictures, and a picture that is ready to be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

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
from handscroll.pictures.formats import check_quality
from handscroll.pictures.metadata import not_in_file
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
from handscroll.runtime.holdings import Given, Holdings
from handscroll.runtime.probe import probe
from handscroll.runtime.session import Session
from handscroll.runtime.settings import job_settings, made_within
from handscroll.units import shown


class Handscroll:
    """A checkpoint that is ready to make pictures. Without a budget its modules stay in memory between calls, as many
    as there is room for beside the work; with one, none of them.

    scroll = Handscroll.from_pretrained("tiny-landscape", memory="2GiB")
    scroll("snowy mountains at dusk, a red sun", width=1024, height=1024, seed=7).save("dusk.png")
    """

    def __init__(
        self,
        spec: CheckpointSpec,
        device: str = "auto",
        precision: str = "auto",
        memory_bytes: int | None = None,
        text_precision: str = "auto",
    ) -> None:
        if not isinstance(spec, CheckpointSpec):
            raise UsageError(f"{shown(spec)} is not an open checkpoint; use Handscroll.from_pretrained(model)")
        given = {"device": device, "precision": precision, "memory_bytes": memory_bytes}
        given["text_precision"] = text_precision
        fields = {"device": "auto", "precision": "auto", **fields_of(Request, given, "from_pretrained")}
        self.spec, self.device, self.precision = spec, str(fields["device"]), str(fields["precision"])
        self.text_precision = str(fields.get("text_precision", "auto"))
        self.memory_bytes: int | None = fields.get("memory_bytes")
        self.session, self.holdings = Session(spec, scratch=scratch_folder(None)), Holdings()

    @classmethod
    def from_pretrained(
        cls, model: str | Path = DEFAULT_MODEL, *, on_event: OnEvent | None = None, **options: Any
    ) -> Handscroll:
        """A model by short name, checkpoint folder or hub id, fetched first if need be.

        options: those that open a model: revision, device, precision, text_precision, and memory='2GiB', the budget: on
        a CPU of the whole process, so that what it holds already counts; on a CUDA device of what PyTorch reserves.
        Raises HandscrollError.
        """
        fields = fields_of(Request, options, "from_pretrained")
        spec = open_checkpoint(model, fields.pop("revision", None), on_progress=on_fetch(listener(on_event)))
        return cls(spec, **fields)

    @overload
    def __call__(self, prompt: str, *, on_event: OnEvent | None = None, **options: Any) -> Picture: ...

    @overload
    def __call__(
        self, prompt: list[str] | tuple[str, ...], *, on_event: OnEvent | None = None, **options: Any
    ) -> list[Picture]: ...

    def __call__(self, prompt: Any, *, on_event: OnEvent | None = None, **options: Any) -> Picture | list[Picture]:
        """Denoises a prompt; the rows are decoded when the picture is saved or read. Of a list of prompts, a list.

        A list gives what its prompts give one by one with the same options, so with the same seed where one is given;
        `negative` and `seed` may be lists of the same length. All is checked before the first is denoised.
        options: those of `handscroll generate` that describe one picture, as size='1024x512' or width=1024, height=512,
        steps, guidance, negative, seed, compose, decode. Without a listener, what is asked for and not used becomes a
        warning; it is in the picture's `notices` too. Raises HandscrollError, of which BudgetError before anything
        is read.
        """
        on_event = listener(on_event, warn_of_notices)
        if isinstance(prompt, list | tuple):
            requests = [self._request(one, each) for one, each in zip(prompt, _each(prompt, options), strict=True)]
            return [self._picture(request, on_event) for request in requests]
        return self._picture(self._request(prompt, options), on_event)

    def _request(self, prompt: Any, options: Mapping[str, Any]) -> Request:
        own: dict[str, Any] = {"precision": self.precision, "device": self.device, "memory_bytes": self.memory_bytes}
        own["text_precision"] = self.text_precision
        return Request(prompt, **own, **fields_of(Request, options, "scroll"))

    def _picture(self, request: Request, on_event: OnEvent) -> Picture:
        found = self._probed(request)
        hardware = found.hardware
        with self.holdings.counted(None if hardware.is_cuda else hardware.base_bytes) as given:
            inputs = self.holdings.without(found, self.session.held_bytes)
            plan = make_plan(self.spec, request, inputs, random_seed())
            for line in plan.notices:
                on_event(notice(line))
            latent, plan = self._denoised(request, plan, Recovery(self.session, inputs, plan.precision, on_event))
            given.n_bytes = latent.nbytes
        return Picture(self, plan, inputs, latent, request, on_event)

    def _probed(self, request: Request) -> PlanInputs:
        return dataclasses.replace(probe(self.spec, request), keeps_modules=self.memory_bytes is None)

    def _denoised(self, request: Request, plan: Plan, recovery: Recovery) -> tuple[Tensor, Plan]:
        with self._keeping(plan), self._set_for(plan):
            texts, plan = encode_stage(recovery, plan, request)
            for attempt in recovery.attempts(DENOISE, plan):
                with attempt:
                    latent = denoise_picture(self.session, attempt.plan, texts, 0, recovery.on_event)
        return latent, attempt.plan

    @contextmanager
    def _keeping(self, plan: Plan) -> Iterator[None]:
        """What the plan does not keep is freed, before and after."""
        self.session.free_but(plan.kept)
        try:
            yield
        finally:
            self.session.free_but(plan.kept)

    @contextmanager
    def _set_for(self, plan: Plan) -> Iterator[None]:
        with job_settings(plan.device, plan.budget_bytes), torch.inference_mode():
            yield

    @contextmanager
    def _at_work(self, plan: Plan) -> Iterator[Given]:
        """PyTorch is set for the plan's job; what the process holds more at the end counts as this session's own."""
        with self.holdings.counted() as given, self._set_for(plan):
            yield given


def _each(prompts: Sequence[Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options of each prompt of a list. Raises UsageError for an empty list, or lists of another length beside."""
    if not prompts:
        raise UsageError("the list of prompts is empty; give at least one")
    lists = {name: options[name] for name in ("negative", "seed") if isinstance(options.get(name), list | tuple)}
    for name, values in lists.items():
        if len(values) != len(prompts):
            raise UsageError(
                f"{len(prompts)} prompts and {len(values)} of {name}; give one of it, or one for each prompt"
            )
    return [{**options, **{name: values[index] for name, values in lists.items()}} for index in range(len(prompts))]


class Picture:
    """A denoised picture. Its rows are decoded each time they are asked for and never all held but by `numpy`.

    `latent` [1, C, h, w] fp32; `plan` is what it was made by. `notices`: what was asked for and not used, a line each.
    """

    def __init__(
        self, scroll: Handscroll, plan: Plan, inputs: PlanInputs, latent: Tensor, request: Request, on_event: OnEvent
    ) -> None:
        self.plan, self.latent = plan, latent
        self._scroll, self._inputs, self._request, self._on_event = scroll, inputs, request, on_event
        self.width, self.height = plan.width, plan.height
        self.seed = plan.seeds[0]
        self.notices = plan.notices

    def rows(self) -> Iterator[np.ndarray]:
        """The picture from top to bottom as row blocks [rows, width, 3] uint8."""
        self._scroll.session.on_event = self._on_event
        plan, _ = self._planned_now()
        row_blocks = decode_rows(self._scroll.session, plan, self.latent)
        with self._scroll._keeping(plan):
            yield from made_within(lambda: self._scroll._at_work(plan), row_blocks)

    def numpy(self) -> np.ndarray:
        """The whole picture, [height, width, 3] uint8."""
        self._scroll.session.on_event = self._on_event
        plan, _ = self._planned_now()
        with self._scroll._keeping(plan), self._scroll._at_work(plan) as given:
            picture = whole_picture(self._scroll.session, plan, self.latent)
            given.n_bytes = picture.nbytes
        return picture

    def save(self, path: str | Path, *, quality: int | None = None, on_event: OnEvent | None = None) -> Path:
        """Writes the picture row by row in the format of the path's ending.

        on_event: a listener for this alone, in place of the one that the picture was denoised with. Raises as
        `check_target`, and BudgetError where that format's writer does not fit.
        """
        on_event = self._on_event if on_event is None else listener(on_event)
        path, quality = as_path("path", path), check_quality(quality)
        with self._scroll.holdings.counted():
            return self._saved(path, quality, on_event)

    def _planned_now(self, suffix: str | None = None) -> tuple[Plan, PlanInputs]:
        """How it is decoded, and what that was planned from: within a budget, with what the process holds by now.

        suffix: of the file that is written. Raises BudgetError.
        """
        inputs, session = self._inputs, self._scroll.session
        if self.plan.budget_bytes is not None:
            found = self._scroll._probed(self._request)
            hardware = self._scroll.holdings.without(found, session.held_bytes).hardware
            inputs = dataclasses.replace(inputs, hardware=hardware)
        if suffix is not None:
            inputs = dataclasses.replace(inputs, suffix=suffix)
        plan = self.plan if inputs is self._inputs else replan(self.plan, session.spec, inputs, DECODE)
        return plan, inputs

    def _saved(self, path: Path, quality: int | None, on_event: OnEvent) -> Path:
        target = check_target(path, self.width, self.height)
        for line in not_in_file(path.suffix, quality, picture_facts(self._request, self._scroll.spec, self.plan, 0)):
            on_event(notice(line))
        session = self._scroll.session
        plan, inputs = self._planned_now(target.path.suffix)
        recovery = Recovery(session, inputs, plan.precision, on_event)
        with self._scroll._keeping(plan), self._scroll._set_for(plan):
            for attempt in recovery.attempts(DECODE, plan):
                with attempt:
                    facts = picture_facts(self._request, session.spec, attempt.plan, 0)
                    told = recovery.on_event
                    write_picture(session, attempt.plan, self.latent, facts, target, 0, quality, told)
        return target.path
