"""The way from a prompt to a picture file: text -> latent -> rows -> file, one stage in memory at a time."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handscroll.errors import RunFolderError
from handscroll.events import OnEvent, Progress, ignore, listener, notice, pulse
from handscroll.files import as_path
from handscroll.jobs.folder import check_plain
from handscroll.jobs.job import Job, find_run, read_job
from handscroll.jobs.latent_file import (
    check_is_latent,
    check_latent_target,
    facts_of_latent,
    how_read,
    load_latent,
    request_of_latent,
    with_size_of,
)
from handscroll.jobs.recovery import Recovery
from handscroll.jobs.result import Facts, Result, decoded_facts, latent_facts, made_as, picture_facts
from handscroll.jobs.store import RunFolder
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.opening import check_nothing_is_fetched, on_fetch, open_checkpoint
from handscroll.options import fields_of
from handscroll.pictures.formats import check_quality
from handscroll.pictures.metadata import not_in_file, parameters_text
from handscroll.pictures.targets import Target, check_format, check_target
from handscroll.pictures.writing import write_image
from handscroll.plan.communication import Link, Shared
from handscroll.plan.inputs import PlanInputs
from handscroll.plan.plan import Plan
from handscroll.plan.search import SmallerWeights, make_plan, minimum_bytes, with_smaller_weights
from handscroll.plan.stages import DECODE, DENOISE, TEXT
from handscroll.plan.unused import uses_negative
from handscroll.request import Request, as_request, count_devices, device_of_rank, indexed, random_seed
from handscroll.runtime.decode import DecodeProgress, decode_rows
from handscroll.runtime.denoise import denoise_picture
from handscroll.runtime.device import find_hardware, scratch_folder
from handscroll.runtime.distributed.beating import OnFailure, end_process
from handscroll.runtime.distributed.following import do_as_told
from handscroll.runtime.distributed.joining import joined, leading, of_this_process
from handscroll.runtime.keeping import Keeping
from handscroll.runtime.memory import Meter
from handscroll.runtime.probe import probe
from handscroll.runtime.session import Session
from handscroll.runtime.settings import job_settings
from handscroll.runtime.text import Texts, encode_prompts


def generate(
    request: Request,
    path: str | Path,
    *,
    save_latent: str | Path | None = None,
    quality: int | None = None,
    on_event: OnEvent = ignore,
    on_failure: OnFailure = end_process,
    processes: int = 1,
    keeping: Keeping | None = None,
) -> list[Result]:
    """Makes the pictures of a request and writes them to `path` (`name-1.png`, ... for more than one).

    Whatever can be refused is refused before a weight is read. What is finished is kept in a run folder beside `path`
    until the pictures are written: the same request goes on from there, another starts over.
    Seconds and memory in the results are this session's. processes: how many like this one share the machine's memory.
    keeping: what this process keeps for its next call. Raises HandscrollError, and what `on_event` raises.

    In a process that is one of several, as torchrun starts them, the first makes the pictures so, and all others
    `follow`; on_failure is called, and must end the process, when one of them has ended or does not answer.
    """
    request, on_event = as_request(request), listener(on_event)
    path, quality = as_path("path", path), check_quality(quality)
    save_latent = None if save_latent is None else as_path("save_latent", save_latent)
    spec = open_checkpoint(request.model, request.revision, on_progress=on_fetch(on_event))
    return _made(request, spec, path, save_latent, quality, on_event, on_failure, processes=processes, keeping=keeping)


def follow(request: Request, on_failure: OnFailure = end_process) -> None:
    """As one of several processes but the first, makes bands of the pictures that the first one makes. Of the request
    the model and the device are used. Raises HandscrollError; on_failure as in `generate`.
    """
    spec = open_checkpoint(request.model, request.revision)
    folder = scratch_folder(None) or Path(tempfile.gettempdir())
    hardware = find_hardware(of_this_process(request).device, folder)
    with joined(spec, hardware, on_failure) as found:
        do_as_told(found.team, spec)


def _made(
    request: Request,
    spec: CheckpointSpec,
    path: Path,
    save_latent: Path | None,
    quality: int | None,
    on_event: OnEvent,
    on_failure: OnFailure,
    *,
    processes: int = 1,
    keeping: Keeping | None = None,
    must_go_on: bool = False,
) -> list[Result]:
    """`generate` by a model that is there, alone or as the first of several. `must_go_on` refuses to start over."""
    request = of_this_process(request)
    keeps = keeping is not None and request.memory_bytes is None
    keeping = keeping or Keeping()
    with (
        keeping.job(probe(spec, request, path, processes=processes), keeps=keeps) as own_inputs,
        leading(spec, own_inputs, on_failure) as (ranks, inputs),
    ):
        plan = make_plan(spec, request, inputs, random_seed())
        targets = _targets(path, plan)
        latent_paths = _latent_targets(save_latent, plan)
        plan = _told(plan, not_in_file(path.suffix, quality, picture_facts(request, spec, plan, 0)), on_event)
        meter = Meter(plan.device)
        asked = request if ranks is None else dataclasses.replace(request, device="auto")  # each has its own
        job = Job.of(asked, spec, plan, path, save_latent, quality)
        team = None if ranks is None else ranks.team
        with (
            job_settings(plan.device, plan.budget_bytes),
            torch.inference_mode(),
            RunFolder.open(job, on_event, must_go_on=must_go_on) as run,
            keeping.opened(spec, plan, scratch_folder(run.folder), on_event, team) as session,
        ):
            plan = dataclasses.replace(plan, seeds=run.seeds)
            plans = [plan] * len(plan.seeds)
            recovery = Recovery(session, inputs, plan.precision, on_event)
            if run.to_denoise():
                with meter.stage(TEXT.name):
                    texts, plan = encode_stage(recovery, plan, request)
                session.free_but(plan.kept)  # here, so that no stage is measured with the one before
            meters = [meter.fork() for _ in plan.seeds]
            for index in run.to_denoise():
                with meters[index].stage(DENOISE.name):
                    plan = denoise_stage(recovery, plan, request, texts, index, run)
            session.free_but(plan.kept)
            for index, latent_path in enumerate(latent_paths):
                if latent_path is not None:
                    run.keep_copy(index, latent_path)
            for index in run.to_decode():
                with meters[index].stage(DECODE.name):
                    plan, plans[index] = decode_stage(recovery, plan, request, index, run, targets[index], quality)
                    run.mark_done(index)
        of_ranks = None if ranks is None else ranks.measured([each.stage_peak_bytes for each in meters])
    facts = [picture_facts(request, spec, made, index) for index, made in enumerate(plans)]
    return [
        Result.of(target.path, spec, plans[index], meters[index], facts[index], run.resumed_from(index), of_ranks)
        for index, target in enumerate(targets)
    ]


def resume(
    run: str | Path,
    *,
    model: str | None = None,
    save_latent: str | Path | None = None,
    device: str | None = None,
    devices: str | None = None,
    memory_bytes: int | None = None,
    fetch: bool = False,
    on_event: OnEvent = ignore,
    on_failure: OnFailure = end_process,
) -> list[Result]:
    """Goes on with an unfinished run, given by its folder or by its picture's path, to the same pictures.

    A run folder may come from anybody. What it writes lies beside it: a latent that was kept elsewhere wants
    `save_latent` again, and nothing but an older latent is replaced by one. A model that is not on this machine is
    fetched only where it is named as `model`, or with `fetch`.

    Raises RunFolderError for what is no run of this version, or whose model or device is another now; BusyError where
    another process is at it; UnconfirmedFetchError; and as `generate`.
    """
    on_event = listener(on_event)
    save_latent = None if save_latent is None else as_path("save_latent", save_latent)
    folder = find_run(as_path("run", run))
    check_plain(folder)
    job = read_job(folder)
    request = job.resumed(device, memory_bytes, model, devices)
    save_latent = save_latent or _latent_of(folder, job)
    if model is None:
        _check_fetch(folder / "job.json", request, fetch)
    spec = open_checkpoint(request.model, request.revision, on_progress=on_fetch(on_event))
    return _made(request, spec, job.output, save_latent, job.quality, on_event, on_failure, must_go_on=True)


def _check_fetch(file: Path, request: Request, fetch: bool) -> None:
    """Raises UnconfirmedFetchError where the model of a request, which a file names, would be fetched without leave."""
    if not fetch:
        check_nothing_is_fetched(request.model, request.revision, file)


def _latent_of(folder: Path, job: Job) -> Path | None:
    """Where a run folder may put its latent. Raises RunFolderError and OutputError."""
    if job.save_latent is None:
        return None
    if job.save_latent.parent.resolve() != job.output.parent.resolve():
        raise RunFolderError(
            f"{folder}: keeps its latent at {job.save_latent}, which is not beside the picture; name that file again "
            "with --save-latent (in Python: save_latent=...), or run the same `handscroll generate` again"
        )
    for index in range(job.request.count):
        check_is_latent(indexed(job.save_latent, index, job.request.count))
    return job.save_latent


def decode_latent(
    latent: str | Path,
    path: str | Path,
    *,
    quality: int | None = None,
    fetch: bool = False,
    on_event: OnEvent = ignore,
    **options: Any,
) -> Result:
    """Decodes a latent that `generate` or another tool saved to a picture file, without denoising again.

    What the latent's file does not say of how it was made is said nowhere. options: those of `handscroll decode`, as
    memory='1GiB', strip_rows=4. Left out, the model is the file's; where that is not on this machine, it is fetched
    only with `fetch`. Raises HandscrollError, of which UnconfirmedFetchError.
    """
    wanted = fields_of(Request, options, "decode")
    latent, path, quality = as_path("latent", latent), as_path("path", path), check_quality(quality)
    on_event = listener(on_event)
    facts = facts_of_latent(latent)
    request = request_of_latent(latent, facts, wanted)
    if "model" not in wanted:
        _check_fetch(latent, request, fetch)
    spec = open_checkpoint(request.model, request.revision, on_progress=on_fetch(on_event))
    tensor, _ = load_latent(latent, spec.autoencoder)
    request = with_size_of(latent, tensor, request, spec)
    inputs = probe(spec, request, path, prompts=False)
    plan = make_plan(spec, request, inputs, 0)
    target = check_target(path, plan.width, plan.height)
    of_file = not_in_file(path.suffix, quality, decoded_facts(facts, request, spec, made_as(plan, facts)))
    plan = _told(plan, (*how_read(latent, spec.autoencoder), *of_file), on_event)
    meter = Meter(plan.device)
    with (
        job_settings(plan.device, plan.budget_bytes),
        torch.inference_mode(),
        Session(spec, scratch=scratch_folder(path.parent), on_event=on_event) as session,
    ):
        recovery = Recovery(session, inputs, plan.precision, on_event)
        with meter.stage(DECODE.name):
            for attempt in recovery.attempts(DECODE, plan):
                with attempt:
                    plan = made_as(attempt.plan, facts)
                    made = decoded_facts(facts, request, spec, plan)
                    write_picture(session, plan, tensor, made, target, 0, quality, recovery.on_event)
    return Result.of(target.path, spec, plan, meter, made)


def plan_of(
    request: Request, path: str | Path | None = None, on_event: OnEvent = ignore
) -> tuple[CheckpointSpec, Plan, int | None]:
    """What `generate` would run, where and in how much memory, and the smallest budget that would do.

    No weight is read, or fetched. Raises as `generate` does before it begins, BudgetError included.
    """
    spec, plan, inputs, _ = _planned(request, path, on_event)
    return spec, plan, minimum_bytes(plan, spec, inputs)


def plans_of(
    request: Request, path: str | Path | None = None, on_event: OnEvent = ignore, link: Link | None = None
) -> tuple[CheckpointSpec, Plan, int | None, list[SmallerWeights], Shared]:
    """As `plan_of`, what it would take with smaller weights, and what several devices do of it, joined by `link`."""
    spec, plan, inputs, request = _planned(request, path, on_event)
    smaller = list(with_smaller_weights(plan, spec, inputs, request))
    shared = Shared()
    if plan.ranks > 1:
        tokens = [inputs.tokens or 1]
        if uses_negative(spec, plan):
            negative = inputs.negative_read
            tokens.append(1 if negative is None else negative.read + 1)
        shared = Shared.of(plan, spec, tokens, inputs.hardware.rates, link or Link())
    return spec, plan, minimum_bytes(plan, spec, inputs), smaller, shared


def _planned(
    request: Request, path: str | Path | None, on_event: OnEvent
) -> tuple[CheckpointSpec, Plan, PlanInputs, Request]:
    request, on_event = as_request(request), listener(on_event)
    output = None if path is None else as_path("path", path)
    spec = open_checkpoint(request.model, request.revision, on_progress=on_fetch(on_event), weights_too=False)
    devices = request.devices
    if devices is not None:
        request = dataclasses.replace(request, device=device_of_rank(devices, 0), devices=None)
    inputs = probe(spec, request, output)
    if devices is not None:
        ranks = count_devices(devices)
        inputs = dataclasses.replace(inputs, ranks=ranks, hardware=inputs.hardware.shared(ranks))
    plan = _told(make_plan(spec, request, inputs, random_seed()), (), on_event)
    if output is not None:
        check_format(output, plan.width, plan.height)
    return spec, plan, inputs, request


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
            own = picture_facts(request, recovery.session.spec, made, index)
            write_picture(recovery.session, made, latent, own, target, index, quality, recovery.on_event, part)
    return attempt.plan, made


def write_picture(
    session: Session,
    plan: Plan,
    latent: Tensor,
    facts: Facts,
    target: Target,
    index: int,
    quality: int | None,
    on_event: OnEvent,
    part: Path | None = None,
) -> None:
    """Decodes a latent straight into its file, row block by row block.

    facts: what the file says of itself, by the arguments of `parameters_text`. part: its name until it is whole.
    """
    told = DecodeProgress(on_event, plan, index)
    write_image(
        target,
        decode_rows(session, plan, latent, told.on_sweep_rows),
        parameters_text(**facts),
        quality=quality,
        on_rows=told.on_rows,
        on_wait=lambda: on_event(pulse("write", index)),
        part=part,
        beside=plan.device.startswith("cuda"),
    )
    on_event(Progress("write", 1, 1, index))


def _told(plan: Plan, more: tuple[str, ...], on_event: OnEvent) -> Plan:
    """The plan with more notices, once the listener has been told of all of them."""
    plan = dataclasses.replace(plan, notices=plan.notices + more)
    for line in plan.notices:
        on_event(notice(line))
    return plan


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
