"""Memory that runs out and numbers that overflow, wherever they may: the same picture, one line each, nothing lost."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from handscroll import Request, decode_latent, generate, pipeline
from handscroll.cli import main as cli
from handscroll.errors import NumericsError, OutOfMemoryError, is_out_of_memory
from handscroll.events import Progress, ignore
from handscroll.jobs import recovery
from handscroll.jobs.latent_file import load_latent
from handscroll.jobs.recovery import Recovery
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.pictures.metadata import read_parameters
from handscroll.plan.inputs import MIB, Hardware, PlanInputs
from handscroll.plan.search import make_plan
from handscroll.plan.stages import BY_NAME, DECODE, DENOISE
from handscroll.runtime import denoise
from handscroll.runtime.probe import probe
from handscroll.runtime.sampling.loop import denoise as denoise_steps
from handscroll.runtime.session import Session
from live_bytes import LiveBytes

Miniature = Callable[..., Path]
BUILTIN = Path(__file__).parents[2] / "src" / "handscroll" / "builtin" / "tiny-landscape"
NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes"
)
NOTICE = re.compile(
    r"out of memory while (reading the prompt|denoising|decoding) \([^\n]*\); trying again( within \d+ MiB)?"
)
ERRORS: dict[str, Callable[[], BaseException]] = {
    "torch's on a CPU": lambda: RuntimeError(NO_MEMORY),
    "Python's": MemoryError,
    "torch's on a device": lambda: torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB"),
}


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HANDSCROLL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(recovery, "WAIT_SECONDS", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Failing(LiveBytes):
    """Raises in place of PyTorch's operations number `first` ... `last`, and measures what is alive.

    They are counted from 0. Views do not count: they take no memory.
    """

    def __init__(self, first: int = -1, last: int = -1, error: Callable[[], BaseException] = MemoryError) -> None:
        super().__init__()
        self.first, self.last, self.error, self.operations = first, last, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_view(func):
            return super().__torch_dispatch__(func, types, args, kwargs)
        number = self.operations
        self.operations += 1
        if self.first <= number <= self.last:
            raise self.error()
        return super().__torch_dispatch__(func, types, args, kwargs)


def _is_view(func: Any) -> bool:
    if func.overloadpacket.__name__ in ("contiguous", "reshape", "flatten", "to"):
        return False  # they are views where they can, and copies where they cannot
    given = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in given)


@dataclass
class Job:
    """A small picture, and how it looks when nothing goes wrong."""

    request: Request
    folder: Path
    expected: bytes = b""

    def make(self, failing: Failing) -> tuple[bytes, list[str], list[int]]:
        """The picture's bytes, the notices, and what was alive at each of them."""
        lines, alive = [], []

        def listen(event: Progress) -> None:
            if event.stage == "notice":
                lines.append(event.detail)
                alive.append(failing.now_bytes)

        path = self.folder / "p.png"
        with failing:
            generate(self.request, path, on_event=listen)
        data = path.read_bytes()
        path.unlink()
        assert list(self.folder.iterdir()) == []
        return data, lines, alive


@pytest.fixture
def job(miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    layers = {"decoder_layers_per_block": (1, 1, 1, 1, 1, 1)}
    model = miniature("1.6b", autoencoder=layers)
    request = Request("a lake", model=str(model), width=32, height=32, steps=1, guidance=1.0, seed=3, strip_rows=8)
    inputs = probe(CheckpointSpec.from_folder(model), request, tmp_path)
    monkeypatch.setattr(pipeline, "probe", lambda *_, **__: inputs)  # a machine that is always the same
    (tmp_path / "pictures").mkdir()
    made = Job(request, tmp_path / "pictures")
    made.make(Failing())  # keeps the prompt's embeddings
    made.expected, lines, _ = made.make(Failing())
    assert lines == []
    return made


def check_survives(job: Job, number: int, error: Callable[[], BaseException]) -> None:
    data, lines, alive = job.make(Failing(number, number, error))
    assert data == job.expected, f"operation {number} changed the picture"
    if not lines:
        return  # the prompt's embeddings could not be read from the cache, and were made again
    assert len(lines) == 1, f"operation {number}: {lines}"
    assert re.fullmatch(
        r"out of memory while (reading the prompt|denoising|decoding) \([^\n]*\); trying again( within \d+ MiB)?",
        lines[0],
    )
    assert alive == [0], f"operation {number}: {alive} bytes of the failed try are alive"


@pytest.mark.thorough
def test_memory_that_runs_out_at_one_operation_changes_nothing(job: Job) -> None:
    counting = Failing()
    job.make(counting)
    assert counting.operations > 200
    kinds = itertools.cycle(ERRORS.values())
    for number in range(5, counting.operations, counting.operations // 20 + 1):
        check_survives(job, number, next(kinds))


@pytest.mark.thorough
def test_memory_that_runs_out_while_a_picture_grows_changes_nothing(job: Job) -> None:
    job.request = dataclasses.replace(job.request, width=128, height=64, steps=2, compose_px=64, strip_rows=None)
    assert pipeline.plan_of(job.request)[1].smaller is not None
    job.expected = job.make(Failing())[0]
    counting = Failing()
    job.make(counting)
    kinds = itertools.cycle(ERRORS.values())
    for number in range(7, counting.operations, counting.operations // 8 + 1):
        check_survives(job, number, next(kinds))


@pytest.mark.slow
def test_memory_that_runs_out_at_any_operation_changes_nothing(job: Job) -> None:
    counting = Failing()
    job.make(counting)
    kinds = itertools.cycle(ERRORS.values())
    for number in range(counting.operations):
        check_survives(job, number, next(kinds))
    print(f"{counting.operations} operations")


def test_memory_that_stays_out_ends_the_run_and_keeps_its_latent(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = Failing(error=lambda: RuntimeError(NO_MEMORY))
    real = pipeline.write_picture

    def write_picture(*arguments: Any) -> None:
        failing.first, failing.last = 0, 2**62  # no decoder finds any
        try:
            real(*arguments)
        finally:
            failing.first = failing.last = -1

    monkeypatch.setattr(pipeline, "write_picture", write_picture)
    monkeypatch.chdir(job.folder)
    request = job.request
    options = f"--model {request.model} --size 32 --steps 1 --guidance 1 --seed 3 --strip-rows 8 -o p.png"
    with failing:
        assert cli.run(["generate", "a lake", *options.split()]) == 1
    *notes, last = capsys.readouterr().err.splitlines()
    assert len(notes) >= 2
    assert all(NOTICE.fullmatch(line.removeprefix("note: ")) for line in notes)
    assert re.match(r"error: out of memory while decoding, which takes the least already: .*; `handscroll resume", last)
    assert [path.name for path in job.folder.iterdir()] == ["p.png.run"]
    (latent,) = (job.folder / "p.png.run").glob("*latent*")
    assert torch.isfinite(load_latent(latent)[0]).all()
    monkeypatch.setattr(pipeline, "write_picture", real)
    assert cli.run(["resume", "p.png.run", "--quiet"]) == 0
    assert (job.folder / "p.png").read_bytes() == job.expected


@pytest.mark.parametrize("stage", ["denoise", "decode"])
def test_every_try_takes_less_until_none_can(stage: str) -> None:
    spec = CheckpointSpec.from_folder(BUILTIN)
    inputs = PlanInputs(Hardware("cpu", base_bytes=300 * MIB), tokens=50)
    plan = make_plan(spec, Request("a lake", width=8192, height=8192, seed=0), inputs, 0)
    events: list[Progress] = []
    tries: list[int] = []

    def work(session: Session) -> None:
        for attempt in Recovery(session, inputs, plan.precision, events.append).attempts(BY_NAME[stage], plan):
            with attempt:
                # Where the largest part cannot shrink any more, the others still can.
                tries.append(sum(part.peak_bytes for part in attempt.plan.parts[stage]))
                raise MemoryError

    with Session(spec) as session, pytest.raises(OutOfMemoryError, match="the least already"):
        work(session)
    shrinking = tries[: len(tries) - recovery.LAST_TRIES + 1]
    assert len(shrinking) > 2
    assert shrinking == sorted(set(shrinking), reverse=True)
    assert set(tries[len(shrinking) :]) == {shrinking[-1]}
    assert len(events) == len(tries) - 1, "a line for every other try, and none for one that is not made"
    assert all(event.stage == "notice" and NOTICE.fullmatch(event.detail) for event in events)


def test_what_is_no_lack_of_memory_is_not_tried_again() -> None:
    spec = CheckpointSpec.from_folder(BUILTIN)
    inputs = PlanInputs(Hardware("cpu"), tokens=50)
    tries: list[None] = []
    plan = make_plan(spec, Request("a lake"), inputs, 0)

    def work(session: Session) -> None:
        for attempt in Recovery(session, inputs, plan.precision, ignore).attempts(DECODE, plan):
            with attempt:
                tries.append(None)
                raise RuntimeError("shapes do not match")

    with Session(spec) as session, pytest.raises(RuntimeError, match="shapes"):
        work(session)
    assert len(tries) == 1


# Numbers that are not finite. Finite in fp32 and infinite in less is 3.4e38 in bf16, 1e5 in fp16; it meets a zero,
# which fp32 makes zero again, and half precision no number.

FRAGILE = {
    "text": (
        "text_encoder/model",
        {"layers.0.pre_feedforward_layernorm.weight": -1.0},
        "layers.0.mlp.gate_proj.weight",
    ),
    "denoise": (
        "transformer/diffusion_pytorch_model",
        {"caption_norm.weight": 0.0},
        "transformer_blocks.0.attn2.to_v.weight",
    ),
    "decode": (
        "vae/diffusion_pytorch_model",
        {"decoder.norm_out.weight": 0.0, "decoder.norm_out.bias": 0.0},
        "decoder.conv_out.weight",
    ),
}
LINES = {
    "text": "the text encoder gave numbers that are not finite: reading the prompt again in fp32",
    "denoise": "the transformer gave numbers that are not finite: denoising again in fp32",
    "decode": "the autoencoder gave numbers that are not finite: decoding again in fp32",
}


def fragile(folder: Path, stage: str, large: float) -> Path:
    """Gives a checkpoint a zero in one stage, and a weight so large that it is met with."""
    file, zeros, weight = FRAGILE[stage]
    path = folder / f"{file}.safetensors"
    tensors = load_file(path)
    for name, value in zeros.items():
        tensors[name][0] = value
    centre = tensors[weight][0, 0]
    (centre if centre.ndim == 0 else centre[1, 1]).fill_(large)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def notices(lines: list[str]) -> Callable[[Progress], None]:
    return lambda event: lines.append(event.detail) if event.stage == "notice" else None


def mixed(stage: str, half: str) -> str:
    """How a picture's precision reads whose one stage was in fp32."""
    names = {"text": "text encoder", "denoise": "transformer", "decode": "autoencoder"}
    precisions = {each: half if each == "denoise" else "bf16" for each in names}
    return ", ".join(f"{name} {'fp32' if each == stage else precisions[each]}" for each, name in names.items())


@pytest.mark.parametrize(
    ("stage", "half"), [("text", "bf16"), ("denoise", "bf16"), ("denoise", "fp16"), ("decode", "bf16")]
)
def test_numbers_that_overflow_in_half_precision_are_made_in_fp32(
    miniature: Miniature, tmp_path: Path, stage: str, half: str
) -> None:
    folder = Path(shutil.copytree(miniature("1.6b"), tmp_path / "model"))
    fragile(folder, stage, 1e5 if half == "fp16" else 3.4e38)
    lines: list[str] = []
    request = Request("a lake", model=str(folder), width=64, height=64, steps=2, seed=3, precision=cast(Any, half))
    (result,) = generate(
        request,
        tmp_path / "p.png",
        on_event=lambda event: lines.append(event.detail) if event.stage == "notice" else None,
    )
    assert lines[-1] == LINES[stage]
    assert len(lines) == (2 if half == "fp16" else 1), "fp16 is for the transformer alone, which is told"
    assert result.precision == mixed(stage, half)
    assert mixed(stage, half) in read_parameters(tmp_path / "p.png")
    assert not (tmp_path / "p.png.run").exists()
    kept = list((tmp_path / "cache" / "text").rglob("*.safetensors"))
    assert kept
    for file in kept:
        assert torch.isfinite(load_file(file)["embeddings"].float()).all()


def test_an_autoencoder_that_overflows_while_a_picture_grows_is_the_one_that_goes_to_fp32(
    miniature: Miniature, tmp_path: Path
) -> None:
    folder = fragile(Path(shutil.copytree(miniature("1.6b"), tmp_path / "model")), "decode", 3.4e38)
    lines: list[str] = []
    request = Request(
        "a lake", model=str(folder), width=128, height=128, steps=5, seed=3, precision="bf16", compose_px=64
    )
    (result,) = generate(request, tmp_path / "p.png", on_event=notices(lines))
    growing = LINES["decode"].replace("decoding", "denoising")
    assert lines == [growing, LINES["decode"]]
    assert result.precision == mixed("decode", "bf16")


def test_a_file_says_how_its_latent_was_made_also_in_another_session(miniature: Miniature, tmp_path: Path) -> None:
    folder = fragile(Path(shutil.copytree(miniature("1.6b"), tmp_path / "model")), "denoise", 3.4e38)

    def stop(event: Progress) -> None:
        if event.stage == "decode":
            raise KeyboardInterrupt

    request = Request("a lake", model=str(folder), width=32, height=32, steps=1, seed=3, precision="bf16")
    with pytest.raises(KeyboardInterrupt):
        generate(request, tmp_path / "p.png", save_latent=tmp_path / "p.safetensors", on_event=stop)
    (result,) = generate(request, tmp_path / "p.png", save_latent=tmp_path / "p.safetensors")
    assert result.resumed_from_step == 1
    assert result.precision == mixed("denoise", "bf16")
    assert mixed("denoise", "bf16") in read_parameters(tmp_path / "p.png")
    again = decode_latent(tmp_path / "p.safetensors", tmp_path / "again.png", precision="fp32")
    assert again.precision == "text encoder bf16, transformer fp32, autoencoder fp32"


def test_each_of_several_files_says_how_it_was_made(
    miniature: Miniature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def overflow_once(job: Any) -> torch.Tensor:
        calls.append(job)
        if len(calls) == 2:
            raise NumericsError("the transformer gave numbers that are not finite")
        return denoise_steps(job)

    monkeypatch.setattr(denoise, "denoise", overflow_once)
    request = Request("a lake", model=str(miniature()), width=32, height=32, steps=1, seed=3, count=2, precision="bf16")
    first, second = generate(request, tmp_path / "p.png")
    assert (first.precision, second.precision) == ("bf16", mixed("denoise", "bf16"))
    assert "Precision: bf16" in read_parameters(first.path)
    assert mixed("denoise", "bf16") in read_parameters(second.path)


@pytest.mark.parametrize("stage", FRAGILE)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_numbers_that_fp32_cannot_hold_either_end_the_run(
    miniature: Miniature, tmp_path: Path, stage: str, precision: str
) -> None:
    folder = fragile(Path(shutil.copytree(miniature("1.6b"), tmp_path / "model")), stage, float("inf"))
    lines: list[str] = []
    request = Request("a lake", model=str(folder), width=64, height=64, steps=1, seed=3, precision=cast(Any, precision))
    with pytest.raises(NumericsError) as failed:
        generate(request, tmp_path / "p.png", on_event=notices(lines))
    file, _, weight = FRAGILE[stage]
    assert f"{file}.safetensors: the tensor {weight} holds numbers that are not finite" in str(failed.value)
    assert failed.value.exit_code == 1
    assert lines == []  # trying again in fp32 would not help
    assert not (tmp_path / "p.png").exists()
    if stage == "text":
        assert list((tmp_path / "cache" / "text").rglob("*.safetensors")) == []


def test_fp32_is_for_one_picture_alone(miniature: Miniature) -> None:
    spec = CheckpointSpec.from_folder(miniature("1.6b"))
    inputs = PlanInputs(Hardware("cpu"), tokens=9)
    request = Request("a lake", width=64, height=64, precision="bf16", memory_bytes=2**31)
    plan = make_plan(spec, request, inputs, 0)
    before, used = plan.denoise, list[str]()
    with Session(spec) as session:
        recovery = Recovery(session, inputs, plan.precision, ignore)
        for picture in range(2):
            for attempt in recovery.attempts(DENOISE, plan, picture):
                with attempt:
                    used.append(attempt.plan.precision.transformer)
                    if len(used) == 1:
                        raise NumericsError("the transformer gave numbers that are not finite")
            plan = attempt.plan
    assert used == ["bf16", "fp32", "bf16"]
    assert plan.denoise == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("can't start new thread"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (OutOfMemoryError("out of memory"), False),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
