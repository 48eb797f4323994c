"""One table of options: the command line, the class and JSON follow it, and a new option is one line of it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import typer

from handscroll import Handscroll, api, decode_latent
from handscroll.cli.main import app
from handscroll.cli.options import takes_options
from handscroll.errors import PromptError, SizeError, UsageError
from handscroll.models.opening import open_checkpoint
from handscroll.models.quantisation import STORAGES
from handscroll.options import check_fields, fields_of, option, options_of, within
from handscroll.plan.precision import BYTES
from handscroll.request import COMPUTED, STORED, DecodeName, Request, TextPrecisionName

# What commands have beside the table, by the names of their parameters.
OF_NO_PICTURE = {"output", "save_latent", "quality", "yes", "as_json", "quiet", "help", "link", "latency"}
OF_A_PICTURE = {"negative", "size", "steps", "guidance", "compose"}
TAKEN = {
    "generate": OF_A_PICTURE
    | {"model", "revision", "seed", "count", "precision", "device", "decode", "patches", "strip_rows", "memory"}
    | {"text_precision", "devices"},
    "plan": OF_A_PICTURE
    | {"model", "revision", "precision", "text_precision", "device", "devices", "strip_rows", "memory"},
    "decode": {"model", "revision", "precision", "device", "decode", "patches", "strip_rows", "memory"},
    "bench": {"model", "revision", "size", "precision", "device"},
    "resume": {"model", "device", "devices", "memory"},
    "compare": OF_A_PICTURE
    | {"model", "revision", "seed", "precision", "device", "decode", "patches", "strip_rows", "memory"}
    | {"text_precision"},
    "scroll": OF_A_PICTURE | {"seed", "decode", "patches", "strip_rows"},
    "from_pretrained": {"revision", "precision", "text_precision", "device", "memory"},
}


def command_named(name: str, program: typer.Typer = app) -> Any:
    found: Any = typer.main.get_command(program)
    return found.commands[name] if hasattr(found, "commands") else found


def taken_by(command: str) -> set[str]:
    return {each.name for each in options_of(Request) if each.is_for(command)}


# The table


@pytest.mark.parametrize("command", TAKEN)
def test_the_table_says_what_takes_an_option(command: str) -> None:
    assert taken_by(command) == TAKEN[command]


def test_every_field_but_the_prompt_is_an_option() -> None:
    fields = [field.name for field in dataclasses.fields(Request)]
    assert ["prompt", *(field for each in options_of(Request) for field in each.fields)] == fields
    for each in options_of(Request):
        assert each.help
        assert each.metavar


def test_words_are_declared_once() -> None:
    choices = {each.name: each.choices for each in options_of(Request) if each.choices}
    assert choices == {
        "text_precision": ("auto", "int8-weights", "int4"),
        "decode": ("rows", "whole", "tiled", "patch"),
    }
    assert choices["text_precision"] == get_args(TextPrecisionName)
    assert choices["decode"] == get_args(DecodeName)


@pytest.mark.parametrize("precision", ["auto", *COMPUTED, *STORED, "int8+bf16", "int4+fp32", "int8-weights+fp16"])
def test_precisions_that_are_known(precision: str) -> None:
    assert Request("a", precision=precision).precision == precision


@pytest.mark.parametrize(
    "precision", ["", "int3", "bf16+int8", "int8+", "+bf16", "int8+int4", "int8+auto", "auto+bf16", "bf16+bf16", "INT8"]
)
def test_precisions_that_are_not(precision: str) -> None:
    with pytest.raises(UsageError, match=r"^precision .* is not known; ") as error:
        Request("a", precision=precision)
    assert "\n" not in str(error.value)


def test_what_is_stored_and_computed_in_is_known_elsewhere_too() -> None:
    assert STORED == STORAGES
    assert tuple(BYTES) == COMPUTED


# Who has it


@pytest.mark.parametrize("command", ["generate", "plan", "decode", "bench", "resume"])
def test_a_command_has_what_the_table_says(command: str) -> None:
    parameters = {each.name: each for each in command_named(command).params if each.param_type_name == "option"}
    assert parameters.keys() - OF_NO_PICTURE == taken_by(command)
    for each in options_of(Request):
        if each.is_for(command):
            shown = parameters[each.name]
            assert shown.opts == [each.flag]
            assert shown.metavar == each.metavar
            assert shown.help == each.left_to.get(command, each.help)
            assert shown.default == (None if command in each.left_to else each.default)


@pytest.mark.parametrize("command", ["generate", "plan", "decode", "bench", "resume"])
def test_what_is_left_out_is_the_fields_own_default(command: str) -> None:
    left_out = {
        each.name: each.default for each in command_named(command).params if each.name not in {*OF_NO_PICTURE, "prompt"}
    }
    left_out = {name: value for name, value in left_out.items() if name in taken_by(command)}
    assert Request.of("a lake", **left_out) == Request("a lake")


def test_the_class_takes_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def asked(spec: Any, request: Request) -> None:
        raise Asked(request)

    monkeypatch.setattr(api, "probe", asked)
    scroll = Handscroll(open_checkpoint("tiny-landscape"), "cpu", "bf16", 2**30)
    given: dict[str, Any] = {"negative": "fog", "size": "64x96", "steps": 3, "guidance": 2.5, "seed": 9, "patches": 8}
    given |= {"strip_rows": 2, "compose": "off", "decode": "rows"}
    assert given.keys() == taken_by("scroll")
    with pytest.raises(Asked) as caught:
        scroll("a lake", **given)
    own = {"precision": "bf16", "device": "cpu", "memory_bytes": 2**30}
    assert caught.value.args[0] == Request.of("a lake", **given, **own)
    opened = Handscroll.from_pretrained(device="cpu", precision="bf16", memory="1GiB")
    assert (opened.device, opened.precision, opened.memory_bytes) == ("cpu", "bf16", 2**30)
    assert taken_by("from_pretrained") == {"device", "precision", "text_precision", "memory", "revision"}
    with pytest.raises(UsageError, match="no option of from_pretrained"):
        Handscroll.from_pretrained(steps=3)
    with pytest.raises(UsageError, match=r"memory is no option of scroll; it is one of generate, .*from_pretrained"):
        scroll("a lake", memory="1GiB")


def test_decoding_a_latent_takes_what_the_table_says(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="steps is no option of decode"):
        decode_latent(tmp_path / "a.safetensors", tmp_path / "a.png", steps=3)
    with pytest.raises(UsageError, match="strip rows 0"):
        decode_latent(tmp_path / "a.safetensors", tmp_path / "a.png", strip_rows=0)


# From options to a request


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"size": "64x96"}, {"width": 64, "height": 96}),
        ({"size": "64"}, {"width": 64, "height": 64}),
        ({"size": 64}, {"width": 64, "height": 64}),
        ({"size": (64, 96)}, {"width": 64, "height": 96}),
        ({"size": None, "width": 64}, {"width": 64}),
        ({"width": "64"}, {"width": 64}),
        ({"memory": "2GiB"}, {"memory_bytes": 2**31}),
        ({"memory": 2**31}, {"memory_bytes": 2**31}),
        ({"memory_bytes": 2**31, "memory": None}, {"memory_bytes": 2**31}),
        ({"compose": "off"}, {"compose_px": 0}),
        ({"compose": 0}, {"compose_px": 0}),
        ({"compose": "auto"}, {}),
        ({"compose": None}, {}),
        ({"compose": "512"}, {"compose_px": 512}),
        ({"compose_px": 512}, {"compose_px": 512}),
        ({"steps": "3", "guidance": "2.5", "seed": None}, {"steps": 3, "guidance": 2.5}),
        ({"steps": np.int64(3), "guidance": 2}, {"steps": 3, "guidance": 2.0}),
        ({"strip-rows": 4, "precision": "bf16"}, {"strip_rows": 4, "precision": "bf16"}),
        ({"model": Path("folder"), "decode": None}, {"model": "folder"}),
    ],
    ids=str,
)
def test_options_as_text_as_values_and_as_fields(options: dict[str, Any], fields: dict[str, Any]) -> None:
    made = Request.of("a lake", **options)
    assert made == Request("a lake", **fields)
    assert json.loads(json.dumps(dataclasses.asdict(made))) == dataclasses.asdict(Request("a lake", **fields))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stepz": 3}, "no option 'stepz'; did you mean steps?"),
        ({"widht": 3}, "did you mean width?"),
        ({"qqq": 3}, "the options are negative, model, size, .*compose_px"),
        ({"size": "64", "width": 64}, "width and size say the same; give one of them"),
        ({"memory_bytes": 1, "memory": "1GiB"}, "memory and memory_bytes say the same"),
        ({"size": "abc"}, "4096x2048"),
        ({"size": (64, 64, 64)}, "should have 2 values"),
        ({"size": (64, 6)}, "height 6 is out of range"),
        ({"memory": "lots"}, "memory 'lots' is not an amount"),
        ({"compose": "on"}, "compose 'on'"),
        ({"compose": 3}, "compose 3 is out of range"),
        ({"steps": "many"}, "steps 'many' is not a whole number"),
        ({"steps": 2.5}, "steps 2.5 is not a whole number"),
        ({"steps": True}, "steps True is not a whole number"),
        ({"guidance": "x"}, "guidance 'x' is not a number"),
        ({"negative": 3}, "negative 3 is not text"),
        ({"decode": "fast"}, "decode 'fast' is not known; use one of rows, whole, tiled, patch"),
        ({"precision": 16}, "precision 16 is not text"),
        ({"device": "gpu"}, "device 'gpu' is not known"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_in_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as refused:
        Request.of("a lake", **options)
    assert "\n" not in str(refused.value)


def test_errors_keep_their_kinds() -> None:
    with pytest.raises(SizeError):
        Request.of("a lake", size="31")
    with pytest.raises(PromptError):
        Request.of(" ")
    with pytest.raises(UsageError, match="precision None"):
        Request("a lake", precision=None)  # type: ignore[arg-type]


def test_a_command_takes_its_own_options_alone() -> None:
    assert fields_of(Request, {"device": "cpu", "memory": None}, "resume") == {"device": "cpu"}
    with pytest.raises(
        UsageError, match="size is no option of resume; it is one of generate, batch, plan, scroll, compare, bench"
    ):
        fields_of(Request, {"size": "64"}, "resume")


# A new option


@dataclass(frozen=True)
class Longer(Request):
    """The table with one line more."""

    frame: int = option(0, "Paint a frame of so many pixels.", metavar="PX", check=within(0, 64))


def helped(run: Callable[..., None]) -> str:
    program = typer.Typer(add_completion=False, rich_markup_mode=None)
    program.command()(run)
    command = command_named("run", program)
    return command.get_help(typer.Context(command, info_name="run", terminal_width=100))


def test_a_new_option_is_one_line_of_the_table() -> None:
    made = []

    @takes_options("generate", Longer)
    def run(prompt: str, *, quiet: bool = False, **options: Any) -> None:
        made.append(Longer.of(prompt, **options))

    shown = " ".join(helped(run).split())
    assert "--frame PX Paint a frame of so many pixels. [default: 0]" in shown
    assert shown.index("--compose") < shown.index("--frame") < shown.index("--quiet")

    program = typer.Typer(add_completion=False)
    program.command()(run)
    command_named("run", program).main(["a lake", "--frame", "8", "--size", "64"], standalone_mode=False)
    assert made == [Longer.of("a lake", frame=8, size=64)]
    assert made[0].frame == 8
    assert json.loads(json.dumps(dataclasses.asdict(made[0])))["frame"] == 8
    assert Longer(**dataclasses.asdict(made[0])) == made[0]
    with pytest.raises(UsageError, match="frame 65 is out of range; use 0 to 64"):
        Longer("a lake", frame=65)
    with pytest.raises(UsageError, match="did you mean frame"):
        Longer.of("a lake", frme=8)
    assert "frame" not in {each.name for each in options_of(Request)}


@dataclass(frozen=True)
class Toy:
    """Every kind of option."""

    loud: bool = option(False, "Say more.", commands=("toy",))
    pace: Literal["slow", "fast"] = option("slow", "How fast.", commands=("toy",))
    left: int = option(0, "Where.", name="place", metavar="X,Y", commands=("toy",), parse=lambda text: text.split(","))
    top: int = option(0, name="place")

    def __post_init__(self) -> None:
        check_fields(self)


def test_every_kind_of_option() -> None:
    @takes_options("toy", Toy)
    def run(**options: Any) -> None:
        """Play."""

    shown = " ".join(helped(run).split())
    assert "--loud Say more." in shown
    assert "--pace slow|fast How fast. [default: slow]" in shown
    assert fields_of(Toy, {"loud": True, "place": "3,4", "pace": "fast"}) == {
        "loud": True,
        "left": 3,
        "top": 4,
        "pace": "fast",
    }
    with pytest.raises(UsageError, match="loud 1 is not true or false"):
        Toy(loud=1)  # type: ignore[arg-type]


def test_what_no_option_can_be_is_refused_where_it_is_declared() -> None:
    @dataclass(frozen=True)
    class Wrong:
        things: list[str] = option(None, "What?")

    with pytest.raises(TypeError, match="an option cannot be"):
        options_of(Wrong)


def test_the_table_needs_no_torch() -> None:
    heavy = ("torch", "numpy", "typer", "rich", "huggingface_hub")
    code = f"import sys, handscroll.request; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
