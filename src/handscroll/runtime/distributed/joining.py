"""How the processes of a run find each other, and what they must have in common.

Each is told its rank in the environment, as `torchrun` and the command line's own launcher tell it. Nothing is computed
before all are there, run the same versions, and hold the same checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from handscroll.errors import HandscrollError, UsageError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.folder import files_of
from handscroll.plan.communication import speeds_of
from handscroll.plan.inputs import Hardware, PlanInputs, Rates
from handscroll.request import Request, count_devices, device_of_rank
from handscroll.runtime.distributed.beating import Beating, Line, OnFailure, accept, connect, join_s, listen
from handscroll.runtime.distributed.plain import as_plain, of_plain
from handscroll.runtime.distributed.processes import ProcessRanks
from handscroll.runtime.distributed.team import Team
from handscroll.system import STORE, boot_id, processor_name
from handscroll.units import one_line
from handscroll.version import __version__

MAX_REASON = 200  # characters, of what a library says
# The leader reads prompts and writes files while others wait: whether all are alive is seen otherwise (beating.py).
WAIT_TIMEOUT = timedelta(days=30)
SAMPLES, SAMPLE_BYTES = 16, 4096  # of a checkpoint's files, which are too large to be read whole


@dataclass(frozen=True)
class Place:
    """A process of a run: `rank` of `size`, `local_rank` on its host; where the first one is reached."""

    rank: int
    size: int
    local_rank: int
    address: str

    @classmethod
    def of_environment(cls) -> Place | None:
        """As torchrun tells it; None for a process that runs alone."""
        environ = os.environ
        if "RANK" not in environ or "WORLD_SIZE" not in environ:
            return None
        try:
            place = cls(
                int(environ["RANK"]),
                int(environ["WORLD_SIZE"]),
                int(environ.get("LOCAL_RANK", "0")),
                environ.get("MASTER_ADDR", "127.0.0.1"),
            )
        except ValueError:
            raise UsageError("RANK, WORLD_SIZE and LOCAL_RANK in the environment must be whole numbers") from None
        return place if place.size > 1 else None


def of_this_process(request: Request) -> Request:
    """The request with the device that this process runs on. Raises UsageError for more ranks than devices."""
    place, devices = Place.of_environment(), request.devices
    if devices is not None and place is None and count_devices(devices) > 1:
        raise UsageError(
            "devices: one process makes pictures on one device; the command line's --devices starts a process for "
            "each, and so does torchrun"
        )
    if devices is not None and place is not None and count_devices(devices) != place.size:
        raise UsageError(f"--devices {devices} are {count_devices(devices)}, and {place.size} ranks were started")
    rank = 0 if place is None else place.local_rank
    device = request.device if devices is None else device_of_rank(devices, rank)
    if place is not None and (device == "auto" or (device == "cuda" and torch.cuda.is_available())):
        device = _device_of_rank(rank)
    return dataclasses.replace(request, device=device, devices=None)


def _device_of_rank(rank: int) -> str:
    """One device for each rank of a host, where there are CUDA devices."""
    if not torch.cuda.is_available():
        return "cpu"
    if rank >= torch.cuda.device_count():
        raise UsageError(
            f"rank {rank} of this host has no device: there are {torch.cuda.device_count()} CUDA devices; ask for "
            "fewer, or for processes as --devices cpu:N"
        )
    return f"cuda:{rank}"


@contextmanager
def leading(
    spec: CheckpointSpec, inputs: PlanInputs, on_failure: OnFailure
) -> Iterator[tuple[Joined | None, PlanInputs]]:
    """The team that this process is the first of, None where it is alone, and what a plan for all of it is made from.

    At the end the others are told that there is no more. Raises as `joined`.
    """
    if Place.of_environment() is None:
        yield None, inputs
        return
    with joined(spec, inputs.hardware, on_failure) as found:
        size, hardware = found.team.ranks.size, found.hardware(inputs.hardware)
        yield found, dataclasses.replace(inputs, hardware=hardware, ranks=size, speeds=found.speeds())
        found.team.tell("end")


@contextmanager
def joined(spec: CheckpointSpec, hardware: Hardware, on_failure: OnFailure) -> Iterator[Joined]:
    """The team of this process, once all are there. Raises HandscrollError where they cannot be, or differ."""
    place, device = Place.of_environment(), hardware.device
    assert place is not None
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    _init(place, device)
    try:
        ranks = ProcessRanks.of(dist.new_group(timeout=WAIT_TIMEOUT))
        team = Team(ranks, device)
        server = listen(_host_of(place)) if team.leads else None
        secret = secrets.token_hex(16)
        facts = _facts(spec, device, hardware)
        if server is not None:
            facts |= {"port": server.getsockname()[1], "secret": secret}
        of_ranks = team.collect(facts)
        _check_same(of_ranks)
        lines = _lines(place, of_ranks, server)
        beating = Beating(lines, on_failure)
        try:
            yield Joined(team, of_ranks, beating)
        except BaseException as error:
            # Others may be in the middle of a layer, waiting for this rank: they end as well.
            beating.tell(_told(error, place.rank))
            raise
        beating.stop()
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Joined:
    """A team, and what each rank said of itself."""

    team: Team
    facts: Sequence[Mapping[str, Any]]
    beating: Beating

    def measured(self, of_pictures: Sequence[Mapping[str, int]]) -> tuple[dict[str, Any], ...]:
        """Of every rank its device, its host, and what each stage took there at most; the leader's is given."""
        self.team.tell("report")
        names = dict.fromkeys(name for each in of_pictures for name in each)
        most = {name: max(each.get(name, 0) for each in of_pictures) for name in names}
        measured = self.team.collect({"stage_peak_bytes": most})
        return tuple(
            {"device": facts["device"], "host": facts["host"], "measured_bytes": each["stage_peak_bytes"]}
            for facts, each in zip(self.facts, measured, strict=True)
        )

    def speeds(self) -> tuple[float, ...]:
        """How fast each rank is, beside the others; empty where they are alike."""
        rates = [of_plain(Hardware, each["hardware"]).rates for each in self.facts]
        return speeds_of(rates, [str(each["model"]) for each in self.facts])

    def hardware(self, own: Hardware) -> Hardware:
        """What a plan for all ranks is made from: of each amount and rate the least, and the most that is held.

        own: this rank's, as it is now.
        """
        hosts = [each["host_id"] for each in self.facts]
        of_ranks = [of_plain(Hardware, each["hardware"]) for each in self.facts]
        of_ranks[self.team.ranks.rank] = own
        found = [each.shared(hosts.count(host)) for each, host in zip(of_ranks, hosts, strict=True)]
        held = [each.base_bytes for each in found]
        free = [each.free_bytes for each in found if each.free_bytes is not None]
        names = [field.name for field in dataclasses.fields(Rates)]
        return dataclasses.replace(
            own,
            base_bytes=None if None in held else max(each for each in held if each is not None),
            free_bytes=min(free, default=None),
            host_bytes=min(each.host_bytes for each in found),
            scratch_bytes=min(each.scratch_bytes for each in found),
            rates=Rates(**{name: min(getattr(each.rates, name) for each in found) for name in names}),
            has_fp8=all(each.has_fp8 for each in found),
            bf16_is_faster=all(each.bf16_is_faster for each in found),
        )


def _told(error: BaseException, rank: int) -> dict[str, Any]:
    """An error of this rank as it is told to others."""
    facts = error.as_dict() if isinstance(error, HandscrollError) else {"code": "rank_failed"}
    message = str(error) if isinstance(error, HandscrollError) else f"{type(error).__name__}: {error}"
    code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
    message = "; ".join([one_line(message, MAX_REASON), *getattr(error, "__notes__", ())])
    return {**facts, "exit_code": code, "message": f"rank {rank}: {message}"}


def _init(place: Place, device: str) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    os.environ.setdefault("MASTER_ADDR", place.address)
    if "MASTER_PORT" not in os.environ:
        raise UsageError("MASTER_PORT is not in the environment; start ranks with --devices, or with torchrun")
    where = f"{place.address}:{os.environ['MASTER_PORT']}"
    where_from: dict[str, Any] = {}
    if (file := os.environ.get(STORE)) is not None:  # of one host: no port that others could reach
        where_from["store"] = dist.FileStore(file, place.size)  # type: ignore[attr-defined]
    try:
        dist.init_process_group(
            backend, rank=place.rank, world_size=place.size, timeout=timedelta(seconds=join_s()), **where_from
        )
    except (RuntimeError, ValueError, OSError) as error:
        said = one_line(str(error).partition("Exception raised from")[0], MAX_REASON)
        if "EADDRINUSE" in said or "address already in use" in said.lower():
            raise HandscrollError(f"port {where} is in use; choose another MASTER_PORT") from None
        raise HandscrollError(
            f"rank {place.rank} of {place.size} does not reach the others at {where} within "
            f"{join_s():g} s: {said}; are all started, and is that address the first one's?"
        ) from None


def _host_of(place: Place) -> str:
    """Where the leader waits for the others: on this host alone where all are on it."""
    local = os.environ.get("LOCAL_WORLD_SIZE")
    return "127.0.0.1" if local == str(place.size) else "0.0.0.0"


def _lines(place: Place, of_ranks: Sequence[Mapping[str, Any]], server: socket.socket | None) -> dict[str, Line]:
    """The connections over which it is seen that others are alive, by whose they are."""
    leader = of_ranks[0]
    if server is None:
        same_host = leader["host_id"] == of_ranks[place.rank]["host_id"]
        host = "127.0.0.1" if same_host else place.address
        try:
            line = connect(host, int(leader["port"]), str(leader["secret"]), place.rank)
        except OSError as error:
            raise HandscrollError(
                f"rank {place.rank} does not reach the first one at {host}:{leader['port']}: "
                f"{error.strerror or error}; is there a firewall between them?"
            ) from None
        return {_name(0, leader): line}
    try:
        with server:
            found = accept(server, str(leader["secret"]), place.size - 1)
    except TimeoutError:
        raise HandscrollError("not all ranks have connected to the first one; is its host behind a firewall?") from None
    return {_name(rank, of_ranks[rank]): line for rank, line in sorted(found.items())}


def _name(rank: int, facts: Mapping[str, Any]) -> str:
    return f"rank {rank} ({facts['device']}, process {facts['process']} on {facts['host']})"


def _facts(spec: CheckpointSpec, device: str, hardware: Hardware) -> dict[str, Any]:
    return {
        "handscroll": __version__,
        "torch": str(torch.__version__).partition("+")[0],
        "diffusers": importlib.metadata.version("diffusers"),
        "checkpoint": checkpoint_digest(spec),
        "kind": device.partition(":")[0],
        "device": device,
        "model": _model_of(device),
        "host": socket.gethostname(),
        "host_id": f"{socket.gethostname()} {boot_id()}",
        "process": os.getpid(),
        "hardware": as_plain(hardware),
    }


def _model_of(device: str) -> str:
    """What devices are that are equally fast."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


# What all ranks must have in common, and what it is called.
_SAME = {
    "handscroll": "handscroll",
    "torch": "torch",
    "diffusers": "diffusers",
    "checkpoint": "the checkpoint (a digest of its files)",
    "kind": "the kind of device",
}


def _check_same(of_ranks: Sequence[Mapping[str, Any]]) -> None:
    for key, what in _SAME.items():
        for rank, facts in enumerate(of_ranks):
            if facts[key] != of_ranks[0][key]:
                raise UsageError(
                    f"{what} is {facts[key]} on rank {rank} ({facts['host']}) and {of_ranks[0][key]} on rank 0 "
                    f"({of_ranks[0]['host']}); all ranks must have the same"
                )
    devices = [(facts["host"], facts["device"]) for facts in of_ranks if facts["kind"] != "cpu"]
    if twice := [device for device in devices if devices.count(device) > 1]:
        raise UsageError(f"two ranks run on {twice[0][1]} of {twice[0][0]}; give each its own device")


def checkpoint_digest(spec: CheckpointSpec) -> str:
    """Of the names, sizes and some of the bytes of a checkpoint's files: the same wherever they lie."""
    digest = hashlib.sha256()
    for path in files_of(spec.folder):
        digest.update(f"{path.relative_to(spec.folder)} {path.stat().st_size}\n".encode())
        _sample(path, digest)
    return digest.hexdigest()[:16]


def _sample(path: Path, digest: Any) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        for index in range(SAMPLES):
            file.seek(index * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
