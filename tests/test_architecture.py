"""The rooms and which way imports may go, read from the source itself; and facts that may stand only once."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import handscroll

SOURCE = Path(handscroll.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES = 400, 60

# A room may import the rooms below it, never one beside or above. Leaves know only libraries and each other.
LEAVES = {"bands", "errors", "events", "version", "request", "options", "units", "limits", "files", "system", "threads"}
MODELS = LEAVES | {"weights", "models"}
RUNTIME = MODELS | {"banded", "plan", "pictures", "runtime"}
JOBS = RUNTIME | {"jobs", "integrations"}
MAY_IMPORT = {
    **{leaf: LEAVES for leaf in LEAVES},
    "limits": set(),
    "bands": set(),
    "banded": {"bands", "limits"},
    "weights": LEAVES,
    "models": LEAVES | {"weights"},
    "plan": MODELS,
    "pictures": LEAVES,
    "runtime": RUNTIME,
    "jobs": RUNTIME,
    "integrations": RUNTIME,
    "pipeline": JOBS,
    "api": JOBS | {"pipeline"},
    "batch": JOBS | {"pipeline"},
    "cli": JOBS | {"pipeline", "api", "batch"},
    "__main__": {"cli"},
    "__init__": JOBS | {"pipeline", "api"},
}
# And within banded, each of the others above it; the two networks know nothing of each other.
BANDED = {
    "__init__": set(),
    "rows": set(),
    "modules": set(),
    "patches": set(),
    "triton": set(),
    "kernels": set(),
    "backend": {"kernels", "triton"},
    "quantised": {"triton"},
    "sums": {"triton"},
    "exchange": {"rows", "sums"},
    "layers": {"backend", "modules", "quantised", "rows", "triton"},
    "autoencoder": {"backend", "exchange", "layers", "modules", "rows", "sums", "triton"},
    "transformer": {"backend", "exchange", "layers", "modules", "rows", "sums", "triton"},
}


def name_of(file: Path) -> str:
    return str(file.relative_to(SOURCE))


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def module_of(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(file: Path) -> Iterator[str]:
    """Every module of ours that a file imports, anywhere in it; of `from a import b` both a and a.b, if there are."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("handscroll."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "handscroll":
            assert node.level == 0
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def for_types_alone(file: Path) -> set[str]:
    """What a file imports under TYPE_CHECKING: no import at run time."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom):
                    found.add(inner.module or "")
    return found


MODULES = {module_of(file): file for file in FILES}
IMPORTS = {
    module: {each for each in imported_modules(file) if each in MODULES} - {module} for module, file in MODULES.items()
}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_one_way(file: Path) -> None:
    room = room_of(file)
    assert room in MAY_IMPORT, f"{room} is a new room: say in MAY_IMPORT and docs/architecture.md what it may import"
    rooms = {each.split(".")[1] for each in IMPORTS[module_of(file)] if "." in each}
    assert rooms <= MAY_IMPORT[room] | {room}


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) == "banded"], ids=name_of)
def test_imports_within_banded_go_one_way(file: Path) -> None:
    part = file.relative_to(SOURCE).parts[1].removesuffix(".py")
    imported = {each.split(".")[2] for each in IMPORTS[module_of(file)] if each.startswith("handscroll.banded.")}
    assert imported <= BANDED[part] | {part}


def test_no_circle_of_imports() -> None:
    # A package's __init__ lists what its files offer, and they know nothing of it.
    left = {module: set(imports) for module, imports in IMPORTS.items()}
    for module, file in MODULES.items():
        left[module] -= for_types_alone(file)
        if file.name == "__init__.py":
            left[module] = {each for each in left[module] if each.startswith(f"{module}.")}
        else:
            left[module] = {each for each in left[module] if not module.startswith(f"{each}.")}
    while leaves := [module for module, imports in left.items() if not imports & left.keys()]:
        for module in leaves:
            del left[module]
    assert not left, "these import each other"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_module_is_read_in_one_sitting(file: Path) -> None:
    lines = file.read_text().count("\n")
    assert lines <= MOST_LINES or "triton" in file.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            is_kernel = any("kernel" in ast.unparse(each).lower() for each in node.decorator_list)
            lines = (node.end_lineno or 0) - node.lineno
            assert lines < MOST_FUNCTION_LINES or is_kernel, f"{node.name} is too long"


def test_no_room_is_called_utils() -> None:
    assert not [file for file in FILES if file.stem in ("utils", "util", "helpers", "common", "misc")]


def test_every_file_and_every_room_says_what_it_is_for() -> None:
    for file in FILES:
        assert ast.get_docstring(ast.parse(file.read_text())), name_of(file)


# Facts that stand once: a pattern, and the files that may hold it.
ONCE = {
    "stage titles": (r'"reading the prompt"|"denoising"|"decoding"', {"plan/stages.py"}),
    "GiB as text": (r"/ (2\*\*30|2\*\*20|MIB):", {"units.py"}),
    "one line of an error": (r"def _?(one|first)_line", {"units.py"}),
    "atomic writes": (
        r"os\.replace|\.part\b.*\.replace\(",
        {"files.py", "jobs/store.py", "pictures/writing.py", "runtime/quantising.py"},
    ),
    "locks": (r"import fcntl|flock", {"files.py"}),
    "this machine": (r"/proc/(cpuinfo|meminfo)|/sys/fs/cgroup|import psutil", {"system.py"}),
    "a map's chunk": (r"^\w*CHUNK_BYTES = ", {"limits.py"}),
    "slabs": (r"^\w*SLAB_\w+.* = ", {"limits.py"}),
    "staging": (r"^\w*STAGING_BYTES = ", {"limits.py"}),
    "slots": (r"^\w*SLOTS = ", {"limits.py"}),
    "default heights": (r"^\w*(STRIP|BAND)_BYTES.* = ", {"limits.py"}),
    "a random seed": (r"secrets\.randbelow", {"request.py"}),
    "the words of options": (r'"rows", "whole", "tiled", "patch"', {"request.py"}),
    "the version": (r"^__version__ = ", {"version.py"}),
}


@pytest.mark.parametrize("fact", ONCE)
def test_a_fact_stands_once(fact: str) -> None:
    pattern, places = ONCE[fact]
    found = {name_of(file) for file in FILES if re.search(pattern, file.read_text(), re.MULTILINE)}
    assert found <= places


def test_public_names_are_listed_once_and_exist() -> None:
    assert sorted(handscroll.__all__) == handscroll.__all__
    assert len(set(handscroll.__all__)) == len(handscroll.__all__)
    for name in handscroll.__all__:
        assert getattr(handscroll, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = handscroll.nothing_of_the_kind


@pytest.mark.parametrize(
    "module", ["handscroll", "handscroll.models.checkpoint", "handscroll.models.registry", "handscroll.plan.search"]
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
