"""What a session holds is its own to use again; what is set for all of PyTorch is put back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from handscroll import Handscroll, api
from handscroll.errors import BudgetError, Cancelled, UsageError
from handscroll.events import Progress
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.plan.inputs import MIB, Hardware, PlanInputs, Rates
from handscroll.plan.plan import Plan
from handscroll.plan.search import make_plan
from handscroll.request import Request
from handscroll.runtime import device, heap, holdings, memory, probe
from handscroll.runtime.denoise import denoise_picture
from handscroll.runtime.device import find_hardware
from handscroll.runtime.holdings import BASE_STEP_BYTES, Holdings, settled
from handscroll.runtime.memory import Meter, enforced, release
from handscroll.runtime.settings import job_settings, made_within
from handscroll.system import resident_bytes

Miniature = Callable[..., Path]
GIB = 1024 * MIB
BUILTIN = Path(device.__file__).parents[1] / "builtin" / "tiny-landscape"
PROMPT = "snowy mountains at dusk"


# The class


def five_plans(scroll: Handscroll, tmp_path: Path, **options: Any) -> tuple[list[Plan], list[int]]:
    """Plans of five calls, each denoised and saved, and what the process holds after each."""
    plans, held = [], []
    for number in range(5):
        picture = scroll(PROMPT, seed=number, **{"steps": 1, **options})
        picture.save(tmp_path / "p.png")
        plans.append(replace(picture.plan, seeds=()))
        del picture
        held.append(resident_bytes() or 0)
    return plans, held


@pytest.mark.parametrize("is_budgeted", [False, True])
def test_five_calls_have_one_plan(is_budgeted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "available_bytes", lambda: 8 * GIB)  # whatever other programs do meanwhile
    # Of the whole process, in which other tests have left something.
    budget = (resident_bytes() or 0) + 700 * MIB if is_budgeted else None
    scroll = Handscroll.from_pretrained("tiny-landscape", device="cpu", precision="fp32", memory_bytes=budget)
    plans, held = five_plans(scroll, tmp_path, width=128, height=96)
    assert len(set(plans)) == 1
    assert plans[0].kept == (() if is_budgeted else ("text_encoder", "transformer", "decoder"))
    assert max(held[1:]) - held[1] < 16 * MIB


def test_five_calls_of_a_picture_that_grows_have_one_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "available_bytes", lambda: 8 * GIB)
    scroll = Handscroll.from_pretrained("tiny-landscape", device="cpu", precision="fp32")
    plans, held = five_plans(scroll, tmp_path, width=128, height=128, compose=64, steps=5)
    assert len(set(plans)) == 1
    assert plans[0].kept == ("text_encoder", "encoder", "transformer", "decoder")
    assert max(held[1:]) - held[1] < 16 * MIB


def base_bytes_of(scroll: Handscroll, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each plan from now on takes for held by others."""
    seen: list[int] = []

    def watched(spec: Any, request: Any, inputs: PlanInputs, seed: int) -> Plan:
        seen.append(inputs.hardware.base_bytes or 0)
        return make_plan(spec, request, inputs, seed)

    monkeypatch.setattr(api, "make_plan", watched)
    return seen


def test_calls_that_a_listener_ended_are_not_taken_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    scroll = Handscroll.from_pretrained("tiny-landscape", device="cpu", precision="fp32")
    seen = base_bytes_of(scroll, monkeypatch)

    def stop(event: Progress) -> None:
        if event.stage == "denoise" and event.done:
            raise Cancelled

    options: dict[str, Any] = {"size": 512, "steps": 2, "seed": 1, "compose": "off"}
    scroll(PROMPT, **options)
    for _ in range(6):
        with pytest.raises(Cancelled):
            scroll(PROMPT, on_event=stop, **options)
    scroll(PROMPT, **options)
    assert max(seen) - min(seen) < 64 * MIB


def test_what_an_error_left_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100 * MIB]
    monkeypatch.setattr(holdings, "resident_bytes", lambda: now[0])
    held = Holdings()

    def fail() -> None:
        with held.counted():
            now[0] = 180 * MIB  # of which 40 go with the error
            raise Cancelled

    with pytest.raises(Cancelled):
        fail()
    now[0] = 140 * MIB
    with held.counted():
        now[0] = 150 * MIB
    found = held.without(PlanInputs(Hardware("cpu", base_bytes=now[0])), 0)
    assert found.hardware.base_bytes == 100 * MIB


def test_what_others_take_meanwhile_counts_as_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    scroll = Handscroll.from_pretrained("tiny-landscape", device="cpu", precision="fp32")
    seen = base_bytes_of(scroll, monkeypatch)
    kept: list[np.ndarray] = []

    def keep(event: Progress) -> None:
        if not kept:
            kept.append(np.ones(600 * MIB, np.uint8))

    scroll(PROMPT, size=64, steps=1, seed=1, on_event=keep)
    scroll(PROMPT, size=64, steps=1, seed=1)
    assert seen[1] - seen[0] > 300 * MIB


def test_a_picture_is_saved_with_what_the_process_holds_by_then(tmp_path: Path) -> None:
    budget = (resident_bytes() or 0) + 400 * MIB
    scroll = Handscroll.from_pretrained("tiny-landscape", device="cpu", precision="fp32", memory_bytes=budget)
    picture = scroll(PROMPT, size=128, steps=1, seed=1)
    picture.save(tmp_path / "p.png")
    kept = np.ones(500 * MIB, np.uint8)
    for use in (picture.numpy, lambda: picture.save(tmp_path / "q.png"), lambda: list(picture.rows())):
        with pytest.raises(BudgetError):
            use()
    del kept
    assert picture.numpy().shape == (128, 128, 3)


@dataclass
class SmallMachine:
    """A CPU with little memory: what the session's modules hold is resident and no longer available."""

    scroll: Handscroll
    total_bytes: int
    base_bytes: int = 300 * MIB
    left_bytes: int = 0  # by kernels and the like, once something has run
    looks: int = 0

    def resident(self) -> int:
        self.looks += 1
        return self.base_bytes + self.scroll.session.held_bytes + self.left_bytes

    def available(self) -> int:
        return self.total_bytes - self.scroll.session.held_bytes - self.left_bytes


@pytest.mark.parametrize("free_mib", [150, 250, 400, 4000])
def test_a_small_machine_gives_every_call_the_plan_of_the_first(
    free_mib: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scroll = Handscroll.from_pretrained("tiny-landscape", device="cpu", precision="fp32")
    machine = SmallMachine(scroll, free_mib * MIB)
    for module in (device, holdings, probe):
        monkeypatch.setattr(module, "resident_bytes", machine.resident)
    monkeypatch.setattr(device, "own_resident_bytes", machine.resident)
    monkeypatch.setattr(device, "available_bytes", machine.available)
    denoise = denoise_picture

    def leaves_kernels(*given: Any) -> Any:
        machine.left_bytes = 40 * MIB
        return denoise(*given)

    monkeypatch.setattr(api, "denoise_picture", leaves_kernels)
    plans, _ = five_plans(scroll, tmp_path, width=128, height=128)
    assert len(set(plans)) == 1
    assert machine.looks


def test_memory_that_the_caller_takes_meanwhile_is_not_the_sessions(miniature: Miniature, tmp_path: Path) -> None:
    scroll = Handscroll.from_pretrained(miniature("1.6b"), device="cpu", memory="2GiB")

    def base_bytes() -> int:
        picture = scroll(PROMPT, width=64, height=64, steps=1, seed=1)
        base = picture._inputs.hardware.base_bytes
        assert base is not None
        return base

    first = base_bytes()
    callers = np.ones(200 * MIB, np.uint8)
    second = base_bytes()
    assert 180 * MIB < second - first < 220 * MIB
    del callers
    picture = scroll(PROMPT, width=1024, height=1024, steps=1, seed=1)
    pixels = picture.numpy()
    assert pixels.nbytes < BASE_STEP_BYTES or base_bytes() - first > pixels.nbytes - BASE_STEP_BYTES


def test_modules_that_do_not_fit_beside_each_other_are_not_held(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a machine for one of them at a time, none stays; on a larger one all of them."""
    monkeypatch.setattr(device, "available_bytes", lambda: 8 * MIB)
    monkeypatch.setattr(device, "own_resident_bytes", lambda: 0)
    scroll = Handscroll.from_pretrained("tiny-landscape", device="cpu", precision="fp32")
    scroll(PROMPT, width=128, height=128, steps=1, seed=1).save(tmp_path / "p.png")
    assert scroll.session.opened == {}
    assert scroll.session.held_bytes == 0
    monkeypatch.undo()
    scroll(PROMPT, width=128, height=128, steps=1, seed=1).save(tmp_path / "p.png")
    assert {key.module for key in scroll.session.opened} >= {"transformer", "decoder"}
    assert scroll.session.held_bytes > MIB


def test_amounts_that_changed_little_are_what_they_were() -> None:
    before = Hardware("cpu", base_bytes=GIB, free_bytes=10 * GIB, scratch_bytes=100 * GIB)
    little: dict[str, Any] = {"base_bytes": GIB + 10 * MIB, "free_bytes": 10 * GIB - 300 * MIB}
    assert settled(replace(before, **little), before) == before
    changes: tuple[dict[str, Any], ...] = (
        {"base_bytes": GIB + 20 * MIB},
        {"base_bytes": GIB - 20 * MIB},
        {"base_bytes": None},
        {"free_bytes": 9 * GIB},
        {"free_bytes": 11 * GIB},
        {"free_bytes": None},
        {"scratch_bytes": GIB},
        {"device": "cuda:0"},
        {"rates": Rates(fp32_flops=1.0)},
    )
    for change in changes:
        now = replace(before, **change)
        assert settled(now, before) == now
        assert settled(replace(now, **{**little, **change}), before) == now


# A CUDA device, faked


@dataclass
class FakeCuda:
    """A card of so many bytes. `ours` and `theirs` are allocated in this process, `cached` is reserved beside them."""

    total: int = 12 * GIB
    ours: int = 0
    theirs: int = 0
    cached: int = 0
    fraction: float = 1.0
    major: int = 8  # as get_device_properties tells a compute capability
    minor: int = 0
    set_to: list[float] = field(default_factory=list)

    def set_fraction(self, fraction: float, device: object) -> None:
        assert isinstance(fraction, float)
        assert 0 <= fraction <= 1
        self.fraction = fraction
        self.set_to.append(fraction)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reserved = lambda device: self.ours + self.theirs + self.cached  # noqa: E731
        fakes: dict[str, Any] = {
            "is_available": lambda: True,
            "is_initialized": lambda: False,
            "device_count": lambda: 1,
            "memory_allocated": lambda device: self.ours + self.theirs,
            "memory_reserved": reserved,
            "mem_get_info": lambda device: (self.total - reserved(device), self.total),
            "set_per_process_memory_fraction": self.set_fraction,
            "get_per_process_memory_fraction": lambda device: self.fraction,
            "get_device_properties": lambda device: self,
            "device": lambda device: nullcontext(),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        rates = Rates(fp32_flops=4e13, bf16_flops=4e14, fp16_flops=4e14, weight_bytes=2e9, host_bytes=2.5e10)
        monkeypatch.setattr(device, "rates_of", lambda device: rates)
        monkeypatch.setattr(device, "available_bytes", lambda: 32 * GIB)

    @property
    def total_memory(self) -> int:
        return self.total


def test_a_second_call_on_a_small_card_gets_the_plan_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from handscroll.models.autoencoder import F32C32_SANA
    from handscroll.models.text_encoder import TextEncoderSpec
    from handscroll.models.transformer import TransformerSpec

    spec = CheckpointSpec.from_folder(BUILTIN)
    spec = replace(spec, transformer=TransformerSpec(), autoencoder=F32C32_SANA, text_encoder=TextEncoderSpec())
    card = FakeCuda()
    card.install(monkeypatch)
    own = Holdings()
    plans = []
    for _ in range(5):
        inputs = PlanInputs(find_hardware("cuda"), tokens=300, keeps_modules=True)
        inputs = own.without(inputs, card.ours)
        assert inputs.hardware.free_bytes == card.total
        plans.append(make_plan(spec, Request("a", width=1024, steps=20, seed=0, precision="bf16"), inputs, 0))
        # Held from then on, beside what the allocator has cached.
        card.ours = sum(
            {"text_encoder": 4 * GIB, "transformer": 3 * GIB}.get(name, GIB // 3) for name in plans[-1].kept
        )
        card.cached = 2 * GIB
    assert len(set(plans)) == 1
    assert "transformer" in plans[0].kept
    assert plans[0].planned_peak_bytes
    assert plans[0].planned_peak_bytes < card.total


def test_what_others_allocated_on_the_card_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    card = FakeCuda(theirs=5 * GIB, ours=2 * GIB, cached=GIB)
    card.install(monkeypatch)
    found = find_hardware("cuda:0")
    assert found.free_bytes == card.total
    assert Holdings().without(PlanInputs(found), 2 * GIB).hardware.base_bytes == 5 * GIB


def test_a_share_of_the_card_that_was_set_before_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    card = FakeCuda(fraction=0.5)
    card.install(monkeypatch)
    with enforced("cuda:0", None):
        assert card.set_to == []
    with enforced("cuda:0", 3 * GIB):
        assert card.fraction == 0.25
    assert card.set_to == [0.25, 0.5]
    with enforced("cuda:0", 9 * GIB):
        assert card.fraction == 0.5  # the smaller one stays
    assert card.fraction == 0.5
    with pytest.raises(ValueError, match="meanwhile"), enforced("cuda:0", GIB):
        raise ValueError("meanwhile")
    assert card.fraction == 0.5
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    with enforced("cuda:0", 24 * GIB):
        assert card.fraction == 1.0


def test_pinned_memory_goes_back_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("device"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: emptied.append("host"), raising=False)
    release("cuda:1")
    assert emptied == ["device", "host"]
    monkeypatch.delattr(torch.accelerator, "empty_host_cache")
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: emptied.append("older"), raising=False)
    release("cuda:1")
    assert emptied == ["device", "host", "device", "older"]
    monkeypatch.delattr(torch._C, "_host_emptyCache")
    release("cuda:1")


# The C heap


def test_no_more_of_the_heap_is_set_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Library:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            calls.append((option, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    for variable in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(variable, raising=False)
    with enforced("cpu", None):
        assert calls == []
    with enforced("cpu", GIB):
        assert calls == [(heap.M_MMAP_THRESHOLD, MIB), (heap.M_TRIM_THRESHOLD, MIB)]
    calls.clear()
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", str(64 * MIB))
    with enforced("cpu", GIB):
        assert calls == [(heap.M_MMAP_THRESHOLD, 65536), (heap.M_TRIM_THRESHOLD, MIB)]


# Where nothing tells what a process holds


def test_without_knowing_what_it_holds_a_budget_is_refused_and_all_else_works(
    miniature: Miniature, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (device, holdings, memory, probe):
        monkeypatch.setattr(module, "resident_bytes", lambda: None)
    monkeypatch.setattr(device, "own_resident_bytes", lambda: None)
    monkeypatch.setattr(device, "available_bytes", lambda: None)
    monkeypatch.setattr(memory, "peak_resident_bytes", lambda: None)
    model = str(miniature("1.6b"))
    with pytest.raises(UsageError, match="leave --memory out"):
        api_generate(model, tmp_path / "p.png", memory_bytes=4 * GIB)
    assert list(tmp_path.iterdir()) == []
    (result,) = api_generate(model, tmp_path / "p.png")
    assert result.memory["measured_peak_bytes"] is None
    with pytest.raises(UsageError, match="leave --memory out"):
        Handscroll.from_pretrained(model, memory="4GiB")(PROMPT, width=64, height=64, steps=1)
    Handscroll.from_pretrained(model)(PROMPT, width=64, height=64, steps=1).save(tmp_path / "q.png")


def api_generate(model: str, path: Path, **options: Any) -> Any:
    from handscroll import generate

    return generate(Request(PROMPT, model=model, width=64, height=64, steps=1, seed=1, **options), path)


def test_a_meter_leaves_out_what_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident_bytes", lambda: None)
    monkeypatch.setattr(memory, "peak_resident_bytes", lambda: None)
    meter = Meter("cpu")
    with meter.stage("text"):
        pass
    assert meter.stage_peak_bytes == {}
    assert meter.peak_bytes is None
    assert meter.seconds["text"] >= 0


# Settings around a job that is left and entered again


def test_settings_hold_while_an_item_is_made_and_not_while_it_is_used() -> None:
    seen: list[str] = []

    @contextmanager
    def settings() -> Iterator[None]:
        seen.append("set")
        yield
        seen.append("put back")

    def items() -> Any:
        try:
            for number in range(2):
                seen.append(f"made {number}")
                yield number
        finally:
            seen.append("closed")

    for item in made_within(settings, items()):
        seen.append(f"used {item}")
    assert seen == [
        "set",
        "made 0",
        "put back",
        "used 0",
        "set",
        "made 1",
        "put back",
        "used 1",
        "set",
        "closed",
        "put back",
    ]
    seen.clear()
    for _ in made_within(settings, items()):
        break
    assert seen[:3] == ["set", "made 0", "put back"]


def test_rows_leave_everything_as_it_was_between_them(miniature: Miniature) -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    with torch.autocast("cpu", torch.bfloat16):
        picture = Handscroll.from_pretrained(miniature("1.6b"), device="cpu", precision="fp32")(
            PROMPT, width=64, height=256, steps=1, seed=2
        )
        for _ in picture.rows():
            assert torch.is_autocast_enabled("cpu")
            assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
    with job_settings("cpu", None):
        assert not torch.is_autocast_enabled("cpu")


def test_autocast_around_a_job_changes_no_picture(miniature: Miniature) -> None:
    scroll = Handscroll.from_pretrained(miniature("1.6b"), device="cpu", precision="fp32")
    plain = scroll(PROMPT, width=96, height=64, steps=2, seed=3).numpy()
    with torch.autocast("cpu", torch.bfloat16):
        again = Handscroll.from_pretrained(miniature("1.6b"), device="cpu", precision="fp32")
        assert np.array_equal(again(PROMPT, width=96, height=64, steps=2, seed=3).numpy(), plain)


def test_the_least_share_holds_while_jobs_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to begin is the first to end."""
    share = [0.9]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share[0], raising=False)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: share.__setitem__(0, fraction)
    )
    first, second = enforced("cuda:0", 3 * GIB), enforced("cuda:0", 5 * GIB)
    seen = []
    for change in (first.__enter__, second.__enter__):
        change()
        seen.append(share[0])
    for each in (first, second):
        each.__exit__(None, None, None)
        seen.append(share[0])
    assert seen == [0.3, 0.3, 0.5, 0.9]
