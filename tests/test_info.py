"""`handscroll info`: every kind of file and folder, those that are broken, and a run that is not finished."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pyvips
import torch
from safetensors.torch import save_file

import handscroll
from handscroll import Request, generate
from handscroll.cli import main as cli
from handscroll.events import Progress
from handscroll.jobs.latent_file import save_latent
from handscroll.jobs.status import read_status
from handscroll.pictures.formats import FORMATS
from handscroll.pictures.metadata import parameters_text, read_size
from handscroll.pictures.targets import check_target
from handscroll.pictures.writing import write_image
from handscroll.runtime.sampling import schedule

Miniature = Callable[..., Path]
BUILTIN = Path(handscroll.__file__).parent / "builtin" / "tiny-landscape"
PARAMETERS = parameters_text(
    "a lake, ü", "fog", steps=3, sampler="DPM", guidance=4.5, seed=7, width=72, height=40, model="m", version="1",
    memory_mode="rows", exact=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def info(capsys: pytest.CaptureFixture[str]) -> Callable[[object], tuple[dict[str, Any], str]]:
    """`info(path)`: the JSON, and what people read."""

    def ask(path: object) -> tuple[dict[str, Any], str]:
        capsys.readouterr()
        assert cli.run(["info", str(path), "--json"]) == 0, capsys.readouterr().err
        found = json.loads(capsys.readouterr().out)
        assert cli.run(["info", str(path)]) == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        return found, shown.out

    return ask


def write_picture(path: Path, parameters: str = PARAMETERS) -> Path:
    row_block = torch.randint(0, 256, (40, 72, 3), dtype=torch.uint8).numpy()
    return write_image(check_target(path, 72, 40), [row_block], parameters)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_picture(info: Callable[..., Any], suffix: str) -> None:
    path = write_picture(Path(f"a{suffix}"))
    found, shown = info(path)
    assert found == {
        "kind": "picture",
        "path": f"a{suffix}",
        "format": FORMATS[suffix].title,
        "width": 72,
        "height": 40,
        "bytes": path.stat().st_size,
        "parameters": PARAMETERS,
    }
    heading, empty, *lines = shown.splitlines()
    assert re.fullmatch(rf"a\{suffix}: {FORMATS[suffix].title} picture, 72x40, [\d.]+ (bytes|KiB)", heading)
    assert empty == ""
    assert "\n".join(lines) == PARAMETERS


def test_a_picture_of_another_program(info: Callable[..., Any]) -> None:
    pyvips.Image.black(64, 48).write_to_file("plain.png")
    found, shown = info("plain.png")
    assert (found["width"], found["height"], found["parameters"]) == (64, 48, "")
    assert "does not say how it was made" in shown


def test_a_latent(info: Callable[..., Any]) -> None:
    save_latent(Path("a.safetensors"), torch.ones(1, 32, 4, 3), {"prompt": "a\nlake", "seed": "7", "model": "m"})
    found, shown = info("a.safetensors")
    assert found["kind"] == "latent"
    assert found["shape"] == [1, 32, 4, 3]
    assert found["facts"] == {"prompt": "a\nlake", "seed": "7", "model": "m"}
    assert found["bytes"] == Path("a.safetensors").stat().st_size
    assert shown.startswith("a.safetensors: latent of 1x32x4x3, ")
    assert re.search(r"^prompt +a lake$", shown, re.MULTILINE)


def test_a_weight_file(info: Callable[..., Any]) -> None:
    tensors = {f"layers.{number}.weight": torch.zeros(4, 8) for number in range(30)}
    tensors |= {"half": torch.zeros(300, dtype=torch.bfloat16), "scalar": torch.zeros(())}
    save_file(tensors, "w.safetensors", metadata={"format": "pt"})
    found, shown = info("w.safetensors")
    assert found["kind"] == "weights"
    assert found["parameters"] == 30 * 32 + 300 + 1
    assert found["dtypes"] == {"fp32": 4 * 30 * 32 + 4, "bf16": 600}
    assert found["metadata"] == {"format": "pt"}
    assert found["tensors"]["half"] == {"dtype": "bf16", "shape": [300], "bytes": 600}
    assert len(found["tensors"]) == 32
    assert shown.startswith("w.safetensors: 1.3 k parameters in 32 tensors, ")
    assert "and 12 more, which --json lists" in shown


def test_the_built_in_checkpoint(info: Callable[..., Any]) -> None:
    found, shown = info(BUILTIN)
    expected = {"kind": "checkpoint", "name": "tiny-landscape", "native_px": 1024, "compose_px": 512, "steps": 20}
    expected |= {"licence": "Apache-2.0", "scheduler": "DPMSolverMultistepScheduler"}
    assert expected.items() <= found.items()
    assert found["components"].keys() == {"text_encoder", "transformer", "vae"}
    assert found["bytes"] == sum(each["bytes"] for each in found["components"].values())
    for words in ("checkpoint tiny-landscape", "1024x1024", "Apache-2.0", "transformer", "bf16"):
        assert words in shown


@pytest.mark.parametrize("row", ["1.6b", "sprint-0.6b"])
def test_a_checkpoint_folder(info: Callable[..., Any], miniature: Miniature, row: str) -> None:
    folder = miniature(row)
    found, shown = info(folder)
    for name, each in found["components"].items():
        [file] = (folder / name).glob("*.safetensors")
        alone, _ = info(file)
        assert each["files"] == [file.name]
        assert each["parameters"] == alone["parameters"]
        assert each["precision"] == "fp32"
        assert each["bytes"] == 4 * each["parameters"]
    assert found["components"]["transformer"]["config"]["num_layers"] > 0
    assert found["licence"] is None
    assert "the folder does not say" in shown


# Runs that are not finished


@pytest.fixture(autouse=True)
def _every_step_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "SAVE_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(schedule, "SAVE_SHARE", float("inf"))


def interrupted(miniature: Miniature, stage: str, picture: int = 0, **options: Any) -> Path:
    """The folder of a run that was stopped at the first end of a step or row block of a stage."""

    def stop(event: Progress) -> None:
        if (event.stage, event.picture) == (stage, picture) and event.done:
            raise KeyboardInterrupt

    request = Request("a lake", model=str(miniature()), width=96, height=64, steps=2, seed=5, **options)
    with pytest.raises(KeyboardInterrupt):
        generate(request, Path("a.png"), on_event=stop)
    return Path("a.png.run")


def test_a_run_between_two_steps(info: Callable[..., Any], miniature: Miniature) -> None:
    folder = interrupted(miniature, "denoise")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    found, shown = info(folder)
    assert found["kind"] == "run"
    assert (found["output"], found["size"], found["steps"]) == ("a.png", "96x64", 2)
    assert found["goes_on"] == "from step 1 of 2"
    assert found["request"]["prompt"] == "a lake"
    assert found["pictures"] == [{"path": "a.png", "seed": 5, "written": False, "latent": False, "steps_done": 1}]
    assert "step 1 of 2" in shown
    assert shown.endswith("`handscroll resume a.png.run` goes on from step 1 of 2\n")
    assert info("a.png")[0] == found, "the run is found by its picture's name, as by `resume`"
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_run_with_a_finished_latent(info: Callable[..., Any], miniature: Miniature) -> None:
    folder = interrupted(miniature, "decode")
    found, shown = info(folder)
    assert found["pictures"] == [{"path": "a.png", "seed": 5, "written": False, "latent": True, "steps_done": 2}]
    assert found["goes_on"] == "from the finished latent"
    assert "latent finished" in shown
    assert info(folder / "latent-1.safetensors")[0]["facts"]["prompt"] == "a lake"


def test_a_run_of_several_pictures(info: Callable[..., Any], miniature: Miniature) -> None:
    found, shown = info(interrupted(miniature, "decode", picture=1, count=2))
    assert [(each["path"], each["seed"], each["written"]) for each in found["pictures"]] == [
        ("a-1.png", 5, True),
        ("a-2.png", 6, False),
    ]
    assert found["goes_on"] == "with picture 2 of 2, from the finished latent"
    assert re.search(r"^a-1\.png +5 +written$", shown, re.MULTILINE)


def test_a_torn_state_counts_as_none_as_it_does_when_the_run_goes_on(miniature: Miniature) -> None:
    folder = interrupted(miniature, "denoise")
    for state in folder.glob("state-*"):
        state.write_bytes(state.read_bytes()[:-1])
    assert read_status(folder).goes_on == "from step 0 of 2"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "handscroll run"}'])
def test_a_broken_run(miniature: Miniature, capsys: pytest.CaptureFixture[str], content: str) -> None:
    folder = interrupted(miniature, "denoise")
    (folder / "job.json").write_text(content)
    assert "a.png.run" in refused(folder, capsys, exit_code=1)


@pytest.mark.parametrize("key", ["id", "done", "request"])
def test_a_run_that_lacks_something(miniature: Miniature, capsys: pytest.CaptureFixture[str], key: str) -> None:
    folder = interrupted(miniature, "denoise")
    facts = json.loads((folder / "job.json").read_text())
    del facts[key]
    (folder / "job.json").write_text(json.dumps(facts))
    assert "its job.json is broken" in refused(folder, capsys, exit_code=1)


# What is not known


def refused(path: object, capsys: pytest.CaptureFixture[str], exit_code: int) -> str:
    capsys.readouterr()
    assert cli.run(["info", str(path)]) == exit_code
    ran = capsys.readouterr()
    assert ran.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", ran.err), ran.err
    return ran.err


def test_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing.png: no such file or folder" in refused("nothing.png", capsys, exit_code=2)
    assert "no such file" in refused("nowhere/", capsys, exit_code=2)


def test_what_is_of_no_known_kind(capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.txt").write_text("hello")
    Path("empty").mkdir()
    assert ".png" in refused("notes.txt", capsys, exit_code=2)
    assert "model_index.json" in refused("empty", capsys, exit_code=2)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_a_broken_picture(capsys: pytest.CaptureFixture[str], suffix: str, content: bytes) -> None:
    Path(f"a{suffix}").write_bytes(content)
    assert f"a{suffix}" in refused(f"a{suffix}", capsys, exit_code=2)


@pytest.mark.parametrize("content", [b"", b"not a weight", b"\x08\0\0\0\0\0\0\0[]      "])
def test_a_broken_weight_file(capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    Path("a.safetensors").write_bytes(content)
    assert "a.safetensors" in refused("a.safetensors", capsys, exit_code=1)


def test_a_weight_file_whose_metadata_is_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    header = json.dumps({"__metadata__": [1]}).encode()
    Path("a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "metadata" in refused("a.safetensors", capsys, exit_code=1)


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "vae"])
def test_a_broken_checkpoint(
    miniature: Miniature, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(miniature(), tmp_path / "broken"))
    if (folder / name).is_dir():
        shutil.rmtree(folder / name)
    else:
        (folder / name).write_text("[1, 2")
    assert str(folder / name) in refused(folder, capsys, exit_code=1)


def test_a_checkpoint_with_a_pickle_is_refused_as_everywhere(
    miniature: Miniature, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(miniature(), tmp_path / "broken"))
    for file in (folder / "vae").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    assert "pickle" in refused(folder, capsys, exit_code=1)


def test_a_deep_zoom_index_without_a_size() -> None:
    Path("a.dzi").write_text('<Image><Size Width="3"/></Image>')
    with pytest.raises(handscroll.FormatError, match="Deep Zoom"):
        read_size(Path("a.dzi"))


# The command itself


def test_its_help_opens_with_examples_that_run(miniature: Miniature, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(miniature, "denoise")
    Path("a.png.run").rename("dusk.png.run")
    job = Path("dusk.png.run/job.json")
    job.write_text(job.read_text().replace("a.png", "dusk.png"))
    write_picture(Path("dusk.png"))
    assert cli.run(["info", "--help"]) == 0
    examples = re.findall(r"^ +handscroll (.+)$", capsys.readouterr().out, re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        assert cli.run(shlex.split(example)) == 0
        assert capsys.readouterr().out


def test_it_loads_no_torch() -> None:
    save_latent(Path("a.safetensors"), torch.ones(1, 32, 4, 3), {"prompt": "a lake"})
    write_picture(Path("a.png"))
    for path in ("a.safetensors", "a.png", BUILTIN):
        code = (
            "import sys; from handscroll.cli.main import run; code = run(['info', sys.argv[1]]); "
            "print(code, {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules))"
        )
        ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        assert ran.stdout.endswith("0 set()\n"), ran
