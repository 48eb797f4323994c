"""Fetching from a hub that is a thread on this machine: whole, interrupted and resumed, and with the hub gone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from handscroll.errors import Cancelled, CheckpointError, FetchError, UnknownModelError, UsageError
from handscroll.events import Progress
from handscroll.models import download as download_module
from handscroll.models import hub as fetch_module
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.checksums import damaged_files
from handscroll.models.download import FetchProgress
from handscroll.models.hub import fetch, find_local
from handscroll.models.hub_files import MAX_LICENCE_BYTES, choose_files
from handscroll.models.opening import on_fetch, open_checkpoint
from handscroll.pictures.metadata import read_parameters
from handscroll.pipeline import decode_latent, generate, plan_of
from handscroll.request import Request

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"
HUB_ID = "someone/tiny-sana_diffusers"


class Hub:
    """As much of the hub as snapshot_download asks for. `files` may be changed; `requests` lists what was asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.requests: list[tuple[str, str, str | None]] = []
        self.revisions = {"main": COMMIT, "v1": OLDER, COMMIT: COMMIT, OLDER: OLDER}
        self.refuse: dict[str, tuple[int, dict[str, str]]] = {}  # path prefix -> status and headers
        self.break_after: dict[str, int] = {}  # file name -> bytes to send before the line goes dead
        self.listed_sizes: dict[str, int] = {}  # in place of the true ones
        self.slow: dict[str, float] = {}  # file name -> seconds before each megabyte of it
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def downloads(self) -> list[str]:
        """Names of the files whose contents were asked for."""
        prefix = f"/{HUB_ID}/resolve/{COMMIT}/"
        return [
            path.removeprefix(prefix)
            for method, path, _ in self.requests
            if method == "GET" and path.startswith(prefix)
        ]

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path, self.headers.get("Range")))
                for prefix, (status, headers) in hub.refuse.items():
                    if path.startswith(prefix):
                        return self.send(status, b"{}", headers, body)
                revision = path.removeprefix(f"/api/models/{HUB_ID}/revision/")
                if revision in hub.revisions:
                    siblings = [
                        {"rfilename": name, "size": hub.listed_sizes.get(name, len(data))}
                        for name, data in hub.files.items()
                    ]
                    listing = {
                        "id": HUB_ID,
                        "modelId": HUB_ID,
                        "sha": hub.revisions[revision],
                        "siblings": siblings,
                        "tags": [],
                    }
                    return self.send(200, json.dumps(listing).encode(), {}, body)
                if path != revision:
                    return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                if path in (f"/api/models/{HUB_ID}/tree/{commit}" for commit in (COMMIT, OLDER)):
                    tree = [
                        {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
                        for name, data in hub.files.items()
                    ]
                    return self.send(200, json.dumps(tree).encode(), {}, body)
                commit, _, name = path.removeprefix(f"/{HUB_ID}/resolve/").partition("/")
                if commit in (COMMIT, OLDER) and name in hub.files:
                    return self.send_file(name, hub.files[name], body, commit)
                return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

            def send_file(self, name: str, data: bytes, body: bool, commit: str) -> None:
                headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
                asked = self.headers.get("Range")
                if body and name in hub.slow:
                    return self.send_slowly(data, headers, hub.slow[name])
                if asked and body:
                    first = int(asked.removeprefix("bytes=").split("-")[0])
                    headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
                    return self.send(206, data[first:], headers, body)
                if body and name in hub.break_after:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data[: hub.break_after.pop(name)])
                    self.close_connection = True
                    return None
                return self.send(200, data, headers, body)

            def send_slowly(self, data: bytes, headers: dict[str, str], seconds: float) -> None:
                self.send_response(200)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for first in range(0, len(data), 1 << 20):
                        time.sleep(seconds)
                        self.wfile.write(data[first : first + (1 << 20)])
                except OSError:
                    self.close_connection = True  # nobody listens any more

            def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

        return Handler


def etag(data: bytes) -> str:
    """As git names a file, and the hub a small one."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(miniature: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    served = Hub(files_of(miniature("1.6b")))
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, served.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield served
    served.close()


def test_a_checkpoint_is_fetched_once_and_then_needs_no_network(hub: Hub) -> None:
    heard: list[FetchProgress] = []
    folder = fetch(HUB_ID, on_progress=heard.append)
    spec = CheckpointSpec.from_folder(folder)
    assert spec.transformer.num_layers == 2
    assert files_of(folder) == hub.files

    done = [event.done_bytes for event in heard]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == heard[-1].total_bytes == sum(map(len, hub.files.values()))

    hub.close()
    hub.requests.clear()
    assert fetch(HUB_ID) == find_local(HUB_ID) == folder
    assert open_checkpoint(HUB_ID).name == HUB_ID
    assert hub.requests == []


def test_a_plan_needs_no_weights(hub: Hub) -> None:
    spec, plan, minimum_bytes = plan_of(Request("a lake", model=HUB_ID, memory_bytes=2**40))
    assert not any(name.endswith(".safetensors") for name in files_of(spec.folder))
    assert find_local(HUB_ID) is None
    assert plan.planned_peak_bytes is not None
    assert minimum_bytes is not None
    whole = open_checkpoint(HUB_ID)
    assert find_local(HUB_ID) == whole.folder
    assert whole.commit == COMMIT
    assert dataclasses.replace(whole, name="", published="", commit=None) == dataclasses.replace(
        CheckpointSpec.from_folder(whole.folder), name="", published=""
    )


def test_pickles_and_second_copies_stay_where_they_are(hub: Hub) -> None:
    variant = "vae/diffusion_pytorch_model.bf16.safetensors"
    hub.files[variant] = hub.files["vae/diffusion_pytorch_model.safetensors"]
    for name in ("unwanted.bin", "transformer/model.pt", "vae/old.ckpt", "vae/model.onnx", "README.md", "x.png"):
        hub.files[name] = b"unwanted"
    folder = fetch(HUB_ID)
    assert (folder / variant).is_file()
    assert not (folder / "vae" / "diffusion_pytorch_model.safetensors").exists()
    downloaded = hub.downloads()
    assert not [name for name in downloaded if name.endswith((".bin", ".pt", ".ckpt", ".onnx", ".md", ".png"))]
    assert len(downloaded) == len(set(downloaded))


def test_a_line_that_drops_is_taken_up_where_it_stopped(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is not a whole chunk is lost
    name = "vae/diffusion_pytorch_model.safetensors"
    hub.break_after[name] = 1_000_000
    heard: list[FetchProgress] = []
    folder = fetch(HUB_ID, on_progress=heard.append)
    assert files_of(folder) == hub.files
    assert [asked for method, path, asked in hub.requests if method == "GET" and path.endswith(name)] == [
        None,
        "bytes=1000000-",
    ]
    assert heard[-1].done_bytes == heard[-1].total_bytes


def test_an_interrupted_fetch_goes_on_with_the_files_it_lacks(hub: Hub) -> None:
    name = "vae/diffusion_pytorch_model.safetensors"
    hub.refuse[f"/{HUB_ID}/resolve/{COMMIT}/{name}"] = (403, {})
    with pytest.raises(FetchError, match="HF_TOKEN"):
        fetch(HUB_ID)
    assert find_local(HUB_ID) is None

    hub.refuse.clear()
    hub.requests.clear()
    heard: list[FetchProgress] = []
    folder = fetch(HUB_ID, on_progress=heard.append)
    assert files_of(folder) == hub.files
    assert name in hub.downloads()
    assert "model_index.json" not in hub.downloads()
    assert heard[0].done_bytes > 0
    assert heard[-1].done_bytes == heard[-1].total_bytes


def test_a_repository_of_something_else_is_refused_before_its_weights(hub: Hub) -> None:
    index = json.loads(hub.files["model_index.json"])
    hub.files["model_index.json"] = json.dumps({**index, "_class_name": "FluxPipeline"}).encode()
    with pytest.raises(CheckpointError, match="FluxPipeline' is not a Sana pipeline"):
        fetch(HUB_ID)
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")]


def test_no_network_and_nothing_here(hub: Hub) -> None:
    hub.close()
    with pytest.raises(FetchError, match=r"no connection to .* looked in .* `handscroll models`") as caught:
        fetch(HUB_ID)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("by_environment", [True, False])
def test_offline_asks_nobody(hub: Hub, monkeypatch: pytest.MonkeyPatch, by_environment: bool) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", by_environment)
    with pytest.raises(FetchError, match="offline"):
        fetch(HUB_ID, offline=None if by_environment else True)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("status", "headers", "error", "says"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, UnknownModelError, "check the spelling"),
        (401, {}, FetchError, "hf auth login"),
        (403, {"X-Error-Code": "GatedRepo"}, FetchError, "accept its terms"),
        (403, {}, FetchError, "HF_TOKEN"),
        (500, {}, FetchError, "answered 500"),
    ],
)
def test_what_the_hub_refuses(
    hub: Hub, status: int, headers: dict[str, str], error: type[Exception], says: str
) -> None:
    hub.refuse["/api/"] = (status, headers)
    with pytest.raises(error, match=says) as caught:
        fetch(HUB_ID)
    assert "\n" not in str(caught.value)


def test_a_disk_too_small_is_told_before_anything_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "free_disk_bytes", lambda _: 1000)
    with pytest.raises(FetchError, match="make room"):
        fetch(HUB_ID)
    assert hub.downloads() == []


def test_a_disk_that_fills_up_on_the_way(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download_module, "hf_hub_download", full)
    with pytest.raises(FetchError, match="disk is full"):
        fetch(HUB_ID)


FOLDERS = {
    "text_encoder": ["config.json", "model.safetensors.index.json"],
    "transformer": ["config.json"],
    "vae": ["config.json", "diffusion_pytorch_model.safetensors"],
}
SHARDS = ["text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors"]
NAMES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer.model",
    *(f"{folder}/{name}" for folder, names in FOLDERS.items() for name in names),
    *SHARDS,
]


def test_one_copy_of_each_component_is_chosen() -> None:
    names = [*NAMES, "transformer/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"]
    small, weights = choose_files(names, HUB_ID)
    assert "text_encoder/model.safetensors.index.json" in small
    assert weights == [
        *SHARDS,
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]

    small, weights = choose_files([*names, "text_encoder/model.bf16.safetensors"], HUB_ID)
    assert "text_encoder/model.safetensors.index.json" not in small
    assert weights[0] == "text_encoder/model.bf16.safetensors"


def test_a_repository_without_safetensors_is_refused() -> None:
    with pytest.raises(CheckpointError, match="pickles"):
        choose_files([*NAMES, "transformer/diffusion_pytorch_model.bin"], HUB_ID)
    with pytest.raises(CheckpointError, match="no weights"):
        choose_files(NAMES, HUB_ID)
    with pytest.raises(CheckpointError, match="is there a someone/x_diffusers"):
        choose_files(["checkpoints/x.pth"], "someone/x")


# Revisions


def test_a_revision_is_resolved_once_and_found_again_by_every_name_of_it(hub: Hub) -> None:
    spec = open_checkpoint(f"{HUB_ID}@v1")
    assert spec.commit == spec.folder.name == OLDER
    asked = [path for _, path, _ in hub.requests if "/revision/" in path]
    assert asked[0].endswith("/revision/v1")
    assert not [path for path in asked[1:] if not path.endswith(f"/revision/{OLDER}")], "a branch may move meanwhile"
    assert not [path for _, path, _ in hub.requests if COMMIT in path]
    hub.close()
    for model, revision in ((HUB_ID, "v1"), (HUB_ID, OLDER), (HUB_ID, OLDER[:8]), (f"{HUB_ID}@{OLDER}", None)):
        assert open_checkpoint(model, revision).folder == spec.folder


def test_two_revisions_lie_beside_each_other(hub: Hub) -> None:
    newer, older = open_checkpoint(HUB_ID), open_checkpoint(HUB_ID, "v1")
    assert (newer.commit, older.commit) == (COMMIT, OLDER)
    assert newer.folder != older.folder
    hub.close()
    assert open_checkpoint(HUB_ID).commit == COMMIT


def test_a_commit_is_found_offline_where_nothing_says_what_main_is(hub: Hub) -> None:
    folder = fetch(HUB_ID, OLDER)
    assert not (folder.parents[1] / "refs").exists()
    hub.close()
    assert find_local(HUB_ID, OLDER) == find_local(HUB_ID) == folder
    assert find_local(HUB_ID, "v1") is None
    with pytest.raises(FetchError, match=rf"revision v1 of {HUB_ID} is not on this machine"):
        fetch(HUB_ID, "v1", offline=True)


def test_which_of_two_commits_is_main_is_not_guessed(hub: Hub) -> None:
    fetch(HUB_ID, OLDER)
    fetch(HUB_ID, COMMIT)
    hub.close()
    assert find_local(HUB_ID) is None


def test_a_revision_that_is_not_there_is_one_line(hub: Hub) -> None:
    with pytest.raises(UnknownModelError, match="has no such revision"):
        fetch(HUB_ID, "v9")


@pytest.mark.parametrize(
    ("model", "revision", "line"),
    [
        ("tiny-landscape", "v1", "has no revisions"),
        ("tiny-landscape@v1", None, "has no revisions"),
        (f"{HUB_ID}@v1", "v2", "two revisions"),
        (f"{HUB_ID}@", None, "names no revision"),
    ],
)
def test_a_revision_that_cannot_be_meant_is_refused(model: str, revision: str | None, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        open_checkpoint(model, revision)


def test_a_picture_says_of_which_revision_it_is(hub: Hub, tmp_path: Path) -> None:
    open_checkpoint(HUB_ID, "v1")
    request = Request("a lake", model=f"{HUB_ID}@v1", width=32, height=32, steps=1, seed=1)
    latent = tmp_path / "p.safetensors"
    (result,) = generate(request, tmp_path / "p.png", save_latent=latent)
    assert result.as_dict()["revision"] == OLDER
    assert f"Model revision: {OLDER}" in read_parameters(tmp_path / "p.png")
    again = decode_latent(latent, tmp_path / "again.png")
    assert again.revision == OLDER
    by_another = decode_latent(latent, tmp_path / "other.png", model=HUB_ID, fetch=True)
    assert by_another.revision == OLDER  # of the model that made it
    save_file({"latents": load_file(latent)["latent"]}, latent)
    assert decode_latent(latent, tmp_path / "other.png", model=HUB_ID).as_dict()["revision"] is None
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "p.png").read_bytes()


# Listeners


class Asked(Exception):
    """What a listener raises that wants a fetch to end."""


def test_a_listener_runs_on_the_thread_that_fetches(hub: Hub) -> None:
    threads: set[int] = set()
    fetch(HUB_ID, on_progress=lambda progress: threads.add(threading.get_ident()))
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("error", [Asked(), KeyboardInterrupt(), OSError(28, "no"), Cancelled()], ids=repr)
def test_what_a_listener_raises_ends_the_fetch_and_comes_through(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    name = "vae/diffusion_pytorch_model.safetensors"
    hub.slow[name] = 0.2
    asked_at: list[float] = []

    def stop(progress: FetchProgress) -> None:
        if progress.done_bytes > progress.total_bytes - len(hub.files[name]):
            asked_at.append(time.monotonic())
            raise error

    with pytest.raises(type(error)) as caught:
        fetch(HUB_ID, on_progress=stop)
    assert caught.value is error
    assert time.monotonic() - asked_at[0] < 3
    assert len(asked_at) == 1
    assert not [thread.name for thread in threading.enumerate() if thread.name == "fetch"]
    cache = Path(constants.HF_HUB_CACHE)
    assert not list(cache.rglob("*.incomplete"))
    assert find_local(HUB_ID) is None
    hub.slow.clear()
    hub.requests.clear()
    assert files_of(fetch(HUB_ID)) == hub.files
    assert "model_index.json" not in hub.downloads()


def test_a_fetch_that_stands_still_can_be_ended(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "STOP_SECONDS", 0.2)
    hub.slow["vae/diffusion_pytorch_model.safetensors"] = 6.0
    heard: list[FetchProgress] = []

    def stop(progress: FetchProgress) -> None:
        heard.append(progress)
        if heard[-2:] == [progress, progress]:
            raise Asked

    started = time.monotonic()
    with pytest.raises(Asked):
        fetch(HUB_ID, on_progress=stop)
    assert time.monotonic() - started < 5


def test_a_fetch_is_announced(hub: Hub) -> None:
    events: list[Progress] = []
    open_checkpoint(HUB_ID, on_progress=on_fetch(events.append))
    assert events[0].stage == "notice"
    assert events[0].detail.startswith(f"fetching {HUB_ID} from the hub, ")
    assert {event.stage for event in events[1:]} == {"fetch"}


# What a repository may have fetched


def test_file_names_are_names_and_no_patterns(hub: Hub) -> None:
    unwanted = [
        *("LICENSE*", "LICENSE.bin", "LICENSE/anything", "LICENSEE", "NOTICE.exe", "*", "**/*"),
        *("tokenizer/*.json", "tokenizer/[a-z].json", "tokenizer/deep/er.json", "scheduler/?.json"),
        *("vae/*.safetensors", "vae/[d]iffusion_pytorch_model.safetensors", "tokenizer/a\x1b[31m.json", "-x.json"),
    ]
    wanted = ["LICENSE", "LICENSE.txt", "LICENCE.md", "NOTICE"]
    for name in (*unwanted, *wanted):
        hub.files[name] = b"text"
    folder = fetch(HUB_ID)
    here = files_of(folder)
    assert not [name for name in unwanted if name in here or name in hub.downloads()]
    assert [name for name in wanted if name in here] == wanted


def test_small_files_are_small(hub: Hub) -> None:
    hub.files["LICENSE.txt"] = b"text"
    hub.listed_sizes["LICENSE.txt"] = MAX_LICENCE_BYTES + 1
    assert "LICENSE.txt" not in files_of(fetch(HUB_ID))


@pytest.mark.parametrize("name", ["tokenizer/extra.json", "model_index.json", "scheduler/scheduler_config.json"])
def test_a_small_file_of_gigabytes_is_refused(hub: Hub, name: str) -> None:
    hub.files.setdefault(name, b"{}")
    hub.listed_sizes[name] = 50 << 30
    with pytest.raises(CheckpointError, match=r"takes 50\.0 GiB"):
        fetch(HUB_ID)
    assert hub.downloads() == []


def test_a_commit_that_is_none_is_refused(hub: Hub) -> None:
    hub.revisions["main"] = "../../elsewhere"
    with pytest.raises(FetchError, match="does not say which commit"):
        fetch(HUB_ID)


# What the cache holds


def blob_of(folder: Path, name: str) -> Path:
    return (folder / name).resolve()


@pytest.mark.parametrize(
    "name",
    [
        "vae/diffusion_pytorch_model.safetensors",
        "transformer/config.json",
        "model_index.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ],
)
@pytest.mark.parametrize("left", [0, 1, 100])
def test_a_file_that_was_cut_short_is_fetched_anew(hub: Hub, name: str, left: int) -> None:
    folder = fetch(HUB_ID)
    blob = blob_of(folder, name)
    blob.write_bytes(blob.read_bytes()[:left])
    hub.requests.clear()
    assert open_checkpoint(HUB_ID).folder == folder
    assert hub.downloads() == [name]
    assert files_of(folder) == hub.files


@pytest.mark.parametrize("long", [False, True])
def test_a_small_file_of_the_right_size_that_is_damaged_is_fetched_anew(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    """As after a power cut. A long one is known by its end alone."""
    monkeypatch.setattr("handscroll.models.hub.MOST_CHECKED_BYTES", 100 if long else 2**20)
    name = "tokenizer/tokenizer.json"
    folder = fetch(HUB_ID)
    blob = blob_of(folder, name)
    data = blob.read_bytes()
    blob.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    hub.requests.clear()
    with pytest.raises(FetchError, match=r"tokenizer\.json: damaged or cut short\).*run once with a network"):
        fetch(HUB_ID, offline=True)
    assert open_checkpoint(HUB_ID).folder == folder
    assert hub.downloads() == [name]
    assert files_of(folder) == hub.files


@pytest.mark.parametrize(
    "name",
    [
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/tokenizer_config.json",
        "tokenizer/tokenizer.json",
        "handscroll.json",
    ],
)
def test_a_file_that_is_gone_is_fetched_anew(hub: Hub, name: str) -> None:
    hub.files.setdefault("handscroll.json", b'{"max_prompt_tokens": 10}')
    folder = fetch(HUB_ID)
    blob_of(folder, name).unlink()
    hub.requests.clear()
    assert open_checkpoint(HUB_ID).folder == folder
    assert hub.downloads() == [name]


def test_offline_it_is_said_what_is_cut_short_and_what_to_do(hub: Hub) -> None:
    folder = fetch(HUB_ID)
    blob = blob_of(folder, "vae/diffusion_pytorch_model.safetensors")
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(
        FetchError, match=r"not whole on this machine \(.*truncated.*\).*run once with a network"
    ) as caught:
        fetch(HUB_ID, offline=True)
    assert "\n" not in str(caught.value)


def test_a_file_of_the_right_size_that_is_damaged_is_found_on_demand(hub: Hub) -> None:
    folder = fetch(HUB_ID)
    assert damaged_files(folder) == []
    blob = blob_of(folder, "vae/diffusion_pytorch_model.safetensors")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    assert damaged_files(folder) == [blob]
    blob.unlink()
    assert open_checkpoint(HUB_ID).folder == folder
    assert damaged_files(folder) == []


def test_a_licence_that_is_gone_stops_nothing(hub: Hub) -> None:
    hub.files["LICENSE.txt"] = b"a licence"
    folder = fetch(HUB_ID)
    blob_of(folder, "LICENSE.txt").unlink()
    assert fetch(HUB_ID, offline=True) == folder


def test_small_files_are_known_by_either_sha1(tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for number, beginning in enumerate((b"blob 5\0", b"", b"x")):
        name = hashlib.sha1(beginning + b"whole", usedforsecurity=False).hexdigest()
        (tmp_path / name).write_bytes(b"whole")
        (tmp_path / "snapshot" / str(number)).symlink_to(tmp_path / name)
    (damaged,) = damaged_files(tmp_path / "snapshot")
    assert damaged == (tmp_path / "snapshot" / "2").resolve()


def test_large_files_are_known_by_their_sha256(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, name in enumerate((hashlib.sha256(b"whole").hexdigest(), hashlib.sha256(b"other").hexdigest(), "name")):
        (tmp_path / "blobs" / name).write_bytes(b"whole")
        (tmp_path / "snapshot" / str(number)).symlink_to(tmp_path / "blobs" / name)
    assert [blob.name for blob in damaged_files(tmp_path / "snapshot")] == [hashlib.sha256(b"other").hexdigest()]


@pytest.mark.parametrize("error", [ValueError("The file is too large"), KeyError("x"), AssertionError()], ids=repr)
def test_what_the_library_raises_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(download_module, "hf_hub_download", fail)
    with pytest.raises(FetchError, match=rf"^fetching {HUB_ID} failed: [^\n]+; run again"):
        fetch(HUB_ID)
