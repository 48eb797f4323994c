"""The rooms and which way imports may go, read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import handscroll

SOURCE = Path(handscroll.__file__).parent

# A room may import the rooms below it, never one beside or above. Leaves know only the standard library and each other.
LEAVES = {"errors", "events", "limits", "version", "weight_files", "request", "spec", "registry"}
MAY_IMPORT = {
    "banded": {"limits"},
    "plan": LEAVES,
    "runtime": LEAVES | {"banded", "plan", "latent_file"},
    "image_file": LEAVES,
    "latent_file": LEAVES,
    "pipeline": LEAVES | {"plan", "runtime", "image_file", "latent_file"},
    "drop_in": LEAVES | {"banded", "plan", "runtime"},
    "progress_bars": LEAVES,
    "doctor": LEAVES | {"runtime"},
    "benchmark": LEAVES | {"banded", "plan", "runtime"},
    "cli": LEAVES
    | {"plan", "runtime", "image_file", "latent_file", "pipeline", "progress_bars", "doctor", "benchmark"},
    "__main__": {"cli"},
    "__init__": LEAVES | {"pipeline", "drop_in"},
    **{leaf: LEAVES for leaf in LEAVES},
    "limits": set(),
}

# And within banded, each of the others above it; the two networks know nothing of each other.
BANDED = {
    "__init__": set(),
    "rows": set(),
    "modules": set(),
    "patches": set(),
    "triton": set(),
    "backend": {"triton"},
    "layers": {"backend", "modules", "rows", "triton"},
    "autoencoder": {"backend", "layers", "modules", "rows", "triton"},
    "transformer": {"backend", "layers", "modules", "rows", "triton"},
}


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(file: Path) -> Iterator[list[str]]:
    """What a file imports of ours: the parts of each name, beginning with handscroll."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".") for name in names if name.startswith("handscroll."))


def imported_rooms(file: Path) -> set[str]:
    return {parts[1] for parts in imported_modules(file)}


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_go_one_way(file: Path) -> None:
    room = room_of(file)
    assert room in MAY_IMPORT, f"{room} is a new room: say in MAY_IMPORT and docs/architecture.md what it may import"
    allowed = MAY_IMPORT[room] | {room}
    assert imported_rooms(file) <= allowed


@pytest.mark.parametrize(
    "file", [file for file in FILES if room_of(file) == "banded"], ids=lambda file: str(file.relative_to(SOURCE))
)
def test_imports_within_banded_go_one_way(file: Path) -> None:
    part = file.relative_to(SOURCE).parts[1].removesuffix(".py")
    imported = {parts[2] for parts in imported_modules(file) if parts[1] == "banded"}
    assert imported <= BANDED[part] | {part}


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
    "module", ["handscroll", "handscroll.limits", "handscroll.spec", "handscroll.registry", "handscroll.plan.plan"]
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
