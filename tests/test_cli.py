"""The command line as its users meet it: what is printed where, exit codes, and what is left behind.

Most tests call `cli.run` in this process, which is all that the `handscroll` command does; what only a process of its
own can show (import time, a file size limit, two runs at once, a closed pipe) gets one.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import pyvips
import torch
from huggingface_hub import constants
from rich.console import Console

from handscroll import pipeline
from handscroll.cli import launch, work
from handscroll.cli import main as cli
from handscroll.cli.doctor import health_text
from handscroll.cli.progress import progress_bars
from handscroll.errors import BudgetError
from handscroll.events import OnEvent, Progress, ignore, notice
from handscroll.jobs import job as jobs
from handscroll.jobs.latent_file import save_latent
from handscroll.jobs.result import Result
from handscroll.models.registry import ENTRIES
from handscroll.pictures.metadata import read_parameters
from handscroll.request import Request, indexed
from handscroll.runtime import health
from handscroll.version import __version__

ROOT = Path(__file__).parents[1]
COMMANDS = ("generate", "decode", "resume", "models", "doctor")


@pytest.fixture(scope="module", autouse=True)
def _small_pictures_want_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclasses.dataclass
class Ran:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


Shell = Callable[..., Ran]


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """`shell("generate", "a lake", ...)` in an empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HANDSCROLL_TRACEBACK", raising=False)

    def run(*arguments: object, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        exit_code = cli.run([str(argument) for argument in arguments])
        return Ran(exit_code, *capsys.readouterr())

    return run


@pytest.fixture
def tiny(miniature: Callable[..., Path]) -> tuple[object, ...]:
    """Options for the quickest real picture."""
    return ("--model", miniature(), "--size", "72x104", "--steps", 1)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The pipeline only notes what it is asked for, and writes empty files."""
    calls: list[dict[str, Any]] = []

    def generate(request: Request, path: Path, **options: Any) -> list[Result]:
        calls.append({"request": request, "path": path, **options})
        paths = [indexed(path, index, request.count) for index in range(request.count)]
        for each in paths:
            each.touch()
        return [_result(each, seed=(request.seed or 0) + index) for index, each in enumerate(paths)]

    def decode_latent(latent: Path, path: Path, **options: Any) -> Result:
        calls.append({"latent": latent, "path": path, **options})
        return _result(path)

    def resume(run: Path, **options: Any) -> list[Result]:
        calls.append({"run": run, **options})
        return [_result(run.with_suffix(""))]

    monkeypatch.setattr(pipeline, "generate", generate)
    monkeypatch.setattr(pipeline, "decode_latent", decode_latent)
    monkeypatch.setattr(pipeline, "resume", resume)
    job = types.SimpleNamespace(request=Request("a sun"))
    monkeypatch.setattr(jobs, "find_run", lambda path: path)
    monkeypatch.setattr(jobs, "read_job", lambda folder: job)
    return calls


def _result(path: Path, seed: int = 0) -> Result:
    memory: dict[str, Any] = {
        "budget_bytes": None,
        "planned_peak_bytes": None,
        "measured_peak_bytes": 3 << 30,
        "stages": {},
    }
    return Result(path, 64, 32, seed, 20, 4.5, "tiny", "fp32", "rows", True, memory, {"total": 1.25})


def _fail_with(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def _files(folder: Path = Path()) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _refused(shell: Shell, *arguments: object, exit_code: int, stdin: bytes = b"") -> str:
    """The message of a command that must fail in one line and leave nothing behind; the same under --json."""
    before = _files()
    plain = shell(*arguments, stdin=stdin)
    assert plain.exit_code == exit_code, plain
    assert plain.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", plain.stderr), plain.stderr
    message = plain.stderr.removeprefix("error: ").rstrip("\n")
    as_json = shell(*arguments, "--json", stdin=stdin)
    assert (as_json.exit_code, as_json.stderr) == (exit_code, plain.stderr)
    assert as_json.json.keys() == {"error"}
    assert as_json.json["error"]["message"] == message
    assert as_json.json["error"]["code"]
    assert _files() == before
    return message


# Help


def test_help_is_instant() -> None:
    heavy = {
        "torch",
        "diffusers",
        "transformers",
        "pyvips",
        "numpy",
        "rich",
        "huggingface_hub",
        "safetensors",
        "pydantic",
    }
    code = f"from handscroll.cli.main import run; run(['generate', '--help']); print({heavy} & set(sys.modules))"
    ran = _python("-c", f"import sys; {code}")
    assert ran.stdout.endswith("set()\n"), ran


def test_the_program_without_a_command_prints_its_help(shell: Shell) -> None:
    ran = shell()
    assert ran == shell("--help") == shell("-h")
    assert ran.exit_code == 0
    for command in COMMANDS:
        assert command in ran.stdout


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_opens_with_examples_that_run(
    shell: Shell, asked: list[Any], monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    examples = re.findall(r"^ +handscroll (.+)$", shell(*command, "--help").stdout, re.MULTILINE)
    assert 2 <= len(examples) <= 3
    monkeypatch.setattr(health, "NEEDED", {})
    for example in examples:
        arguments, _, stdin = example.partition(" < ")
        ran = shell(*shlex.split(arguments), stdin=stdin.encode())
        assert ran.exit_code == 0, ran
        assert ran.stdout


def test_version(shell: Shell) -> None:
    assert shell("--version") == Ran(0, f"handscroll {__version__}\n", "")


# A picture


def test_a_picture_is_made_and_its_path_printed(shell: Shell, tiny: tuple[object, ...]) -> None:
    ran = shell("generate", "a Red sun", *tiny, "--seed", 7, "-o", "sun.png")
    assert (ran.exit_code, ran.stdout) == (0, "sun.png\n")
    assert re.fullmatch(r"72x104, [\d.]+ s, peak [\d.]+ [GM]iB, seed 7\n", ran.stderr)
    picture = pyvips.Image.new_from_file("sun.png")
    assert (picture.width, picture.height) == (72, 104)
    assert read_parameters(Path("sun.png")).startswith("a Red sun\nSteps: 1, ")
    assert _files() == ["sun.png"]


def test_json_is_one_object_as_the_contract_says(shell: Shell, tiny: tuple[object, ...]) -> None:
    ran = shell("generate", "a sun", *tiny, "-o", "sun.jpg", "--quality", 80, "--json")
    assert (ran.exit_code, ran.stderr) == (0, "")
    found = ran.json
    expected = {"path": "sun.jpg", "width": 72, "height": 104, "steps": 1, "model": "1.6b", "exact": True}
    assert expected.items() <= found.items()
    assert isinstance(found["seed"], int)
    assert found["precision"]
    assert found["memory"].keys() == {"budget_bytes", "planned_peak_bytes", "measured_peak_bytes", "stages"}
    assert found["memory"]["measured_peak_bytes"] > 0
    for stage in ("text", "denoise", "decode"):
        assert found["memory"]["stages"][stage].keys() == {"planned_bytes", "measured_bytes"}
    assert found["seconds"].keys() == {"text", "denoise", "decode", "total"}


def test_several_pictures(shell: Shell, tiny: tuple[object, ...]) -> None:
    ran = shell("generate", "suns", *tiny, "--seed", 5, "--count", 2, "-o", "sun.png", "--json")
    assert [(each["path"], each["seed"]) for each in ran.json["pictures"]] == [("sun-1.png", 5), ("sun-2.png", 6)]
    assert ran.json.keys() == {"pictures"}
    assert _files() == ["sun-1.png", "sun-2.png"]


def test_several_pictures_are_one_path_a_line_and_one_summary(shell: Shell, asked: list[Any]) -> None:
    ran = shell("generate", "suns", "--seed", 5, "--count", 3, "-o", "sun.png")
    assert ran.stdout == "sun-1.png\nsun-2.png\nsun-3.png\n"
    assert ran.stderr == "3 pictures of 64x32, 3.8 s, peak 3.0 GiB, seeds 5 to 7\n"
    assert shell("generate", "suns", "--count", 3, "-o", "sun.png", "--quiet").stderr == ""


def test_a_kept_latent_decodes_to_the_same_picture(shell: Shell, tiny: tuple[object, ...]) -> None:
    assert shell("generate", "a sun", *tiny, "-o", "a.png", "--save-latent", "a.safetensors").exit_code == 0
    ran = shell("decode", "a.safetensors", "-o", "b.png")
    assert (ran.exit_code, ran.stdout) == (0, "b.png\n")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    found = shell("decode", "a.safetensors", "-o", "c.webp", "--decode", "tiled", "--json").json
    assert (found["path"], found["decode"], found["exact"]) == ("c.webp", "tiled", False)
    assert _files() == ["a.png", "a.safetensors", "b.png", "c.webp"]


@pytest.mark.parametrize("decode", ["whole", "patch"])
def test_other_ways_to_decode(shell: Shell, tiny: tuple[object, ...], decode: str) -> None:
    ran = shell("generate", "a sun", *tiny, "-o", "sun.png", "--decode", decode, "--patches", 4, "--json")
    assert ran.exit_code == 0, ran
    assert ran.json["exact"] is True


def test_every_option_reaches_the_pipeline(shell: Shell, asked: list[dict[str, Any]]) -> None:
    options = "--model sana-1.6b --size 64x96 --steps 3 --guidance 2.5 --negative fog --seed 9 --count 2"
    options += " --precision bf16 --device cuda:1 --decode patch --patches 8 --strip-rows 2"
    assert shell("generate", "a lake", *options.split(), "-o", "a.jpg", "--quality", 70).exit_code == 0
    [call] = asked
    assert call == {
        "request": Request(
            "a lake", "fog", "sana-1.6b", 64, 96, 3, 2.5, 9, 2, "bf16", "cuda:1", "patch", patches=8, strip_rows=2
        ),
        "path": Path("a.jpg"),
        "save_latent": None,
        "quality": 70,
        "on_event": call["on_event"],
        "on_failure": launch.end_of_rank,
    }


def test_every_option_of_decode_reaches_the_pipeline(shell: Shell, asked: list[dict[str, Any]]) -> None:
    options = (
        "--model sana-1.6b --precision bf16 --device cuda:1 --decode patch --patches 8 --strip-rows 2 --memory 2GiB"
    )
    assert shell("decode", "a.safetensors", *options.split(), "-o", "a.jpg", "--quality", 70).exit_code == 0
    [call] = asked
    assert asked == [
        {
            "latent": Path("a.safetensors"),
            "path": Path("a.jpg"),
            "model": "sana-1.6b",
            "precision": "bf16",
            "device": "cuda:1",
            "decode": "patch",
            "patches": 8,
            "strip_rows": 2,
            "memory_bytes": 2 * 2**30,
            "quality": 70,
            "fetch": False,
            "on_event": call["on_event"],
        }
    ]


def test_every_option_of_resume_reaches_the_pipeline(shell: Shell, asked: list[dict[str, Any]]) -> None:
    options = "--device cuda:1 --memory 2GiB --quiet"
    assert shell("resume", "a.png.run", *options.split()) == Ran(0, "a.png\n", "")
    assert asked == [
        {
            "run": Path("a.png.run"),
            "device": "cuda:1",
            "memory_bytes": 2 * 2**30,
            "save_latent": None,
            "fetch": False,
            "on_event": ignore,
            "on_failure": launch.end_of_rank,
        }
    ]


def test_left_out_means_the_models_own(shell: Shell, asked: list[dict[str, Any]]) -> None:
    assert shell("generate", "a lake", "-o", "a.png").exit_code == 0
    request = asked[0]["request"]
    assert dataclasses.replace(request, seed=None) == Request("a lake")


def test_the_prompt_comes_from_stdin(shell: Shell, asked: list[dict[str, Any]]) -> None:
    assert shell("generate", "-", "-o", "a.png", stdin="ein großer See\n".encode()).exit_code == 0
    assert asked[0]["request"].prompt.strip() == "ein großer See"


# A name for the picture


def test_a_name_is_made_of_the_prompt_and_overwrites_nothing(shell: Shell, asked: list[Any]) -> None:
    for name in ("a-quiet-lake-7.png", "a-quiet-lake-7-2.png", "a-quiet-lake-7-3.png"):
        assert shell("generate", "A quiet lake!", "--seed", 7).stdout == f"{name}\n"


def test_several_names_are_free_together(shell: Shell, asked: list[Any]) -> None:
    Path("lake-7-2.png").touch()
    assert shell("generate", "lake", "--seed", 7, "--count", 2).stdout == "lake-7-2-1.png\nlake-7-2-2.png\n"


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("../../etc/passwd", "etc-passwd-1.png"),
        ("🌊🌊", "picture-1.png"),
        ("雪山 と 湖", "雪山-と-湖-1.png"),
        ("one two three four five six seven", "one-two-three-four-five-six-1.png"),
        ("x" * 1000, f"{'x' * 48}-1.png"),
        ("-- __ --", "picture-1.png"),
    ],
)
def test_names_of_odd_prompts(shell: Shell, asked: list[Any], prompt: str, name: str) -> None:
    assert shell("generate", "--seed", 1, "--", prompt).stdout == f"{name}\n"


def test_a_name_that_stdout_cannot_spell_is_no_failure(tmp_path: Path) -> None:
    code = """
import sys, types
sys.modules["handscroll.pipeline"] = types.SimpleNamespace(
    generate=lambda request, path, **_: [types.SimpleNamespace(path=path)]
)
sys.stdout.reconfigure(encoding="ascii", errors="strict")
from handscroll.cli import main as cli
cli.main()
"""
    ran = _python("-c", code, "generate", "雪", "--seed", 1, "--quiet", cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "\\u96ea-1.png\n", "")


def test_a_random_seed_is_told(shell: Shell, asked: list[Any]) -> None:
    ran = shell("generate", "a lake")
    seed = re.search(r"seed (\d+)", ran.stderr)
    assert seed is not None
    assert ran.stdout == f"a-lake-{seed[1]}.png\n"


# Bad usage


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate"], "PROMPT"),
        (["paint"], "paint"),
        (["generate", "a", "--zoom"], "--zoom"),
        (["generate", "a", "b"], "b"),
        (["generate", "a", "--steps", "abc"], "--steps"),
        (["generate", "a", "--steps", "0"], "steps 0"),
        (["generate", "a", "--guidance", "nan"], "guidance"),
        (["generate", "a", "--guidance", "-1"], "guidance"),
        (["generate", "a", "--seed", "-2"], "seed"),
        (["generate", "a", "--seed", str(2**64)], "seed"),
        (["generate", "a", "--count", "0"], "count"),
        (["generate", "a", "--quality", "101", "-o", "a.jpg"], "--quality"),
        (["generate", "a", "--precision", "fp7"], "auto, fp32, bf16, fp16, int8, int8-weights, int4, fp8"),
        (["generate", "a", "--decode", "fast"], "rows, whole, tiled, patch"),
        (["generate", "a", "--device", "gpu"], "cuda:N"),
        (["generate", "a", "--patches", "0"], "patches"),
        (["generate", "a", "--strip-rows", "0"], "strip rows"),
        (["generate", "a", "--size", "0"], "32 to"),
        (["generate", "a", "--size", "31"], "32 to"),
        (["generate", "a", "--size", "1000000"], "32 to"),
        (["generate", "a", "--size", "64x1000000"], "height 1000000"),
        (["generate", "a", "--size", "abc"], "4096x2048"),
        (["generate", "a", "--size", "-64"], "4096x2048"),
        (["generate", "a", "--size", ""], "4096x2048"),
        (["generate", ""], "empty"),
        (["generate", "  \n "], "empty"),
        (["generate", "-"], "empty"),
        (["generate", "long " * 20_000], "100,000 characters"),
        (["generate", "a", "--negative", "x" * 100_000], "negative prompt has 100,000 characters"),
        (["generate", "a", "--model", "sana-1.6"], "sana-1.6b"),
        (["generate", "a", "--model", ""], "handscroll models"),
        (["generate", "a", "--model", "./nowhere"], "no such model folder"),
        (["generate", "a", "-o", "a.bmp"], ".png .jpg"),
        (["generate", "a", "-o", "a"], ".png .jpg"),
        (["generate", "a", "-o", "a.webp", "--size", "20000"], "16383"),
        (["generate", "a", "--save-latent", "a.bin"], ".safetensors"),
        (["decode", "a.safetensors"], "--output"),
        (["decode", "a.safetensors", "-o", "a.bmp"], ".png .jpg"),
        (["decode", "a.safetensors", "-o", "a.png", "--model", "sana"], "no model 'sana'"),
        (["models", "all"], "all"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60],
)
def test_bad_usage_is_refused_before_the_libraries_are_loaded(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.setitem(sys.modules, "handscroll.pipeline", None)
    monkeypatch.delattr("handscroll.pipeline")
    assert says in _refused(shell, *arguments, exit_code=2)


def test_a_prompt_that_is_no_text_is_refused(shell: Shell) -> None:
    assert "UTF-8" in _refused(shell, "generate", "-", stdin=b"\xff\xfe\x00", exit_code=2)


def test_a_closed_stdin_holds_no_prompt(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.run(["generate", "-"]) == 2


def test_a_device_that_is_not_here_is_refused(shell: Shell, tiny: tuple[object, ...]) -> None:
    message = _refused(shell, "generate", "a", *tiny, "--device", "cuda:99", "-o", "a.png", exit_code=2)
    assert "cuda:99" in message


# Bad places


@pytest.mark.parametrize("option", ["-o", "--save-latent"])
@pytest.mark.parametrize("parent", ["missing", "file"])
def test_an_unwritable_place_is_refused_before_the_libraries_are_loaded(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, option: str, parent: str
) -> None:
    monkeypatch.setitem(sys.modules, "handscroll.pipeline", None)
    monkeypatch.delattr("handscroll.pipeline")
    Path("file").touch()
    name = "a.png" if option == "-o" else "a.safetensors"
    assert parent in _refused(shell, "generate", "a", option, f"{parent}/{name}", exit_code=1)


def test_a_full_disk_leaves_the_finished_latent(tiny: tuple[object, ...], tmp_path: Path) -> None:
    """The limit on file size stands for the disk: both show as a failing write in the middle."""
    code = (
        "import resource, sys; from handscroll.cli import main as cli; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); sys.exit(cli.run(sys.argv[1:]))"
    )
    ran = _python("-c", code, "generate", "a", *tiny, "-o", "a.png", "--json", cwd=tmp_path)
    assert ran.returncode == 1, ran
    assert re.fullmatch(r"error: [^\n]*limit[^\n]*a\.png[^\n]*\n", ran.stderr), ran.stderr
    assert json.loads(ran.stdout)["error"]["code"] == "cannot_write"
    assert "`handscroll resume a.png.run` goes on from the finished latent" in ran.stderr
    assert _files(tmp_path) == [
        "a.png.run",
        *(f"a.png.run/{name}" for name in ("job.json", "latent-1.safetensors", "lock")),
    ]
    ran = _python("-m", "handscroll", "resume", "a.png.run", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (0, "a.png\n")
    assert _files(tmp_path) == ["a.png"]


HALF_WAY = """
import contextlib, pathlib, sys, time
from handscroll.cli import main as cli, work

def wait(event):
    if event.stage == "decode" and event.done:
        pathlib.Path(sys.argv[1], "half").touch()
        while not pathlib.Path(sys.argv[1], "go").exists():
            time.sleep(0.01)

work.watching = lambda *_: contextlib.nullcontext(wait)
sys.exit(cli.run(sys.argv[2:]))
"""


def test_two_runs_do_not_work_on_the_same_file(shell: Shell, tiny: tuple[object, ...], tmp_path: Path) -> None:
    """One stops half-way through its rows; meanwhile the other is refused, whatever it wants to paint there."""
    arguments = ("generate", "a sun", *tiny, "-o", "sun.png", "--save-latent", "sun.safetensors", "--seed")
    first = _start("-c", HALF_WAY, tmp_path, *arguments, 1)
    while not (tmp_path / "half").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    for command in ((*arguments, 1), (*arguments, 2), ("resume", "sun.png.run")):
        ran = shell(*command, "--json")
        assert (ran.exit_code, ran.json["error"]["code"]) == (1, "busy")
        assert re.fullmatch(r"error: sun\.png\.run: another process [^\n]+\n", ran.stderr)
    (tmp_path / "go").touch()
    stdout, _ = first.communicate(timeout=60)
    assert (first.returncode, stdout) == (0, "sun.png\n")
    assert "Seed: 1" in read_parameters(Path("sun.png"))
    assert _files() == ["sun.png", "sun.safetensors"]


# Bad checkpoints


@pytest.fixture
def broken(miniature: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of one's own, to break."""
    return Path(shutil.copytree(miniature(), tmp_path / "broken"))


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "vae"])
@pytest.mark.parametrize("left_bytes", [0, 100, -1])
def test_truncated_weights(shell: Shell, broken: Path, component: str, left_bytes: int) -> None:
    [file] = (broken / component).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:left_bytes])
    message = _refused(shell, "generate", "a", "--model", broken, "-o", "a.png", exit_code=1)
    assert str(file) in message


@pytest.mark.parametrize("component", ["tokenizer", "text_encoder", "transformer", "vae", "scheduler"])
def test_a_missing_component(shell: Shell, broken: Path, component: str) -> None:
    shutil.rmtree(broken / component)
    message = _refused(shell, "generate", "a", "--model", broken, "-o", "a.png", exit_code=1)
    assert str(broken / component) in message


@pytest.mark.parametrize(
    "name", ["model_index.json", "tokenizer/tokenizer.json", "transformer/config.json", "vae/config.json"]
)
@pytest.mark.parametrize("content", ["", "[1, 2", "[]"])
def test_broken_json(shell: Shell, broken: Path, name: str, content: str) -> None:
    (broken / name).write_text(content)
    message = _refused(shell, "generate", "a", "--model", broken, "-o", "a.png", exit_code=1)
    assert name.partition("/")[0] in message


def test_a_checkpoint_that_cannot_be_fetched(shell: Shell) -> None:
    message = _refused(shell, "generate", "a", "--model", "sana-1.6b", "-o", "a.png", exit_code=1)
    assert "offline" in message


@pytest.mark.parametrize("content", [None, b"", b"not a latent", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_broken_latent(shell: Shell, tiny: tuple[object, ...], content: bytes | None) -> None:
    if content is not None:
        Path("a.safetensors").write_bytes(content)
    message = _refused(shell, "decode", "a.safetensors", *tiny[:2], "-o", "a.png", exit_code=1)
    assert "a.safetensors" in message


def test_decoding_refuses_bad_usage(shell: Shell, tiny: tuple[object, ...]) -> None:
    save_latent(
        Path("a.safetensors"), torch.zeros(1, 32, 4, 3), {"model": str(tiny[1]), "width": "72", "height": "104"}
    )
    for option, value in [("--precision", "fp7"), ("--decode", "fast"), ("--device", "gpu"), ("--patches", "0")]:
        _refused(shell, "decode", "a.safetensors", "-o", "b.png", option, value, exit_code=2)


# What nobody meant


def test_a_bug_is_one_line_and_a_traceback_on_demand(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "generate", _fail_with(ZeroDivisionError("division\nby zero")))
    message = _refused(shell, "generate", "a", "-o", "a.png", exit_code=1)
    assert message.startswith("ZeroDivisionError: division by zero; ")
    monkeypatch.setenv("HANDSCROLL_TRACEBACK", "1")
    ran = shell("generate", "a", "-o", "a.png")
    assert "Traceback" in ran.stderr
    assert ran.stderr.endswith(f"error: {message}\n")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] data. DefaultCPUAllocator: not enough memory"),
    ],
)
def test_too_little_memory_says_what_to_try(shell: Shell, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(pipeline, "generate", _fail_with(error))
    message = _refused(shell, "generate", "a", "-o", "a.png", exit_code=1)
    assert message.startswith("out of memory; try ")


def test_a_refused_budget_has_its_own_exit_code(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "generate", _fail_with(BudgetError("needs 2 GiB", 2 << 30)))
    _refused(shell, "generate", "a", "-o", "a.png", exit_code=3)
    error = shell("generate", "a", "-o", "a.png", "--json").json["error"]
    assert error == {"code": "budget_too_small", "message": "needs 2 GiB", "minimum_bytes": 2 << 30}


@pytest.mark.parametrize(
    ("stage", "from_where"),
    [("text", ""), ("denoise", "from step 1 of 1"), ("decode", "from the finished latent")],
)
def test_control_c_keeps_what_is_finished(
    shell: Shell, tiny: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, stage: str, from_where: str
) -> None:
    def interrupt(event: Progress) -> None:
        if event.stage == stage and event.done > 0:
            signal.raise_signal(signal.SIGINT)

    @contextmanager
    def watching(*_: Any) -> Iterator[OnEvent]:
        yield interrupt

    with monkeypatch.context() as patch:
        patch.setattr(work, "watching", watching)
        ran = shell("generate", "a", *tiny, "-o", "a.png")
    note = f"; `handscroll resume a.png.run` goes on {from_where}" if from_where else ""
    assert ran == Ran(130, "", f"interrupted{note}\n")
    assert _files()[:1] == (["a.png.run"] if from_where else [])
    if from_where:
        assert shell("resume", "a.png").stdout == "a.png\n"
        assert _files() == ["a.png"]


def test_control_c_under_json(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "generate", _fail_with(KeyboardInterrupt()))
    ran = shell("generate", "a", "-o", "a.png", "--json")
    assert (ran.exit_code, ran.stderr) == (130, "interrupted\n")
    assert ran.json == {"error": {"code": "interrupted", "message": "interrupted"}}


def test_a_reader_that_leaves_early_is_no_drama(tmp_path: Path) -> None:
    code = (
        "import sys, time; from handscroll.cli.main import run; time.sleep(0.2); sys.exit(run(['generate', '--help']))"
    )
    process = _start("-c", code, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1
    process.stderr.close()


# Models


def test_models_json_is_a_list_as_the_contract_says(
    shell: Shell, broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = broken.parent / "cache"
    repository = cache / "models--Efficient-Large-Model--Sana_1600M_1024px_BF16_diffusers"
    folder = repository / "snapshots" / "abc"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(broken, folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    ran = shell("models", "--json")
    assert (ran.exit_code, ran.stderr) == (0, "")
    found = {model["name"]: model for model in ran.json}
    assert list(found) == [entry.name for entry in ENTRIES]
    for model in found.values():
        assert model.keys() == {"name", "hub_id", "folder", "native_px", "precision", "bytes", "licence"}
        assert (model["folder"] is None) == (model["bytes"] is None)
    here = found["sana-1.6b"]
    assert here["folder"] == str(folder)
    assert here["bytes"] == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert found["sana-1.6b-4k"]["folder"] is None

    table = shell("models").stdout.splitlines()
    assert table[0].split()[:3] == ["NAME", "PIXELS", "PRECISION"]
    assert next(line for line in table if line.startswith("sana-1.6b ")).endswith(str(folder))
    assert next(line for line in table if line.startswith("sana-1.6b-4k ")).endswith("not fetched")
    assert "non-commercial" in table[-1]


# Doctor


def test_doctor_finds_everything_that_these_tests_use(shell: Shell) -> None:
    ran = shell("doctor", "--json")
    assert (ran.exit_code, ran.stderr) == (0, "")
    found = ran.json
    assert found["ok"] is True
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["handscroll"] == __version__
    assert found["versions"]["libvips"].startswith("8.")
    assert found["devices"][0]["device"] == "cpu"
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    assert 0 < found["memory"]["available_bytes"] <= found["memory"]["total_bytes"]
    assert found["disk"]["here"]["free_bytes"] > 0
    assert found["hub"] == {"cache": constants.HF_HUB_CACHE, "offline": True}
    text = shell("doctor").stdout
    for words in (torch.__version__, "cores", "offline", constants.HF_HUB_CACHE):
        assert words in text


def test_doctor_names_what_is_broken_and_the_command_that_mends_it(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_module = importlib.import_module

    def broken_import(name: str) -> Any:
        if name == "pyvips":
            raise OSError("libvips.so.42: cannot open shared object file\nmore")
        return import_module(name)

    monkeypatch.setattr(importlib, "import_module", broken_import)
    ran = shell("doctor", "--json")
    assert ran.exit_code == 1
    assert ran.json["ok"] is False
    [problem] = [problem for problem in ran.json["problems"] if problem["needed"]]
    assert problem == {
        "part": "pyvips",
        "needed": True,
        "message": "libvips.so.42: cannot open shared object file",
        "mend": 'pip install --force-reinstall "pyvips[binary]>=3.0"',
    }
    ran = shell("doctor")
    assert ran.exit_code == 1
    assert "BROKEN: pyvips: libvips.so.42" in ran.stdout


def test_doctor_still_tells_the_rest_where_memory_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    found = health.examine()
    assert [problem.part for problem in found.problems if problem.needed] == ["psutil"]
    assert found.memory == {"total_bytes": None, "available_bytes": None}
    assert found.devices[0]["cores"] >= 1
    assert "unknown of unknown available" in health_text(found)


def test_doctor_knows_what_the_package_depends_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [re.split(r"[\[<>=]", requirement)[0] for requirement in project["dependencies"]] == list(health.NEEDED)


@pytest.mark.parametrize(
    ("package", "expected"),
    [
        ("torch", "torch<2.14,>=2.9"),
        ("huggingface_hub", "huggingface-hub<3,>=1.0"),
        ("pyvips", "pyvips[binary]>=3.0"),
        ("triton", "triton"),
    ],
)
def test_doctor_asks_the_installation_what_to_install(
    package: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = ["pytest>=8.0; extra == 'dev'", "triton>=3.4; (sys_platform == 'linux') and extra == 'dev'"]
    told += ["huggingface-hub<3,>=1.0", "pyvips[binary]>=3.0", "torch<2.14,>=2.9"]
    monkeypatch.setattr(metadata, "requires", lambda name: told if name == "handscroll" else None)
    assert health.requirement_of(package) == expected


def test_doctor_names_a_package_where_handscroll_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert health.requirement_of("torch") == "torch"


# Progress bars


def test_bars_show_every_stage() -> None:
    screen = io.StringIO()
    with progress_bars(2, Console(file=screen, force_terminal=True, width=100)) as on_event:
        on_event(Progress("fetch", 1 << 20, 3 << 20, detail="owner/model"))
        on_event(Progress("text", 0, 1))
        on_event(Progress("text", 1, 1))
        for picture in range(2):
            on_event(Progress("denoise", 1, 20, picture))
            on_event(Progress("decode", 512, 4096, picture))
            on_event(Progress("write", 1, 1, picture))
    drawn = screen.getvalue()
    for words in ("fetching (owner/model)", "1.0 MiB of 3.0 MiB", "reading the prompt", "denoising 2/2", "1/20 steps"):
        assert words in drawn
    assert "512/4,096 rows" in drawn


@pytest.mark.parametrize(
    ("terminal", "quiet", "drawn"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_bars_are_for_those_who_watch_and_notices_for_all_but_the_quiet(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, quiet: bool, drawn: bool
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stderr)
    with work.watching(quiet) as on_event:
        assert (on_event is ignore) == quiet
        on_event(notice("mind\nthe step"))
        on_event(Progress("denoise", 1, 20))
    assert ("note: mind the step\n" in stderr.getvalue()) == (not quiet)
    assert ("denoising" in stderr.getvalue()) == drawn


# Processes


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def _python(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, env=_environment(), cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def _start(*arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(
        command, env=_environment(), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
