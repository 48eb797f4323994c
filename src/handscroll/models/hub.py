"""Bring a checkpoint from the Hugging Face hub to this machine, and find it there again without a network.

The files lie in huggingface_hub's own cache, shared with every other program that uses it. huggingface_hub takes up a
dropped line where it broke and, in a later run, keeps every file that was whole. Only what is run is fetched: configs,
tokenizer and one set of safetensors; never a pickle.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import HfApi, constants
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

from handscroll.errors import CheckpointError, FetchError, HandscrollError, UnknownModelError, UsageError
from handscroll.files import write_whole
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.checksums import is_damaged
from handscroll.models.download import TIMEOUT_SECONDS, Download, FetchProgress
from handscroll.models.hub_files import TOKENIZERS, check_small, choose_files, is_small_file
from handscroll.system import free_disk_bytes
from handscroll.threads import run_watched
from handscroll.units import first_line, gibibytes, one_line, shown

DEFAULT_REVISION = "main"
COMMIT_CHARACTERS = 40
COMMIT = re.compile(r"[0-9a-f]{40}")
# What git takes for no name. It becomes one of a file, which must not lie elsewhere.
_NO_REVISION = re.compile(r"^$|^[/.-]|\.\.|//|/\.|[/.]$|\.lock$|@\{|[\x00-\x20\x7f~^:?*\[\\]")

MOST_CHECKED_BYTES = 8 << 20  # of a file that is read whole whenever its model is looked for, in some 10 ms
STOP_SECONDS = 5.0  # for a download that is ended to end: it does at the next piece that arrives
TELL_AGAIN_SECONDS = 1.0  # where nothing arrives, so that a listener may end it

OnProgress = Callable[[FetchProgress], None]


def fetch(
    hub_id: str,
    revision: str | None = None,
    *,
    on_progress: OnProgress | None = None,
    offline: bool | None = None,
    weights_too: bool = True,
    on_listing: Callable[[Mapping[str, int]], None] | None = None,
) -> Path:
    """The folder of a hub checkpoint on this machine; downloaded first unless it is already here whole.

    revision: a branch, tag or commit; None for `main`. It is resolved to a commit once, and all files are of that
    commit, whose name is the folder's. A checkpoint that is here is used without asking the hub; what of it is cut
    short is fetched anew. `offline=True`, or HF_HUB_OFFLINE in the environment, never reaches for the network. The
    small files come first, so that a repository which is not Sana's is refused before gigabytes are fetched. Without
    `weights_too` nothing else is: enough for a plan. `on_listing` is given the weight files that the hub has for it,
    and their bytes.

    on_progress: told on this thread, now and then; what it raises, and Ctrl-C, ends the download and passes through.

    Raises UnknownModelError if the hub knows no such model, FetchError if it cannot be reached, wants a login or the
    disk is too small, and CheckpointError if what it holds is not a Sana checkpoint in safetensors.
    """
    folder = find_local(hub_id, revision)
    if folder is not None:
        return folder
    if offline or (offline is None and constants.HF_HUB_OFFLINE):
        raise FetchError(_not_here(hub_id, revision))
    watched = _Watched(hub_id, revision or DEFAULT_REVISION, on_progress, weights_too=weights_too)
    folder = run_watched(watched.fetch, watched.look, watched.stop, stop_seconds=STOP_SECONDS)
    if on_listing is not None:
        on_listing(watched.listing)
    return folder


def find_local(hub_id: str, revision: str | None = None) -> Path | None:
    """The folder of a hub checkpoint if it is on this machine whole, else None. Reaches for no network.

    Without a revision, and without a note of what `main` is, as where a commit was fetched by its name: the only
    checkpoint that is here whole.
    """
    folders = _snapshot_folders(hub_id, revision)
    whole = [folder for folder in folders if not _what_is_missing(folder)]
    return whole[0] if len(whole) == 1 else None


def find_small_files(hub_id: str, revision: str | None = None) -> Path | None:
    """The folder of a hub checkpoint whose small files are here, with its weights or without; else as `find_local`."""
    described = [folder for folder in _snapshot_folders(hub_id, revision) if _is_described(folder)]
    return described[0] if len(described) == 1 else None


def _is_described(folder: Path) -> bool:
    try:
        CheckpointSpec.from_configs(folder)
    except CheckpointError:
        return False
    return any((folder / "tokenizer" / name).is_file() for name in TOKENIZERS)


def _what_is_missing(folder: Path) -> str:
    """Why a snapshot is not whole, in one line; empty where it is."""
    for file in _small_files(folder):
        if not file.is_file():
            return f"{file}: what it links to is gone"
        if _is_cut(file):
            return f"{file}: damaged or cut short"
    if not any((folder / "tokenizer" / name).is_file() for name in TOKENIZERS):
        return f"{folder / 'tokenizer'}: holds none of {', '.join(TOKENIZERS)}"
    try:
        CheckpointSpec.from_folder(folder)
    except CheckpointError as error:
        return one_line(error)
    return ""


def _small_files(folder: Path) -> list[Path]:
    """What a snapshot names of the small files of a checkpoint, whether they are there or not."""
    names = [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*"))]
    return [folder / name for name in sorted(names) if is_small_file(name)]


def _is_cut(file: Path) -> bool:
    """Whether a small file is not what was fetched, by its checksum, or a long one by its last character."""
    blob = file.resolve()
    size_bytes = blob.stat().st_size
    if size_bytes <= MOST_CHECKED_BYTES:
        return is_damaged(blob)
    if file.suffix != ".json":
        return False
    with blob.open("rb") as stream:
        stream.seek(size_bytes - 64)
        return not stream.read().rstrip().endswith((b"}", b"]"))


# Downloading.


class _Watched:
    """A download on a thread of its own, and what is told of it on another."""

    def __init__(self, hub_id: str, revision: str, on_progress: OnProgress | None, *, weights_too: bool) -> None:
        self.hub_id, self.revision, self.on_progress, self.weights_too = hub_id, revision, on_progress, weights_too
        self.download: Download | None = None
        self.listing: dict[str, int] = {}
        self.stopped = False
        self.told: FetchProgress | None = None
        self.told_at = 0.0

    def fetch(self) -> Path:
        """The folder. Whatever the hub's library raises is told in one line."""
        try:
            return self._fetch()
        except HandscrollError:
            raise
        except Exception as error:  # hub, HTTP, xet and disk errors share no root but this one
            raise _told(self.hub_id, error) from error

    def look(self) -> None:
        """Tells the listener how far the files are: where that is new, and once a second where it is not."""
        if self.download is None or self.on_progress is None:
            return
        if self.told is None:
            self._tell(self.download.at_first)
        progress, now = self.download.progress(), time.monotonic()
        if progress != self.told or now - self.told_at >= TELL_AGAIN_SECONDS:
            self._tell(progress)

    def stop(self) -> None:
        self.stopped = True
        if self.download is not None:
            self.download.stop()

    def _tell(self, progress: FetchProgress) -> None:
        assert self.on_progress is not None
        self.told, self.told_at = progress, time.monotonic()
        self.on_progress(progress)

    def _fetch(self) -> Path:
        hub_id, revision = self.hub_id, self.revision
        info = HfApi(endpoint=constants.ENDPOINT).model_info(
            hub_id, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS
        )
        commit = info.sha
        if commit is None or COMMIT.fullmatch(commit) is None:
            raise FetchError(f"the hub does not say which commit revision {revision} of {hub_id} is; run again")
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        small, weights = choose_files(sizes, hub_id)
        small = check_small(small, sizes, hub_id)
        self.listing = {name: sizes.get(name, 0) for name in weights}
        wanted = {name: sizes.get(name, 0) for name in (*small, *(weights if self.weights_too else ()))}
        folder = _snapshots(hub_id) / commit
        for name, size in wanted.items():
            _discard_if_cut(folder / name, size, small=name in small)
        _check_room(hub_id, sum(wanted.values()))

        download = Download(hub_id, commit, wanted, [name for name in wanted if (folder / name).exists()])
        self.download = download
        if self.stopped:
            download.stop()
        download.fetch(small)
        CheckpointSpec.from_configs(folder)
        if self.weights_too:
            download.fetch(weights)
        _note_commit(hub_id, revision, commit)
        return folder


# The cache.


def _discard_if_cut(file: Path, size_bytes: int, *, small: bool) -> None:
    """Removes a file of another size than the hub says, and what it points to: as long as it is there, it is kept.

    small: one whose bytes are looked at too.
    """
    if not size_bytes or not file.is_file() or (file.stat().st_size == size_bytes and not (small and _is_cut(file))):
        return
    blob = file.parent / os.readlink(file) if file.is_symlink() else None
    file.unlink()
    if blob is not None and blob.parent.name == "blobs":
        blob.unlink(missing_ok=True)


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
    """Where the cache notes which commit a branch or tag was when it was last asked for. Raises UsageError."""
    if _NO_REVISION.search(revision):
        raise UsageError(f"revision {shown(revision)} is no name of a branch, tag or commit")
    return _repository_folder(hub_id) / "refs" / revision


def _noted_commit(hub_id: str, revision: str) -> str:
    try:
        with _ref(hub_id, revision).open() as file:
            noted = file.read(COMMIT_CHARACTERS + 2).strip()
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


def _told(hub_id: str, error: BaseException) -> HandscrollError:
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
    return FetchError(f"fetching {hub_id} failed: {first_line(error)}; run again to go on from here")


def _where_to_look(hub_id: str) -> str:
    partly = " (there in part)" if _repository_folder(hub_id).is_dir() else ""
    return f"looked in {_repository_folder(hub_id)}{partly}; `handscroll models` lists what is here"


def _not_here(hub_id: str, revision: str | None) -> str:
    """Why a model cannot be had while fetching is off, and what would help."""
    what = hub_id if revision is None else f"revision {revision} of {hub_id}"
    missing = next(filter(None, map(_what_is_missing, _snapshot_folders(hub_id, revision))), "")
    if missing:
        return (
            f"{what} is not whole on this machine ({missing}) and fetching is off (offline); run once with a network "
            "and without HF_HUB_OFFLINE, and what is missing or cut short is fetched anew"
        )
    return f"{what} is not on this machine and fetching is off (offline); {_where_to_look(hub_id)}"
