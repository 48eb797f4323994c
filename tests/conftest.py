"""What every test shares: a private cache folder, no network, few threads, and miniature checkpoints made once."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub or diffusers, which read these once.
_cache = tempfile.TemporaryDirectory(prefix="handscroll-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _cache.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HANDSCROLL_CACHE"] = os.path.join(_cache.name, "handscroll")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_ENDPOINT", "HUGGINGFACE_HUB_CACHE"):
    os.environ.pop(_name, None)

# Where several test processes share the machine, each and all that it starts has one thread: two teams on two
# cores wait for each other.
IS_ONE_OF_SEVERAL = "PYTEST_XDIST_WORKER" in os.environ
THREADS = 1 if IS_ONE_OF_SEVERAL else 2
os.environ["OMP_NUM_THREADS"] = str(THREADS)

# A shell that starts tests in the background has them ignore Ctrl-C, which some of them press.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in two processes, where pytest-xdist is there; single files, and what is large, in this one.

    `-n 0` keeps the suite in one process too.
    """
    if IS_ONE_OF_SEVERAL:
        return  # this is one of the two, or what one of their tests has started: else they would start others for ever
    is_free = config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None
    is_large = config.option.markexpr in ("slow", "gpu") or config.option.usepdb
    if is_free and config.args_source is config.ArgsSource.TESTPATHS and not is_large:
        config.option.numprocesses, config.option.dist = 2, "worksteal"


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    import torch

    torch.set_num_threads(THREADS)


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> None:
    """Every picture collects garbage three times, which without this took two thirds of a miniature's time.

    What the libraries have loaded is not garbage, and is looked at no more, as in the command line's own process.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else extension modules complain of what they find at the end


@pytest.fixture
def vae() -> Any:
    """A miniature autoencoder with random weights, for who changes or attaches it."""
    import torch

    import miniatures
    from autoencoder_cases import as_if_trained

    torch.manual_seed(1)
    return as_if_trained(miniatures.make_autoencoder())


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`miniature("1.6b", dtype=torch.bfloat16)`: a tiny checkpoint, made once. Copy it before changing it."""
    import miniatures

    made: dict[str, Path] = {}

    def folder_of(row: str = "1.6b", **options: Any) -> Path:
        key = f"{row} {sorted(options.items())}"
        if key not in made:
            made[key] = miniatures.make_checkpoint(tmp_path_factory.mktemp(row) / row, row=row, **options)
        return made[key]

    return folder_of


@pytest.fixture
def small(miniature: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny checkpoint of its own whose transformer is in int4."""
    from handscroll.models.checkpoint import CheckpointSpec
    from handscroll.runtime.quantising import quantise_folder

    quantise_folder(CheckpointSpec.from_folder(miniature("1.6b")), {"transformer": "int4"}, tmp_path / "small")
    return tmp_path / "small"
