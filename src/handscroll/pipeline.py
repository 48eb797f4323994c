"""The way from a prompt to a picture file: text -> latent -> rows -> file, one stage in memory at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handscroll.events import OnEvent, Progress, ignore
from handscroll.jobs.job import Job, find_run, read_job
from handscroll.jobs.latent_file import check_latent_target, load_latent, request_of_latent, with_size_of
from handscroll.jobs.recovery import Recovery
from handscroll.jobs.result import Result, latent_facts, made_as, picture_facts
from handscroll.jobs.store import RunFolder
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.opening import on_fetch, open_checkpoint
from handscroll.options import fields_of
from handscroll.pictures.metadata import parameters_text
from handscroll.pictures.targets import Target, check_target
from handscroll.pictures.writing import write_image
from handscroll.plan.plan import Plan
from handscroll.plan.search import make_plan, minimum_bytes
from handscroll.plan.stages import DECODE, DENOISE, TEXT
from handscroll.request import Request, indexed, random_seed
from handscroll.runtime.decode import decode_rows
from handscroll.runtime.denoise import denoise_picture
from handscroll.runtime.device import scratch_folder
from handscroll.runtime.memory import Meter
from handscroll.runtime.probe import probe
from handscroll.runtime.session import Session
from handscroll.runtime.settings import job_settings
from handscroll.runtime.text import Texts, encode_prompts


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
    spec = open_checkpoint(request.model, request.revision, on_progress=on_fetch(on_event))
    inputs = probe(spec, request, path)
    plan = make_plan(spec, request, inputs, random_seed())
    targets = _targets(path, plan)
    latent_paths = _latent_targets(save_latent, plan)
    meter = Meter(plan.device)
    job = Job.of(request, spec, plan, path, save_latent, quality)

    with (
        job_settings(plan.device, plan.budget_bytes),
        torch.inference_mode(),
        RunFolder.open(job, on_event, must_go_on=must_go_on) as run,
        Session(spec, scratch=scratch_folder(run.folder)) as session,
    ):
        plan = dataclasses.replace(plan, seeds=run.seeds)
        plans = [plan] * len(plan.seeds)
        recovery = Recovery(session, inputs, plan.precision, on_event)
        if run.to_denoise():
            with meter.stage(TEXT.name):
                texts, plan = encode_stage(recovery, plan, request)
            session.free()  # here, so that no stage is measured with the one before
        meters = [meter.fork() for _ in plan.seeds]
        for index in run.to_denoise():
            with meters[index].stage(DENOISE.name):
                plan = denoise_stage(recovery, plan, request, texts, index, run)
        session.free()
        for index, latent_path in enumerate(latent_paths):
            if latent_path is not None:
                run.keep_copy(index, latent_path)
        for index in run.to_decode():
            with meters[index].stage(DECODE.name):
                plan, plans[index] = decode_stage(recovery, plan, request, index, run, targets[index], quality)
                run.mark_done(index)
    return [
        Result.of(target.path, spec, plans[index], meters[index], index, run.resumed_from(index))
        for index, target in enumerate(targets)
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
    latent: Path, path: Path, *, quality: int | None = None, on_event: OnEvent = ignore, **options: Any
) -> Result:
    """Decodes a latent that `generate` saved to a picture file, without denoising again.

    options: those of `handscroll decode`, as memory='1GiB', strip_rows=4. Left out, the model is the file's. Raises
    HandscrollError.
    """
    wanted = fields_of(Request, options, "decode")
    tensor, facts = load_latent(latent)
    request = request_of_latent(latent, facts, wanted)
    spec = open_checkpoint(request.model, request.revision, on_progress=on_fetch(on_event))
    request = with_size_of(latent, tensor, request, spec)
    inputs = probe(spec, request, path, prompts=False)
    # A few-step model refuses a negative prompt, which the file may still name.
    plan = make_plan(spec, dataclasses.replace(request, negative=""), inputs, 0)
    target = check_target(path, plan.width, plan.height)
    meter = Meter(plan.device)
    with (
        job_settings(plan.device, plan.budget_bytes),
        torch.inference_mode(),
        Session(spec, scratch=scratch_folder(path.parent)) as session,
    ):
        recovery = Recovery(session, inputs, plan.precision, on_event)
        with meter.stage(DECODE.name):
            for attempt in recovery.attempts(DECODE, plan):
                with attempt:
                    plan = made_as(attempt.plan, facts)
                    write_picture(session, plan, tensor, request, target, 0, quality, on_event)
    return Result.of(target.path, spec, plan, meter)


def plan_of(
    request: Request, path: Path | None = None, on_event: OnEvent = ignore
) -> tuple[CheckpointSpec, Plan, int | None]:
    """What `generate` would run, where and in how much memory, and the smallest budget that would do.

    No weight is read, or fetched. Raises as `generate` does before it begins, BudgetError included.
    """
    spec = open_checkpoint(request.model, request.revision, on_progress=on_fetch(on_event), weights_too=False)
    inputs = probe(spec, request, path)
    plan = make_plan(spec, request, inputs, random_seed())
    return spec, plan, minimum_bytes(plan, spec, inputs)


# The stages, one function each. Each tries until it succeeds, and gives the plan that goes on from there.


def encode_stage(recovery: Recovery, plan: Plan, request: Request) -> tuple[Texts, Plan]:
    """The prompts' embeddings."""
    for attempt in recovery.attempts(TEXT, plan):
        with attempt:
            texts = encode_prompts(recovery.session, attempt.plan, request, recovery.on_event)
    return texts, attempt.plan


def denoise_stage(recovery: Recovery, plan: Plan, request: Request, texts: Texts, index: int, run: RunFolder) -> Plan:
    """Picture `index` of the plan becomes a latent, which the run keeps with what it was made in."""
    session, on_event = recovery.session, recovery.on_event
    for attempt in recovery.attempts(DENOISE, plan, index):
        with attempt:
            latent = denoise_picture(session, attempt.plan, texts, index, on_event, run.states(index))
            run.keep_latent(index, latent, latent_facts(request, session.spec, attempt.plan, index))
    return attempt.plan


def decode_stage(
    recovery: Recovery,
    plan: Plan,
    request: Request,
    index: int,
    run: RunFolder,
    target: Target,
    quality: int | None,
) -> tuple[Plan, Plan]:
    """A run's finished latent becomes its file. The second plan is the one that the file was made by."""
    for attempt in recovery.attempts(DECODE, plan, index):
        with attempt:
            latent, facts = run.latent_and_facts(index)
            made = made_as(attempt.plan, facts)
            part = run.part_for(target.final_path)
            write_picture(recovery.session, made, latent, request, target, index, quality, recovery.on_event, part)
    return attempt.plan, made


def write_picture(
    session: Session,
    plan: Plan,
    latent: Tensor,
    request: Request,
    target: Target,
    index: int,
    quality: int | None,
    on_event: OnEvent,
    part: Path | None = None,
) -> None:
    """Decodes a latent straight into its file, row block by row block. `part` is the file's name until it is whole."""
    on_event(Progress(DECODE.name, 0, target.height, index))
    write_image(
        target,
        decode_rows(session, plan, latent),
        parameters_text(**picture_facts(request, session.spec, plan, index)),
        quality=quality,
        on_rows=lambda rows: on_event(Progress(DECODE.name, rows, target.height, index)),
        part=part,
        beside=plan.device.startswith("cuda"),
    )
    on_event(Progress("write", 1, 1, index))


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
