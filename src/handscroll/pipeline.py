"""The way from a prompt to a picture file: text -> latent -> rows -> file, one stage in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handscroll.errors import CheckpointError, SizeError
from handscroll.events import OnEvent, Progress, ignore
from handscroll.jobs.job import Job, find_run, read_job, resolved_name
from handscroll.jobs.latent_file import check_latent_target, load_latent
from handscroll.jobs.recovery import Recovery
from handscroll.jobs.store import RunFolder
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.opening import open_checkpoint
from handscroll.options import fields_of
from handscroll.pictures.metadata import parameters_text
from handscroll.pictures.targets import Target, check_target
from handscroll.pictures.writing import write_image
from handscroll.plan.plan import Plan, chosen_anew, make_plan, minimum_bytes
from handscroll.request import DEFAULT_MODEL, Request, indexed, random_seed
from handscroll.runtime.decode import decode_rows, whole_picture
from handscroll.runtime.device import scratch_folder
from handscroll.runtime.growth import grown
from handscroll.runtime.memory import Meter, enforce
from handscroll.runtime.modules import DTYPES, load_scheduler, load_tokenizer
from handscroll.runtime.probe import survey
from handscroll.runtime.sampling.job import Sampling
from handscroll.runtime.sampling.loop import denoise
from handscroll.runtime.sampling.noise import starting_noise
from handscroll.runtime.session import Opened, Stages
from handscroll.runtime.text import encoded, instruction_of
from handscroll.runtime.text_cache import Text
from handscroll.units import parse_bytes
from handscroll.version import __version__

STAGES = ("text", "denoise", "decode")


@dataclass(frozen=True)
class Result:
    """One picture that was written, and what it took. `as_dict` is the JSON of the command line."""

    path: Path
    width: int
    height: int
    seed: int
    steps: int
    guidance: float
    model: str
    precision: str
    decode: str
    exact: bool
    memory: dict[str, Any]
    seconds: dict[str, float]
    note: str = ""
    composed: str = ""
    resumed_from_step: int | None = None

    def as_dict(self) -> dict[str, Any]:
        facts = {**dataclasses.asdict(self), "path": str(self.path)}
        if self.resumed_from_step is None:
            del facts["resumed_from_step"]
        return facts


def generate(
    request: Request,
    path: Path,
    *,
    save_latent: Path | None = None,
    quality: int | None = None,
    on_event: OnEvent = ignore,
    must_go_on: bool = False,
) -> list[Result]:
    """Makes the pictures of a request and writes them to `path` (`name-1.png`, ... for more than one).

    Whatever can be refused is refused before a weight is read. What is finished is kept in a run folder beside `path`
    until the pictures are written: the same request goes on from there, another starts over (`must_go_on` refuses to).
    Seconds and memory in the results are this session's. Raises HandscrollError.
    """
    spec = open_checkpoint(request.model, on_progress=_on_fetch(on_event))
    situation = survey(spec, request, path)
    plan = make_plan(spec, request, situation, random_seed())
    targets = _targets(path, plan)
    latent_paths = _latent_targets(save_latent, plan)
    enforce(plan.device, plan.budget_bytes)
    meter = Meter(plan.device)
    job = Job.of(request, spec, plan, path, save_latent, quality)
    with torch.inference_mode(), RunFolder.open(job, on_event, must_go_on=must_go_on) as run:
        plan = dataclasses.replace(plan, seeds=run.seeds)
        with Stages(spec, plan, scratch=scratch_folder(run.folder)) as stage:
            recovery = Recovery(stage, situation, on_event)
            if run.to_denoise():
                with meter.stage("text"):
                    on_event(Progress("text", 0, 1))
                    text, negative = recovery.run("text", lambda: encode_prompts(stage, request))
                    on_event(Progress("text", 1, 1))
                stage.free()  # here, so that no stage is measured with the one before
            meters = [meter.fork() for _ in plan.seeds]
            plans = [plan] * len(plan.seeds)
            for index in run.to_denoise():
                with meters[index].stage("denoise"):
                    work = partial(denoise_picture, stage, text, negative, index, on_event, run)
                    recovery.run("denoise", partial(keep_picture, work, stage, request, index, run), index)
            stage.free()
            for index, latent_path in enumerate(latent_paths):
                if latent_path is not None:
                    run.keep_copy(index, latent_path)
            for index in run.to_decode():
                with meters[index].stage("decode"):
                    show = partial(write_kept, stage, run, targets[index], request, index, quality, on_event)
                    recovery.run("decode", show, index)
                    run.mark_done(index)
                plans[index] = stage.plan
    return [
        _result(target.path, spec, plans[index], seed, meters[index], run.resumed_from(index))
        for index, (target, seed) in enumerate(zip(targets, plan.seeds, strict=True))
    ]


def resume(
    run: Path, *, device: str | None = None, memory_bytes: int | None = None, on_event: OnEvent = ignore
) -> list[Result]:
    """Goes on with an unfinished run, given by its folder or by its picture's path, to the same pictures.

    Raises RunFolderError for what is no run of this version, or whose model or device is another now; BusyError where
    another process is at it; and as `generate`.
    """
    job = read_job(find_run(run))
    return generate(
        job.resumed(device, memory_bytes),
        job.output,
        save_latent=job.save_latent,
        quality=job.quality,
        on_event=on_event,
        must_go_on=True,
    )


def decode_latent(
    latent: Path,
    path: Path,
    *,
    quality: int | None = None,
    on_event: OnEvent = ignore,
    **options: Any,
) -> Result:
    """Decodes a latent that `generate` saved to a picture file, without denoising again. Raises HandscrollError.

    options: those of `handscroll decode`, such as memory='2GiB' or strip_rows=4. Left out, the model is the file's.
    """
    wanted = fields_of(Request, options, "decode")
    tensor, facts = load_latent(latent)
    request = _request_of(latent, facts, wanted)
    spec = open_checkpoint(request.model, on_progress=_on_fetch(on_event))
    request = _sized(request, tensor, spec, latent)
    situation = survey(spec, request, path, prompts=False)
    # A few-step model refuses a negative prompt, which the file may still name.
    plan = _made_as(make_plan(spec, dataclasses.replace(request, negative=""), situation, 0), facts)
    target = check_target(path, plan.width, plan.height)
    enforce(plan.device, plan.budget_bytes)
    meter = Meter(plan.device)
    with torch.inference_mode(), Stages(spec, plan, scratch=scratch_folder(path.parent)) as stage:
        recovery = Recovery(stage, situation, on_event)
        with meter.stage("decode"):
            recovery.run("decode", lambda: write_picture(stage, tensor, target, request, 0, quality, on_event))
        plan = stage.plan
    return _result(target.path, spec, plan, plan.seeds[0], meter)


def plan_of(
    request: Request, path: Path | None = None, on_event: OnEvent = ignore
) -> tuple[CheckpointSpec, Plan, int | None]:
    """What `generate` would run, where and in how much memory, and the smallest budget that would do.

    No weight is read, or fetched. Raises as `generate` does before it begins, BudgetError included.
    """
    spec = open_checkpoint(request.model, on_progress=_on_fetch(on_event), weights_too=False)
    situation = survey(spec, request, path)
    plan = make_plan(spec, request, situation, random_seed())
    return spec, plan, minimum_bytes(plan, spec, situation)


class Handscroll:
    """A checkpoint that is ready to make pictures. Its modules stay in memory between calls, unless there is a budget.

    scroll = Handscroll.from_pretrained("tiny-landscape", memory="2GiB")
    scroll("snowy mountains at dusk, a red sun", width=1024, height=1024, seed=7).save("dusk.png")
    """

    def __init__(
        self, spec: CheckpointSpec, device: str = "auto", precision: str = "auto", memory_bytes: int | None = None
    ) -> None:
        self.spec, self.device, self.precision, self.memory_bytes = spec, device, precision, memory_bytes
        self._opened: dict[str, Opened] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        device: str = "auto",
        precision: str = "auto",
        memory: str | int | None = None,
        on_event: OnEvent = ignore,
    ) -> Handscroll:
        """A model by short name, checkpoint folder or hub id, fetched first if need be.

        memory: the budget, in bytes or as '2GiB': on a CPU of the whole process, so that what it holds already counts;
        on a CUDA device of what PyTorch reserves. Raises HandscrollError.
        """
        memory_bytes = parse_bytes(memory) if isinstance(memory, str) else memory
        return cls(open_checkpoint(model, on_progress=_on_fetch(on_event)), device, precision, memory_bytes)

    def __call__(
        self,
        prompt: str,
        *,
        on_event: OnEvent = ignore,
        **options: Any,
    ) -> Picture:
        """Denoises a prompt; the rows are decoded when the picture is saved or read.

        options: those of `handscroll generate` that describe one picture, as size='1024x512' or width=1024, height=512,
        steps, guidance, negative, seed, compose, decode. Raises HandscrollError, of which BudgetError before anything
        is read.
        """
        own = {"precision": self.precision, "device": self.device, "memory": self.memory_bytes}
        request = Request.of(prompt, **own, **fields_of(Request, options, "scroll"))
        situation = survey(self.spec, request)
        plan = make_plan(self.spec, request, situation, random_seed())
        enforce(plan.device, plan.budget_bytes)
        stage = self._stages(plan)
        recovery = Recovery(stage, situation, on_event)
        with torch.inference_mode():
            text, negative_text = recovery.run("text", lambda: encode_prompts(stage, request))
            latent = recovery.run("denoise", lambda: denoise_picture(stage, text, negative_text, 0, on_event))
        if plan.budget_bytes is not None:
            stage.free()
        return Picture(stage, recovery, latent, request)

    def _stages(self, plan: Plan) -> Stages:
        stage = Stages(self.spec, plan, keep=plan.budget_bytes is None, scratch=scratch_folder(None))
        stage.opened = self._opened
        return stage


class Picture:
    """A denoised picture. Its rows are decoded each time they are asked for and never all held but by `numpy`."""

    def __init__(self, stage: Stages, recovery: Recovery, latent: Tensor, request: Request) -> None:
        self._stage, self._recovery, self.latent, self._request = stage, recovery, latent, request
        self.width, self.height = stage.plan.width, stage.plan.height
        self.seed = stage.plan.seeds[0]

    @torch.inference_mode()
    def rows(self) -> Iterator[np.ndarray]:
        """The picture from top to bottom as strips [rows, width, 3] uint8."""
        yield from decode_rows(self._stage, self.latent)

    def numpy(self) -> np.ndarray:
        """The whole picture, [height, width, 3] uint8."""
        with torch.inference_mode():
            return whole_picture(self._stage, self.latent)

    def save(self, path: str | Path, *, quality: int | None = None, on_event: OnEvent = ignore) -> Path:
        """Writes the picture row by row in the format of the path's ending.

        Raises as `check_target`, and BudgetError where that format's writer does not fit.
        """
        target = check_target(Path(path), self.width, self.height)
        stage, situation = self._stage, dataclasses.replace(self._recovery.situation, suffix=target.path.suffix)
        stage.plan = chosen_anew(stage.plan, stage.spec, situation, "decode")
        enforce(stage.plan.device, stage.plan.budget_bytes)
        with torch.inference_mode():
            self._recovery.run(
                "decode",
                lambda: write_picture(self._stage, self.latent, target, self._request, 0, quality, on_event),
            )
        return target.path


# The stages, one function each


def encode_prompts(stage: Stages, request: Request) -> tuple[Text, Text | None]:
    """The prompt's embeddings, and the negative prompt's where guidance needs them.

    The text encoder is opened only for what the cache of embeddings does not know.
    """

    @cache
    def opened() -> tuple[Any, Any]:
        return stage.text, load_tokenizer(stage.spec)

    def text_of(prompt: str, instruction: str) -> Text:
        dtype = DTYPES[stage.plan.precision.text_encoder]
        return encoded(stage.spec, prompt, instruction, dtype, opened, device=stage.plan.device)

    text = text_of(request.prompt, instruction_of(stage.spec))
    if stage.spec.is_sprint or not stage.plan.guided:
        return text, None
    return text, text_of(request.negative, "")


def denoise_picture(
    stage: Stages, text: Text, negative: Text | None, index: int, on_event: OnEvent, run: RunFolder | None = None
) -> Tensor:
    """Picture `index` of the plan: its seed's noise to its latent [1, C, h, w] fp32, by way of a run's saved states.

    A picture that grows is first made small, and each size begins from the one before.
    """
    final, latent = stage.plan, None
    precision = final.precision.transformer
    state = run.state(index, precision) if run else None

    def on_step(done: int, detail: str = "") -> None:
        on_event(Progress("denoise", done, final.total_steps, index, detail))

    on_step(0 if state is None else state.total_done)
    for number, plan in enumerate(final.sizes):
        if state is not None and plan.steps_before < state.steps_before:
            continue  # a larger size was begun already
        if state is not None and plan is not final and state.steps_done == plan.steps:
            latent, state = state.latent, None  # this one was finished
            continue
        source = None
        if latent is not None:
            on_step(plan.steps_before + plan.first_step, f"enlarging to {plan.width}x{plan.height}")
            source = grown(stage, latent, plan)
        noise, generator = starting_noise(
            stage.spec.transformer.in_channels, plan.latent_height, plan.latent_width, final.seeds[index], number
        )
        with stage.at(plan):
            job = Sampling(
                stage.dit,
                load_scheduler(stage.spec),
                noise,
                generator,
                text,
                negative,
                steps=plan.steps,
                guidance=plan.guidance,
                on_step=on_step,
                start=state,
                on_state=(lambda state: run.keep_state(index, state, precision)) if run else None,
                source=source,
                first_step=plan.first_step,
                steps_before=plan.steps_before,
            )
            latent, state = denoise(job), None
    assert latent is not None
    return latent


def keep_picture(work: Callable[[], Tensor], stage: Stages, request: Request, index: int, run: RunFolder) -> None:
    """Keeps the latent that `work` gives, picture `index` of the plan, with what it was made in."""
    latent = work()
    run.keep_latent(index, latent, _latent_facts(request, _facts(request, stage, index)))


def write_kept(
    stage: Stages, run: RunFolder, target: Target, request: Request, index: int, quality: int | None, on_event: OnEvent
) -> None:
    """Decodes a run's finished latent into its file, which says in which precision the latent was made."""
    latent, facts = run.latent_and_facts(index)
    stage.plan = _made_as(stage.plan, facts)
    write_picture(stage, latent, target, request, index, quality, on_event, run.part_for(target.final_path))


def write_picture(
    stage: Stages,
    latent: Tensor,
    target: Target,
    request: Request,
    index: int,
    quality: int | None,
    on_event: OnEvent,
    part: Path | None = None,
) -> None:
    """Decodes a latent straight into its file, strip by strip. `part` is the file's name until it is whole."""
    on_event(Progress("decode", 0, target.height, index))
    strips = decode_rows(stage, latent)
    write_image(
        target,
        strips,
        parameters_text(**_facts(request, stage, index)),
        quality=quality,
        on_rows=lambda rows: on_event(Progress("decode", rows, target.height, index)),
        part=part,
        beside=stage.plan.device.startswith("cuda"),
    )
    on_event(Progress("write", 1, 1, index))


# Small decisions


def _on_fetch(on_event: OnEvent) -> Callable[[Any], None]:
    return lambda progress: on_event(
        Progress("fetch", progress.done_bytes, progress.total_bytes, detail=progress.hub_id)
    )


def _targets(path: Path, plan: Plan) -> list[Target]:
    count = len(plan.seeds)
    return [check_target(indexed(path, index, count), plan.width, plan.height) for index in range(count)]


def _latent_targets(path: Path | None, plan: Plan) -> list[Path | None]:
    count = len(plan.seeds)
    if path is None:
        return [None] * count
    paths = [indexed(path, index, count) for index in range(count)]
    for one in paths:
        check_latent_target(one)
    return list(paths)


def _facts(request: Request, stage: Stages, index: int) -> dict[str, Any]:
    """What the file of picture `index` says about itself: the arguments of `parameters_text`."""
    spec, plan = stage.spec, stage.plan
    return {
        "prompt": request.prompt,
        "negative": request.negative,
        "steps": plan.steps,
        "sampler": spec.scheduler.class_name.removesuffix("Scheduler"),
        "guidance": plan.guidance,
        "seed": plan.seeds[index],
        "width": plan.width,
        "height": plan.height,
        "model": spec.name,
        "precision": str(plan.precision),
        "composed": plan.composed,
        "version": __version__,
        "memory_mode": plan.decode,
        "exact": plan.exact,
    }


def _made_as(plan: Plan, facts: Mapping[str, str]) -> Plan:
    """The plan that decodes a latent: what was done before the decoder is what the latent's facts say."""
    precision = plan.precision.after(facts.get("precision", ""))
    return dataclasses.replace(plan, precision=precision, composed=facts.get("composed", ""))


def _latent_facts(request: Request, facts: dict[str, Any]) -> dict[str, str]:
    """What a latent's file says about itself: all that decoding and labelling it takes, from any folder."""
    return {name: str(value) for name, value in {**facts, "model": resolved_name(request.model)}.items()}


def _request_of(
    file: Path,
    facts: dict[str, str],
    wanted: dict[str, Any],
) -> Request:
    """The request that a saved latent came from, with the fields in `wanted` as they are now asked for."""
    named = wanted.get("model") or facts.get("model")
    if named is None:
        raise CheckpointError(f"{file}: does not say which model made it; name it with --model")
    try:
        return Request(
            prompt=facts.get("prompt") or "unknown",
            negative=facts.get("negative", ""),
            width=int(facts["width"]) if "width" in facts else None,
            height=int(facts["height"]) if "height" in facts else None,
            steps=int(facts["steps"]) if "steps" in facts else None,
            guidance=float(facts["guidance"]) if "guidance" in facts else None,
            seed=int(facts.get("seed", 0)),
            **{**wanted, "model": named},
        )
    except ValueError as error:
        raise CheckpointError(f"{file}: its metadata is broken: {error}") from error


def _sized(request: Request, latent: Tensor, spec: CheckpointSpec, file: Path) -> Request:
    """The request with the picture's size, which is at most what the latent holds."""
    factor = spec.autoencoder.spatial_compression_ratio
    _, channels, rows, columns = latent.shape
    if channels != spec.autoencoder.latent_channels:
        raise CheckpointError(
            f"{file}: the latent has {channels} channels and {spec.name} decodes {spec.autoencoder.latent_channels}; "
            "name the model that made it with --model"
        )
    width, height = request.width or columns * factor, request.height or rows * factor
    patch = spec.transformer.patch_size
    if -(-width // (factor * patch)) * patch != columns or -(-height // (factor * patch)) * patch != rows:
        raise SizeError(f"{file}: the latent of {columns}x{rows} does not hold a picture of {width}x{height}")
    return dataclasses.replace(request, width=width, height=height)


def _result(
    path: Path, spec: CheckpointSpec, plan: Plan, seed: int, meter: Meter, resumed_from_step: int | None = None
) -> Result:
    planned = {name: n_bytes for name, n_bytes in plan.planned_bytes.items() if name in meter.seconds}
    stages = {
        name: {"planned_bytes": planned.get(name), "measured_bytes": meter.stage_peak_bytes.get(name)}
        for name in STAGES
        if name in meter.seconds
    }
    seconds = {name: round(meter.seconds[name], 3) for name in STAGES if name in meter.seconds}
    return Result(
        path=path,
        width=plan.width,
        height=plan.height,
        seed=seed,
        steps=plan.steps,
        guidance=plan.guidance,
        model=spec.name,
        precision=str(plan.precision),
        decode=plan.decode,
        exact=plan.exact,
        composed=plan.composed,
        memory={
            "budget_bytes": plan.budget_bytes,
            "planned_peak_bytes": max(planned.values(), default=None) if plan.decode == "rows" else None,
            "measured_peak_bytes": meter.peak_bytes,
            "stages": stages,
        },
        seconds={**seconds, "total": round(sum(seconds.values()), 3)},
        note=plan.precision.note,
        resumed_from_step=resumed_from_step,
    )
