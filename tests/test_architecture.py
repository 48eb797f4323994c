"""The rooms and which way imports may go, read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import handscroll

SOURCE = Path(handscroll.__file__).parent

# A room may import the rooms below it, never one beside or above. Leaves know only the standard library and each other.
LEAVES = {"errors", "events", "version", "request", "limits", "files", "system", "units", "options"}
MODELS = LEAVES | {"weights", "models"}
RUNTIME = MODELS | {"banded", "plan", "pictures", "runtime"}
JOBS = RUNTIME | {"jobs", "integrations"}
MAY_IMPORT = {
    **{leaf: LEAVES for leaf in LEAVES},
    "banded": {"limits"},
    "weights": LEAVES,
    "models": LEAVES | {"weights"},
    "plan": MODELS,
    "pictures": LEAVES,
    "runtime": RUNTIME,
    "jobs": RUNTIME,
    "integrations": RUNTIME,
    "pipeline": JOBS,
    "api": JOBS | {"pipeline"},
    "cli": JOBS | {"pipeline", "api"},
    "__main__": {"cli"},
    "__init__": JOBS | {"pipeline", "api"},
}


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(file: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
            if node.module == "handscroll":
                names = [f"handscroll.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("handscroll.")}
    return rooms


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_go_one_way(file: Path) -> None:
    room = room_of(file)
    assert room in MAY_IMPORT, f"{room} is a new room: say in MAY_IMPORT and docs/architecture.md what it may import"
    allowed = MAY_IMPORT[room] | {room}
    assert imported_rooms(file) <= allowed


def test_no_room_is_called_utils() -> None:
    assert not [file for file in FILES if file.stem in ("utils", "util", "helpers", "common", "misc")]


def test_public_names_are_listed_once_and_exist() -> None:
    assert sorted(handscroll.__all__) == handscroll.__all__
    assert len(set(handscroll.__all__)) == len(handscroll.__all__)
    for name in handscroll.__all__:
        assert getattr(handscroll, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = handscroll.nothing_of_the_kind


@pytest.mark.parametrize(
    "module", ["handscroll", "handscroll.models.checkpoint", "handscroll.models.registry", "handscroll.plan.plan"]
)
def test_importing_loads_no_torch(module: str) -> None:
    heavy = ("torch", "diffusers", "transformers", "pyvips", "numpy")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_nothing_unpickles_or_runs_remote_code() -> None:
    for file in FILES:
        text = file.read_text()
        assert "import pickle" not in text
        assert "torch.load(" not in text
        assert "trust_remote_code=True" not in text
