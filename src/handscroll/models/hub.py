"""Bring a checkpoint from the Hugging Face hub to this machine, and find it there again without a network.

The files lie in huggingface_hub's own cache, shared with every other program that uses it. huggingface_hub takes up a
dropped line where it broke and, in a later run, keeps every file that was whole. Only what is run is fetched: configs,
tokenizer and one set of safetensors; never a pickle.
"""

from __future__ import annotations

import errno
import io
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from tqdm.std import tqdm

from handscroll.errors import CheckpointError, FetchError, HandscrollError, UnknownModelError
from handscroll.files import write_whole
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.folder import COMPONENTS, LAYOUT
from handscroll.system import free_disk_bytes
from handscroll.units import first_line, gibibytes
from handscroll.weights.folder import PICKLE_SUFFIXES, candidates

TIMEOUT_SECONDS = 20.0
DEFAULT_REVISION = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """How far a fetch is, over all its files together."""

    hub_id: str
    done_bytes: int
    total_bytes: int


OnProgress = Callable[[FetchProgress], None]


def fetch(
    hub_id: str,
    revision: str | None = None,
    *,
    on_progress: OnProgress | None = None,
    offline: bool | None = None,
    weights_too: bool = True,
) -> Path:
    """The folder of a hub checkpoint on this machine; downloaded first unless it is already here whole.

    revision: a branch, tag or commit; None for `main`. It is resolved to a commit once, and all files are of that
    commit, whose name is the folder's. A checkpoint that is here is used without asking the hub. `offline=True`, or
    HF_HUB_OFFLINE in the environment, never reaches for the network. The small files come first, so that a repository
    which is not Sana's is refused before gigabytes are fetched. Without `weights_too` nothing else is: enough for a
    plan.

    Raises UnknownModelError if the hub knows no such model, FetchError if it cannot be reached, wants a login or the
    disk is too small, and CheckpointError if what it holds is not a Sana checkpoint in safetensors.
    """
    folder = find_local(hub_id, revision)
    if folder is not None:
        return folder
    if offline or (offline is None and constants.HF_HUB_OFFLINE):
        what = hub_id if revision is None else f"revision {revision} of {hub_id}"
        raise FetchError(f"{what} is not on this machine and fetching is off (offline); {_where_to_look(hub_id)}")
    try:
        return _download(hub_id, revision or DEFAULT_REVISION, on_progress, weights_too=weights_too)
    except HandscrollError:
        raise
    except Exception as error:  # hub, HTTP, xet and disk errors share no root but this one
        if told := _told(hub_id, error):
            raise told from error
        raise


def find_local(hub_id: str, revision: str | None = None) -> Path | None:
    """The folder of a hub checkpoint if it is on this machine whole, else None. Reaches for no network.

    Without a revision, and without a note of what `main` is, as where a commit was fetched by its name: the only
    checkpoint that is here whole.
    """
    folders = _snapshot_folders(hub_id, revision)
    whole = [folder for folder in folders if _is_whole(folder)]
    return whole[0] if len(whole) == 1 else None


def _is_whole(folder: Path) -> bool:
    if not any((folder / "tokenizer" / name).is_file() for name in TOKENIZERS):
        return False
    try:
        CheckpointSpec.from_folder(folder)
    except CheckpointError:
        return False
    return True


# Choosing files.
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def choose_files(names: Iterable[str], hub_id: str) -> tuple[list[str], list[str]]:
    """Of all file names in a repository, those to fetch: the small ones, and the weights.

    Where a component is stored more than once, its bf16 variant is taken, since it is half the size of the fp32 files
    and what they are rounded to anyway; otherwise the plain files. An fp16 variant is taken only if there is nothing
    else: text encoder and autoencoder overflow in it. Raises CheckpointError if the repository lacks a component.
    """
    names = sorted(names)
    if "model_index.json" not in names:
        other = "" if hub_id.endswith("_diffusers") else f"; is there a {hub_id}_diffusers?"
        raise CheckpointError(f"{hub_id}: not in diffusers' layout, which holds {LAYOUT}{other}")
    small = [name for name in names if name in ("model_index.json", "handscroll.json") or name.startswith("LICENSE")]
    small += [name for name in names if name.startswith("scheduler/") and name.endswith(".json")]
    small += [name for name in names if name.startswith("tokenizer/") and name.endswith((".json", ".model", ".jinja"))]
    weights: list[str] = []
    for component in COMPONENTS:
        inside = [name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/")]
        found = candidates(inside)
        if not found:
            pickled = any(name.endswith(PICKLE_SUFFIXES) for name in inside)
            why = "only pickles, which can run code and are never fetched" if pickled else "no weights"
            raise CheckpointError(f"{hub_id}: {component}/ holds {why}; handscroll reads safetensors")
        chosen = next((candidate for candidate in found if candidate.variant == "bf16"), found[0])
        small += [f"{component}/config.json", *([f"{component}/{chosen.index}"] if chosen.index else [])]
        weights += [f"{component}/{name}" for name in chosen.names]
    return small, weights


# Downloading.


def _download(hub_id: str, revision: str, on_progress: OnProgress | None, *, weights_too: bool = True) -> Path:
    api = HfApi(endpoint=constants.ENDPOINT)
    info = api.model_info(hub_id, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
    commit = info.sha
    if commit is None:
        raise FetchError(f"the hub does not say which commit revision {revision} of {hub_id} is; run again")
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    small, weights = choose_files(sizes, hub_id)
    wanted = {name: sizes.get(name, 0) for name in (*small, *(weights if weights_too else ()))}
    _check_room(hub_id, sum(wanted.values()))

    report = _Report(hub_id, on_progress, wanted, _snapshots(hub_id) / commit)
    folder = _snapshot(hub_id, commit, small, report)
    CheckpointSpec.from_configs(folder)
    if weights_too:
        folder = _snapshot(hub_id, commit, weights, report)
    _note_commit(hub_id, revision, commit)
    report.finish()
    return folder


def _snapshot(hub_id: str, commit: str, names: list[str], report: _Report) -> Path:
    folder = snapshot_download(
        hub_id,
        revision=commit,
        cache_dir=constants.HF_HUB_CACHE,
        endpoint=constants.ENDPOINT,
        allow_patterns=names,
        etag_timeout=TIMEOUT_SECONDS,
        tqdm_class=report.bar_class(),
        max_workers=4,
    )
    report.files_done(names)
    return Path(folder)


class _Report:
    """Turns the hub library's progress bars into FetchProgress events."""

    def __init__(
        self, hub_id: str, on_progress: OnProgress | None, sizes: Mapping[str, int], already: Path | None
    ) -> None:
        self._hub_id = hub_id
        self._on_progress = on_progress
        self._sizes = sizes
        self._total_bytes = sum(sizes.values())
        self._here = {name for name in sizes if already is not None and (already / name).exists()}
        self._last_bytes = -1
        self._lock = threading.Lock()
        self._tell(0)

    def bar_class(self) -> type[tqdm]:
        """A silent progress bar class for one call of snapshot_download, which makes one or more bars of bytes."""
        report, bars = self, []

        class Bar(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})
                if kwargs.get("unit") == "B":
                    bars.append(self)

            def display(self, *args: Any, **kwargs: Any) -> bool:
                return True

            def update(self, n: float | None = 1) -> bool | None:
                with report._lock:
                    self.n += n or 0
                    fetched = max((bar.n for bar in bars), default=0)
                report._tell(int(fetched))
                return None

        return Bar

    def files_done(self, names: Iterable[str]) -> None:
        self._here.update(names)
        self._tell(0)

    def finish(self) -> None:
        self._here.update(self._sizes)
        self._tell(0)

    def _tell(self, fetched_bytes: int) -> None:
        done_bytes = sum(self._sizes.get(name, 0) for name in self._here) + fetched_bytes
        done_bytes = min(done_bytes, self._total_bytes)
        with self._lock:
            if self._on_progress is None or done_bytes <= self._last_bytes:
                return
            self._last_bytes = done_bytes
            self._on_progress(FetchProgress(self._hub_id, done_bytes, self._total_bytes))


# The cache.


def _repository_folder(hub_id: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id, repo_type="model")


def _snapshots(hub_id: str) -> Path:
    """The folder of the repository's snapshots, each named after its commit."""
    return _repository_folder(hub_id) / "snapshots"


def _snapshot_folders(hub_id: str, revision: str | None) -> list[Path]:
    """The snapshots on this machine that a revision may be: one for a name that is noted, or what a commit begins."""
    snapshots = _snapshots(hub_id)
    noted = _noted_commit(hub_id, revision or DEFAULT_REVISION)
    if noted:
        return [snapshots / noted] if (snapshots / noted).is_dir() else []
    try:
        folders = sorted(folder for folder in snapshots.iterdir() if COMMIT.fullmatch(folder.name))
    except OSError:
        return []
    if revision is None:
        return folders
    is_commit = re.fullmatch(r"[0-9a-f]{7,40}", revision)
    return [folder for folder in folders if is_commit and folder.name.startswith(revision)]


def _ref(hub_id: str, revision: str) -> Path:
    """Where the cache notes which commit a branch or tag was when it was last asked for."""
    return _repository_folder(hub_id) / "refs" / revision


def _noted_commit(hub_id: str, revision: str) -> str:
    try:
        noted = _ref(hub_id, revision).read_text().strip()
    except (OSError, ValueError):
        return ""
    return noted if re.fullmatch(r"\w+", noted) else ""


def _note_commit(hub_id: str, revision: str, commit: str) -> None:
    """As huggingface_hub notes it where it is asked for a branch or tag; files were asked for by their commit."""
    if revision == commit or _noted_commit(hub_id, revision) == commit:
        return
    file = _ref(hub_id, revision)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, [commit.encode()])


def _check_room(hub_id: str, needed_bytes: int) -> None:
    blobs = _repository_folder(hub_id) / "blobs"
    needed_bytes -= sum(blob.stat().st_size for blob in blobs.glob("*")) if blobs.is_dir() else 0
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free_bytes = free_disk_bytes(place)
    if free_bytes is not None and needed_bytes > free_bytes:
        raise FetchError(
            f"{hub_id} needs {gibibytes(needed_bytes)} more on disk and {constants.HF_HUB_CACHE} has "
            f"{gibibytes(free_bytes)} free; make room or point HF_HOME elsewhere"
        )


# Telling what went wrong, in one line that says what to do.


def _told(hub_id: str, error: BaseException) -> HandscrollError | None:
    page = f"{constants.ENDPOINT}/{hub_id}"
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # why the hub's own copy could not be asked for
    if isinstance(error, GatedRepoError):
        return FetchError(f"{hub_id} is gated: accept its terms at {page}, then run `hf auth login` or set HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return UnknownModelError(f"{hub_id} has no such revision; its branches and tags are listed at {page}")
    if isinstance(error, RepositoryNotFoundError):
        return UnknownModelError(
            f"no model {hub_id} at {constants.ENDPOINT}; check the spelling, "
            "or run `hf auth login` or set HF_TOKEN if it is private"
        )
    if isinstance(error, HFValidationError):
        return UnknownModelError(f"{hub_id!r} is not a hub id; those look like owner/name")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return FetchError(f"the hub refuses {hub_id} ({status}): run `hf auth login` or set HF_TOKEN")
        return FetchError(f"the hub answered {status} for {hub_id}; run again to go on from here")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FetchError(f"the disk is full at {constants.HF_HUB_CACHE}; make room and run again to go on from here")
    if isinstance(error, HTTPError | LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError | TimeoutError):
        return FetchError(f"no connection to {constants.ENDPOINT} ({type(error).__name__}); {_where_to_look(hub_id)}")
    if isinstance(error, OSError | RuntimeError):
        return FetchError(f"fetching {hub_id} failed: {first_line(error)}; run again to go on from here")
    return None


def _where_to_look(hub_id: str) -> str:
    partly = " (there in part)" if _repository_folder(hub_id).is_dir() else ""
    return f"looked in {_repository_folder(hub_id)}{partly}; `handscroll models` lists what is here"
