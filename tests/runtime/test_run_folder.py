"""Run folders, and samplers that go on from what they hold."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler
from torch import Tensor

from handscroll.errors import BusyError, CheckpointError, RunFolderError
from handscroll.events import Progress
from handscroll.files import write_whole
from handscroll.jobs.folder import state_paths
from handscroll.jobs.job import Job, find_run, read_job, run_folder_of
from handscroll.jobs.latent_file import load_latent, save_latent
from handscroll.jobs.store import RunFolder
from handscroll.request import Request
from handscroll.runtime.sampling import schedule
from handscroll.runtime.sampling.job import Sampling
from handscroll.runtime.sampling.loop import denoise
from handscroll.runtime.sampling.noise import starting_noise
from handscroll.runtime.sampling.schedule import worth_saving
from handscroll.runtime.sampling.state import SamplerState
from handscroll.runtime.text_cache import Text
from handscroll.weights.tensor_file import read_tensors, write_tensors

SHAPE = (1, 4, 3, 5)


# Samplers


class Transformer:
    """Stands in for the real one: some function of all that it is given."""

    device = torch.device("cpu")
    dtype = torch.float32

    class config:
        timestep_scale = 1.0
        out_channels = 4
        guidance_embeds = True
        guidance_embeds_scale = 0.1

    def __call__(self, latent: Tensor, *, encoder_hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.sin(latent * 3 + timestep) + encoder_hidden_states.mean(),)

    def predict(self, branches: list[Any]) -> list[Tensor]:
        return [
            self(branch.latent, encoder_hidden_states=branch.text, timestep=branch.timestep)[0] for branch in branches
        ]


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "dpm, order 1": lambda: DPMSolverMultistepScheduler(**FLOW, solver_order=1),
    "dpm, order 2": lambda: DPMSolverMultistepScheduler(**FLOW),
    "dpm, order 3": lambda: DPMSolverMultistepScheduler(**FLOW, solver_order=3),
    "dpm, with noise": lambda: DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    "flow match": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow match, with noise": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
    "scm": lambda: SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
}


def sampling(scheduler: Any, steps: int, **options: Any) -> Sampling:
    noise, generator = starting_noise(SHAPE[1], SHAPE[2], SHAPE[3], seed=3)
    text, negative = Text(torch.full((1, 2, 3), 0.3)), Text(torch.full((1, 2, 3), -0.2))
    return Sampling(
        cast(Any, Transformer()), scheduler, noise, generator, text, negative, steps, 4.5, lambda done: None, **options
    )


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_a_resumed_sampler_gives_the_same_bits(
    name: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "worth_saving", lambda *_: True)
    run = RunFolder.open(job(tmp_path))
    expected = denoise(sampling(SCHEDULERS[name](), steps))
    states: list[SamplerState] = []
    assert torch.equal(denoise(sampling(SCHEDULERS[name](), steps, on_state=states.append)), expected)
    assert [state.steps_done for state in states] == list(range(1, steps + 1))
    for state in states:
        run.keep_state(0, state)
        start = run.state(0)
        assert start is not None
        assert torch.equal(denoise(sampling(SCHEDULERS[name](), steps, start=start)), expected)
    run.__exit__(None, None, None)


def test_a_state_of_another_schedule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[SamplerState] = []
    denoise(sampling(SCHEDULERS["scm"](), 3, on_state=states.append))
    with pytest.raises(RunFolderError, match="another schedule"):
        denoise(sampling(SCHEDULERS["scm"](), 4, start=states[-1]))


def test_the_last_state_is_always_handed_out_and_comes_before_its_event() -> None:
    told: list[object] = []
    job = dataclasses.replace(sampling(SCHEDULERS["dpm, order 2"](), 3), on_step=told.append, on_state=told.append)
    denoise(job)
    assert [type(each).__name__ for each in told] == ["int", "int", "SamplerState", "int"]


def test_a_state_that_is_not_finite_is_not_kept() -> None:
    states: list[SamplerState] = []
    job = sampling(SCHEDULERS["flow match"](), 2, on_state=states.append)
    job.text.embeddings.fill_(float("nan"))
    with pytest.raises(Exception, match="not finite"):
        denoise(job)
    assert states == []


@pytest.mark.parametrize(
    ("unsaved", "last_save", "is_last", "expected"),
    [(0, 0, True, True), (9.9, 0, False, False), (10, 0.1, False, True), (40, 1, False, False), (50, 1, False, True)],
)
def test_saving_takes_a_fiftieth_of_the_time_at_most(
    unsaved: float, last_save: float, is_last: bool, expected: bool
) -> None:
    assert worth_saving(unsaved, last_save, is_last) is expected


# Files


def test_tensors_come_back_with_their_bits(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.arange(7, dtype=torch.uint8),
        "c": torch.tensor([1, -2], dtype=torch.int64),
        "d": torch.randn(2, 3, 2).to(torch.bfloat16).transpose(0, 1),
    }
    write_tensors(tmp_path / "t.safetensors", tensors, {"said": 'a "lake" 山'})
    found, facts = read_tensors(tmp_path / "t.safetensors")
    assert facts == {"said": 'a "lake" 山'}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert os.listdir(tmp_path) == ["t.safetensors"]


def test_a_latent_of_zeroed_pages_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "l.safetensors"
    save_latent(file, torch.randn(SHAPE), {})
    whole = file.read_bytes()
    file.write_bytes(whole[:-16] + bytes(16))
    with pytest.raises(CheckpointError, match="checksum"):
        load_latent(file)


def test_a_failed_write_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_whole(tmp_path / "file", [b"older"])
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "file", [b"newer"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"older"}


# Folders


def job(folder: Path, seed: int | None = 7, drawn: int = 7, **changes: Any) -> Job:
    request = Request("a lake", width=64, height=64, seed=seed, count=changes.pop("count", 1))
    latents = {"prompt": "a lake", "count": request.count} | changes
    return Job(request, drawn if seed is None else seed, 5, latents, {"quality": None}, folder / "p.png")


def state(steps_done: int) -> SamplerState:
    generator = torch.Generator().manual_seed(steps_done)
    return SamplerState(
        steps_done, torch.randn(SHAPE), torch.arange(5), generator.get_state(), (torch.randn(SHAPE),), 2
    )


def leave(run: RunFolder) -> None:
    """As a killed process does."""
    run.release()


def notices(events: list[Progress]) -> list[str]:
    return [event.detail for event in events]


def test_a_run_goes_on_and_ends(tmp_path: Path) -> None:
    first = RunFolder.open(job(tmp_path, count=3))
    assert (first.to_denoise(), first.to_decode(), first.state(0)) == ([0, 1, 2], [0, 1, 2], None)
    latent = torch.randn(SHAPE)
    first.keep_state(0, state(5))
    first.keep_latent(0, latent, {"prompt": "a lake"})
    (tmp_path / "p-1.png").touch()
    first.mark_done(0)
    first.keep_latent(1, latent, {"prompt": "a lake"})
    first.keep_state(2, state(4))
    assert first.state(2) is not None
    assert first.resumed_from(2) is None, "what this session did is not resumed"
    leave(first)

    events: list[Progress] = []
    with RunFolder.open(job(tmp_path, count=3), events.append) as run:
        assert notices(events) == [f"{tmp_path}/p.png.run goes on with picture 3 of 3, from step 4 of 5"]
        assert (run.to_denoise(), run.to_decode()) == ([2], [1, 2])
        assert torch.equal(run.latent(1), latent)
        run.keep_copy(1, tmp_path / "copy.safetensors")
        kept = run.state(2)
        assert kept is not None
        assert kept.steps_done == 4
        assert [run.resumed_from(index) for index in range(3)] == [5, 5, 4]
        assert load_latent(run.folder / "latent-2.safetensors")[1]["prompt"] == "a lake"
    assert sorted(os.listdir(tmp_path)) == ["copy.safetensors", "p-1.png"]
    assert load_latent(tmp_path / "copy.safetensors")[1] == {"prompt": "a lake"}


def test_a_done_picture_that_is_gone_is_made_again(tmp_path: Path) -> None:
    run = RunFolder.open(job(tmp_path))
    run.keep_latent(0, torch.randn(SHAPE), {})
    run.mark_done(0)
    leave(run)
    assert RunFolder.open(job(tmp_path)).to_decode() == [0]


@pytest.mark.parametrize("damage", ["cut", "zeroed", "emptied", "foreign", "missing"])
def test_a_torn_state_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    run = RunFolder.open(job(tmp_path))
    kept = [state(1), state(2), state(3)]
    for each in kept:
        run.keep_state(0, each)
    newest, previous = state_paths(run.folder, 0)

    def spoil(path: Path) -> None:
        whole = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif damage == "foreign":
            tensors, facts = read_tensors(path)
            write_tensors(path, tensors, {**facts, "run": "another"})
        else:
            path.write_bytes({"cut": whole[:-100], "zeroed": whole[:-300] + bytes(300), "emptied": b""}[damage])

    for spoilt, expected in ((newest, kept[1]), (previous, None)):
        spoil(spoilt)
        found = run.state(0)
        if expected is None:
            assert found is None
        else:
            assert found is not None
            assert torch.equal(found.latent, expected.latent)
            assert torch.equal(found.model_outputs[0], expected.model_outputs[0])
            assert torch.equal(found.generator, expected.generator)
    leave(run)


def test_a_damaged_latent_is_denoised_again(tmp_path: Path) -> None:
    run = RunFolder.open(job(tmp_path))
    run.keep_latent(0, torch.randn(SHAPE), {})
    file = run.folder / "latent-1.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    leave(run)
    assert RunFolder.open(job(tmp_path)).to_denoise() == [0]


def test_a_drawn_seed_is_remembered(tmp_path: Path) -> None:
    leave(RunFolder.open(job(tmp_path, seed=None, drawn=5)))
    for again in (job(tmp_path, seed=None, drawn=6), job(tmp_path, seed=5), job(tmp_path, seed=None, drawn=8)):
        run = RunFolder.open(again, must_go_on=True)
        assert run.seeds == (5,)
        leave(run)
    leave(RunFolder.open(job(tmp_path, seed=9)))
    assert RunFolder.open(job(tmp_path, seed=None, drawn=6)).seeds == (6,)


def test_another_job_starts_over_and_says_so(tmp_path: Path) -> None:
    run = RunFolder.open(job(tmp_path))
    run.keep_state(0, state(3))
    leave(run)
    other = job(tmp_path, prompt="a sea")
    with pytest.raises(RunFolderError, match=r"cannot go on: its prompt was 'a lake', now it is 'a sea'"):
        RunFolder.open(other, must_go_on=True)
    assert (run.folder / "state-1.safetensors").exists()
    events: list[Progress] = []
    run = RunFolder.open(other, events.append)
    assert notices(events) == [f"starting over in {run.folder}: its prompt was 'a lake', now it is 'a sea'"]
    assert run.state(0) is None
    assert sorted(os.listdir(run.folder)) == ["job.json", "lock"]
    leave(run)


def test_two_cannot_work_on_one_run(tmp_path: Path) -> None:
    with RunFolder.open(job(tmp_path)) as run:
        with pytest.raises(BusyError, match=r"^[^\n]*p\.png\.run: another process is working"):
            RunFolder.open(job(tmp_path, seed=8))
        run.keep_state(0, state(1))
        assert run.state(0) is not None
    assert os.listdir(tmp_path) == []


def test_an_error_keeps_what_is_worth_keeping(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught, RunFolder.open(job(tmp_path)):
        raise ZeroDivisionError
    assert not hasattr(caught.value, "__notes__")
    assert os.listdir(tmp_path) == []
    run = RunFolder.open(job(tmp_path))
    run.keep_state(0, state(2))
    with pytest.raises(ZeroDivisionError) as caught, run:
        raise ZeroDivisionError
    assert caught.value.__notes__ == [f"`handscroll resume {tmp_path}/p.png.run` goes on from step 2 of 5"]
    assert find_run(tmp_path / "p.png") == find_run(run.folder) == run.folder
    assert read_job(run.folder) == job(tmp_path)


def test_where_nothing_can_be_saved_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Progress] = []
    latent = torch.randn(SHAPE)
    with RunFolder.open(job(tmp_path), events.append) as run:
        for path in run.folder.iterdir():
            path.unlink()
        run.folder.rmdir()
        run.keep_state(0, state(1))
        run.keep_latent(0, latent, {"prompt": "a lake"})
        assert len(events) == 1
        assert re.match(r"cannot save progress in .*, the run goes on without: ", events[0].detail)
        assert (run.to_denoise(), run.to_decode()) == ([], [0])
        assert torch.equal(run.latent(0), latent)
        run.keep_copy(0, tmp_path / "copy.safetensors")
        run.mark_done(0)
    assert torch.equal(load_latent(tmp_path / "copy.safetensors")[0], latent)


@pytest.mark.parametrize(
    "content",
    [{"notes.txt": "mine"}, {"job.json": "[]", "lock": ""}, {"job.json": "{}"}, {"job.json": "{", "notes.txt": "mine"}],
)
def test_a_strangers_folder_is_left_alone(tmp_path: Path, content: dict[str, str]) -> None:
    folder = tmp_path / "p.png.run"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    with pytest.raises(RunFolderError, match="in the way"):
        RunFolder.open(job(tmp_path))
    assert {path.name: path.read_text() for path in folder.iterdir()} == content


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "p.png.run").write_text("mine")
    with pytest.raises(RunFolderError, match="in the way"):
        RunFolder.open(job(tmp_path))


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "its job.json is broken"), ("OLDER", "written by handscroll 0.0"), ("NO REQUEST", "its job.json is broken")],
)
def test_a_broken_or_older_folder_starts_over(tmp_path: Path, text: str, told: str) -> None:
    run = RunFolder.open(job(tmp_path))
    run.keep_state(0, state(3))
    leave(run)
    file = run.folder / "job.json"
    facts = json.loads(file.read_bytes())
    if text == "OLDER":
        text = json.dumps(facts | {"format_version": 0, "handscroll": "0.0"})
    elif text == "NO REQUEST":
        text = json.dumps(facts | {"request": {"colour": "red"}})
    file.write_text(text)
    with pytest.raises(RunFolderError, match=told):
        read_job(run.folder)
    events: list[Progress] = []
    with RunFolder.open(job(tmp_path), events.append) as run:
        assert notices(events)[0].startswith(f"starting over in {run.folder}: {told}")
        assert run.state(0) is None
    assert os.listdir(tmp_path) == []


def test_the_folder_is_beside_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "real" / "behind.png")
    assert run_folder_of(link) == tmp_path / "real" / "behind.png.run"
    with RunFolder.open(dataclasses.replace(job(tmp_path), output=link)) as run:
        assert read_job(run.folder).output == tmp_path / "real" / "behind.png"
        assert run.part_for(tmp_path / "real" / "behind.png") == run.folder / "picture.part"


def test_the_longest_name_has_a_folder_too(tmp_path: Path) -> None:
    output = tmp_path / f"{'x' * 251}.png"
    output.touch()
    with RunFolder.open(dataclasses.replace(job(tmp_path), output=output)) as run:
        assert read_job(run.folder).output == output
        assert find_run(output) == run.folder


def test_an_unfinished_file_on_another_disk_is_hidden_beside_its_place(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one disk only")
    with RunFolder.open(job(tmp_path)) as run:
        assert re.fullmatch(r"/dev/shm/\.p\.png\.[0-9a-f]{16}\.part", str(run.part_for(elsewhere / "p.png")))
