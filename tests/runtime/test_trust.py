"""Files that somebody else made: what a run folder, a latent or a repository may do, and what it may not."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from handscroll import Handscroll, Request, decode_latent, generate, resume
from handscroll.cli import main as cli
from handscroll.errors import CheckpointError, OutputError, RunFolderError, UnconfirmedFetchError, UsageError
from handscroll.events import MAX_NOTICE, Progress
from handscroll.jobs.folder import state_paths
from handscroll.jobs.job import read_job
from handscroll.jobs.latent_file import load_latent
from handscroll.jobs.status import read_status
from handscroll.runtime.sampling import schedule
from handscroll.weights.tensor_file import read_tensors, write_tensors

Miniature = Callable[..., Path]
ABSENT = "somebody/else_diffusers"
ESCAPE = "\x1b[2Jred\x9b31m\u202edrow\u2066"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "worth_saving", lambda *_: True)
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")


def interrupted(miniature: Miniature, stage: str = "decode", **options: Any) -> Path:
    """The folder of a run that was interrupted."""

    def stop(event: Progress) -> None:
        if event.stage == stage and event.done == 1:
            raise KeyboardInterrupt

    request = Request("a lake", model=str(miniature("1.6b")), width=64, height=64, steps=2, seed=3)
    with pytest.raises(KeyboardInterrupt):
        generate(request, Path("p.png").absolute(), on_event=stop, **options)
    return Path("p.png.run")


def change(folder: Path, **changes: Any) -> None:
    file = folder / "job.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_request(folder: Path, **changes: Any) -> None:
    change(folder, request=json.loads((folder / "job.json").read_text())["request"] | changes)


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    exit_code = cli.run([str(each) for each in arguments])
    return exit_code, capsys.readouterr().err


# Where a run folder writes


@pytest.fixture(scope="module")
def cut(miniature: Miniature, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a run which was cut off before it was decoded."""

    def stop(event: Progress) -> None:
        if event.stage == "decode":
            raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("cut")
    request = Request("a lake", model=str(miniature("1.6b")), width=64, height=64, steps=1, seed=3)
    with pytest.raises(KeyboardInterrupt):
        generate(request, folder / "p.png", save_latent=folder / "l.safetensors", on_event=stop)
    return folder


@pytest.fixture
def cut_before_decoding(cut: Path) -> Path:
    """Its run, as if it came from somebody else."""
    shutil.copytree(cut / "p.png.run", "p.png.run")
    return Path("p.png.run")


def test_a_latent_elsewhere_is_not_written(
    cut_before_decoding: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = tmp_path / "model.safetensors"
    victim.write_bytes(b"mine")
    change(cut_before_decoding, save_latent=str(victim))
    with pytest.raises(RunFolderError, match=r"not beside the picture; name that file again with --save-latent"):
        resume(cut_before_decoding)
    exit_code, line = said(capsys, "resume", cut_before_decoding)
    assert (exit_code, line.count("\n")) == (1, 1)
    assert victim.read_bytes() == b"mine"
    assert said(capsys, "resume", cut_before_decoding, "--save-latent", "again.safetensors")[0] == 0
    assert load_latent(Path("again.safetensors"))[1]["prompt"] == "a lake"
    assert victim.read_bytes() == b"mine"


@pytest.mark.parametrize("kind", ["weights", "latents of others", "a latent of others", "not safetensors", "a link"])
def test_nothing_but_a_latent_is_replaced_by_one(cut_before_decoding: Path, tmp_path: Path, kind: str) -> None:
    file = Path("weights.safetensors")
    if kind == "a link":
        (tmp_path / "elsewhere.safetensors").write_bytes(b"mine")
        file.symlink_to(tmp_path / "elsewhere.safetensors")
    elif kind == "weights":
        save_file({"weight": torch.zeros(3)}, file)
    elif kind == "latents of others":  # as caches of a training are
        save_file({"latents": torch.zeros(1, 32, 2, 2), "prompt_embeds": torch.zeros(1, 7, 48)}, file)
    elif kind == "a latent of others":
        save_file({"latent": torch.zeros(1, 32, 2, 2)}, file)
    else:
        file.write_bytes(b"mine")
    before = file.read_bytes()
    change(cut_before_decoding, save_latent=str(file.absolute()))
    with pytest.raises(OutputError, match="is no latent"):
        resume(cut_before_decoding)
    assert file.read_bytes() == before


def test_what_lay_beside_the_picture_lies_beside_the_folder_now(cut_before_decoding: Path, tmp_path: Path) -> None:
    """Moved to another folder, as from another machine, with its latent's name."""
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "p.png.run"
    os.rename(cut_before_decoding, moved)
    (result,) = resume(moved)
    assert result.path == tmp_path / "moved" / "p.png"
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["l.safetensors", "p.png"]
    assert list(Path().iterdir()) == []


def test_a_picture_behind_a_link_is_not_overwritten(cut_before_decoding: Path, tmp_path: Path) -> None:
    victim = tmp_path / "p.png"
    victim.write_bytes(b"mine")
    Path("p.png").symlink_to(victim)
    with pytest.raises(RunFolderError, match="is a link to another folder"):
        resume(cut_before_decoding)
    assert victim.read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["state-1.safetensors", "latent-1.safetensors", "lock", "job.json", "picture.part"])
@pytest.mark.parametrize("leads_to", ["a file", "nothing", "a device"])
def test_links_in_a_run_folder_are_refused(
    cut_before_decoding: Path, tmp_path: Path, name: str, leads_to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = tmp_path / "victim"
    if leads_to == "a file":
        victim.write_bytes((cut_before_decoding / "job.json").read_bytes())
    link = cut_before_decoding / name
    link.unlink(missing_ok=True)
    link.symlink_to("/dev/zero" if leads_to == "a device" else victim)
    before = victim.read_bytes() if victim.exists() else None
    for command in ("resume", "info"):
        exit_code, line = said(capsys, command, cut_before_decoding)
        assert (exit_code == 0, line.count("\n")) in ((False, 1),), (command, line)
    assert (victim.read_bytes() if victim.exists() else None) == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_a_run_folder_is_not_waited_for(cut_before_decoding: Path) -> None:
    os.mkfifo(cut_before_decoding / "state-1.safetensors")
    with pytest.raises(RunFolderError, match="no plain file"):
        resume(cut_before_decoding)
    with pytest.raises(RunFolderError, match="no plain file"):
        read_status(cut_before_decoding)


# What a run folder says


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "../../outside"},
        {"id": 7},
        {"done": ["1"]},
        {"done": 3},
        {"first_seed": "3"},
        {"first_seed": -1},
        {"first_seed": 1e300},
        {"steps": 0},
        {"steps": True},
        {"quality": "high"},
        {"quality": 0},
        {"latents": []},
        {"latents": {"device": ["cpu"]}},
        {"pictures": {"autoencoder's precision": {}}},
        {"output": 5},
        {"output": ""},
        {"save_latent": ["a"]},
        {"request": {"prompt": 5}},
        {"request": {"prompt": "a", "width": float("inf")}},
        {"request": {"prompt": "a", "model": ["tiny-landscape"]}},
        {"request": []},
    ],
    ids=str,
)
def test_facts_that_cannot_be_are_one_line(
    cut_before_decoding: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    change(cut_before_decoding, **changes)
    exit_code, line = said(capsys, "resume", cut_before_decoding)
    assert (exit_code, line.count("\n")) == (1, 1)
    assert line.startswith("error: p.png.run: ")
    assert "its job.json is broken" in line
    assert said(capsys, "info", cut_before_decoding)[0] == 1


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"format": "handscroll run", "x": ' + "9" * 5000 + "}"])
def test_json_of_great_depth_or_length(
    cut_before_decoding: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (cut_before_decoding / "job.json").write_text(text)
    for command in (("resume", cut_before_decoding), ("info", cut_before_decoding)):
        exit_code, line = said(capsys, *command)
        assert (exit_code, line.count("\n")) == (1, 1)


def test_a_job_of_gigabytes_is_not_read(cut_before_decoding: Path) -> None:
    with (cut_before_decoding / "job.json").open("r+b") as file:
        file.truncate(3 << 30)
    with pytest.raises(RunFolderError, match="broken"):
        read_job(cut_before_decoding)


# States and latents


def states_of(folder: Path) -> list[Path]:
    return [path for path in state_paths(folder, 0) if path.exists()]


@pytest.mark.parametrize(
    "kind",
    ["another size", "same numbers, another shape", "a huge one", "an output too many", "other steps", "a generator"],
)
def test_a_state_that_is_none_of_this_picture_is_not_gone_on_from(miniature: Miniature, kind: str) -> None:
    folder = interrupted(miniature, "denoise")
    for path in states_of(folder):
        tensors, facts = read_tensors(path)
        if kind == "another size":
            tensors["latent"] = torch.zeros(1, tensors["latent"].shape[1], 64, 64)
        elif kind == "same numbers, another shape":
            tensors["latent"] = tensors["latent"].reshape(1, -1, 1, 4)
        elif kind == "a huge one":
            tensors["timesteps"] = torch.zeros(1 << 20)
        elif kind == "an output too many":
            tensors |= {f"model_output.{number}": tensors["latent"] for number in range(20)}
        elif kind == "other steps":
            facts["steps_before"] = "1000000"
        else:
            tensors["generator"] = torch.zeros(1 << 20, dtype=torch.uint8)
        write_tensors(path, tensors, facts)
    (result,) = resume(folder)
    assert result.resumed_from_step in (None, 0)
    (whole,) = generate(
        Request("a lake", model=str(miniature("1.6b")), width=64, height=64, steps=2, seed=3), Path("whole.png")
    )
    assert result.path.read_bytes() == whole.path.read_bytes()


@pytest.mark.parametrize("kind", ["generator", "order", "outputs", "steps", "timesteps"])
def test_a_state_that_no_sampler_left_is_one_line(
    miniature: Miniature, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = interrupted(miniature, "denoise")
    for path in states_of(folder):
        tensors, facts = read_tensors(path)
        if kind == "generator":
            tensors["generator"] = torch.zeros(100, dtype=torch.uint8)
        elif kind == "order":
            facts["lower_order_nums"] = "7"
        elif kind == "outputs":
            tensors = {name: each for name, each in tensors.items() if not name.startswith("model_output")}
            facts["lower_order_nums"] = "2"
        elif kind == "steps":
            facts["steps_done"] = "-3"
        else:
            tensors["timesteps"] = tensors["timesteps"].double()
        write_tensors(path, tensors, facts)
    exit_code, line = said(capsys, "resume", folder)
    assert exit_code == 1
    assert line.splitlines()[-1].startswith("error: the saved state ")
    assert "delete the run folder to start over" in line


def test_a_latent_of_another_size_in_a_run_is_made_again(cut_before_decoding: Path) -> None:
    file = cut_before_decoding / "latent-1.safetensors"
    tensors, facts = read_tensors(file)
    write_tensors(file, {"latent": tensors["latent"].reshape(1, -1, 1, 4)}, facts)
    (result,) = resume(cut_before_decoding)
    assert result.resumed_from_step is None


# Fetching what a file names


def test_a_run_fetches_nothing_of_its_own_accord(cut_before_decoding: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_request(cut_before_decoding, model=ABSENT, revision=None)
    with pytest.raises(
        UnconfirmedFetchError, match=rf"names the model {ABSENT}, .* --yes \(in Python: fetch=True\)"
    ) as caught:
        resume(cut_before_decoding)
    assert caught.value.hub_id == ABSENT
    exit_code, line = said(capsys, "resume", cut_before_decoding)
    assert (exit_code, line.count("\n")) == (1, 1)
    assert f"names the model {ABSENT}" in line
    # With leave it is tried; here fetching is off altogether.
    for leave in (["--yes"], ["-y"], ["--model", ABSENT]):
        assert "fetching is off" in said(capsys, "resume", cut_before_decoding, *leave)[1]


@pytest.mark.parametrize("model", [ABSENT, "sana-1.6b-4k", "Efficient-Large-Model/Sana_600M_512px_diffusers"])
def test_a_latent_fetches_nothing_of_its_own_accord(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("l.safetensors")
    write_tensors(file, {"latent": torch.zeros(1, 32, 2, 2)}, {"model": model})
    with pytest.raises(UnconfirmedFetchError, match="names the model"):
        decode_latent(file, Path("p.png"))
    exit_code, line = said(capsys, "decode", file, "-o", "p.png")
    assert (exit_code, line.count("\n")) == (1, 1)
    assert "names the model" in line
    for leave in (["--yes"], ["--model", model]):
        assert "fetching is off" in said(capsys, "decode", file, "-o", "p.png", *leave)[1]


@pytest.mark.parametrize(("answer", "fetched"), [("y\n", True), ("yes\n", True), ("n\n", False), ("", False)])
def test_on_a_terminal_it_is_asked(
    answer: str, fetched: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tensors(Path("l.safetensors"), {"latent": torch.zeros(1, 32, 2, 2)}, {"model": ABSENT})
    stdin, stderr = io.StringIO(answer), io.StringIO()
    for stream in (stdin, stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(sys, "stderr", stderr)
    assert cli.run(["decode", "l.safetensors", "-o", "p.png"]) == 1
    assert f"names the model {ABSENT}, which is not on this machine. Fetch it? [y/N] " in stderr.getvalue()
    assert ("fetching is off" in stderr.getvalue()) == fetched


@pytest.mark.parametrize("revision", ["/dev/zero", "../../../../etc/passwd", "a\x1b[31mb", "a..b", "main/../x", "-x"])
def test_a_revision_is_no_path(revision: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_tensors(Path("l.safetensors"), {"latent": torch.zeros(1, 32, 2, 2)}, {"model": ABSENT, "revision": revision})
    exit_code, line = said(capsys, "decode", "l.safetensors", "-o", "p.png", "--yes")
    assert (exit_code, line.count("\n")) == (2, 1)
    assert "is no name of a branch, tag or commit" in line
    assert "\x1b" not in line


@pytest.mark.parametrize(
    "facts",
    [{"width": "-1"}, {"width": "1e9"}, {"height": "9" * 5000}, {"height": "nan"}],
    ids=["-1", "1e9", "long", "nan"],
)
def test_metadata_that_cannot_be_is_the_files_fault(facts: dict[str, str]) -> None:
    write_tensors(Path("l.safetensors"), {"latent": torch.zeros(1, 32, 2, 2)}, {"model": "tiny-landscape", **facts})
    with pytest.raises(CheckpointError, match="its metadata is broken"):
        decode_latent(Path("l.safetensors"), Path("p.png"))


# The terminal


def test_what_others_wrote_cannot_steer_a_terminal(
    cut_before_decoding: Path, miniature: Miniature, capsys: pytest.CaptureFixture[str]
) -> None:
    change_request(cut_before_decoding, prompt=ESCAPE, negative=ESCAPE)
    write_tensors(Path("l.safetensors"), {"latent": torch.zeros(1, 32, 2, 2)}, {"model": ESCAPE, ESCAPE: ESCAPE})
    save_file({ESCAPE: torch.zeros(2)}, "w.safetensors", {ESCAPE: ESCAPE})
    request = Request(ESCAPE, model=str(miniature("1.6b")), width=32, height=32, steps=1, seed=1)
    for name in ("q.png", "q.jpg", "q.tif", "q.dzi"):
        generate(request, Path(name))
    commands: list[tuple[object, ...]] = [
        *(("info", name) for name in ("q.png", "q.jpg", "q.tif", "q.dzi", "l.safetensors", "w.safetensors")),
        ("info", cut_before_decoding),
        ("info", f"{ESCAPE}.png"),
        ("resume", f"{ESCAPE}.run"),
        ("resume", cut_before_decoding),
        ("decode", "l.safetensors", "-o", "p.png"),
        ("decode", f"{ESCAPE}.safetensors", "-o", "p.png"),
        ("generate", "a", "-o", f"{ESCAPE}.txt"),
        ("generate", "a", "-o", "p.png", "--model", ESCAPE),
        ("generate", "a", "-o", "p.png", "--model", f"./{ESCAPE}"),
        ("generate", "a", "-o", "p.png", "--size", ESCAPE),
        ("generate", "a", "-o", "p.png", "--memory", ESCAPE),
        ("generate", "a", "-o", "p.png", "--compose", ESCAPE),
        ("generate", "a", "-o", "p.png", "--device", ESCAPE),
        ("plan", "--model", f"owner/name@{ESCAPE}"),
    ]
    for command in commands:
        capsys.readouterr()
        cli.run([str(each) for each in command])
        ran = capsys.readouterr()
        for mark in "\x1b\x9b\u202e\u2066":
            assert mark not in ran.out, command
            assert mark not in ran.err, command


def test_names_of_others_cannot_steer_a_terminal_through_warnings(miniature: Miniature, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(miniature("1.6b"), tmp_path / "copy"))
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, f"{ESCAPE}{'x' * 5000}": 1}))
    heard: list[str] = []
    scroll = Handscroll.from_pretrained(folder)
    scroll("a lake", size=64, steps=1, seed=1, on_event=lambda event: heard.append(event.detail))
    assert not any(character in line for line in heard for character in "\x1b\x9b\u202e\n")
    assert max(map(len, heard)) <= MAX_NOTICE


@pytest.mark.parametrize("part", ["[],", "{},", '{"a":1},'])
def test_a_job_of_many_parts_is_one_line_in_little_memory(cut_before_decoding: Path, part: str) -> None:
    text = f'{{"format": [{part * (4_000_000 // len(part))}0]}}'
    (cut_before_decoding / "job.json").write_text(text)
    tracemalloc.start()
    with pytest.raises(RunFolderError, match="broken"):
        resume(cut_before_decoding)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 64 << 20


def test_a_latent_that_claims_hundreds_of_gigabytes_is_not_read(miniature: Miniature) -> None:
    header = json.dumps({"latent": {"dtype": "F32", "shape": [1, 32, 60000, 60000], "data_offsets": [0, 460800000000]}})
    with open("l.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 460800000000)
    with pytest.raises(CheckpointError, match="above 131072 a side"):
        decode_latent(Path("l.safetensors"), Path("p.png"), model=str(miniature("1.6b")))


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_text_that_does_not_unpack_is_one_line(kind: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    body = b"parameters\0" + (b"\0" if kind == b"zTXt" else b"\1\0\0\0") + b"no such stream"
    chunk = len(body).to_bytes(4, "big") + kind + body + bytes(4)
    Path("p.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    assert cli.run(["info", "p.png"]) != 0
    assert "fault in handscroll" not in capsys.readouterr().err


def test_devices_of_thousands_of_digits_are_unknown() -> None:
    with pytest.raises(UsageError, match="is not known"):
        Request("a", device=f"cuda:{'9' * 5000}")
