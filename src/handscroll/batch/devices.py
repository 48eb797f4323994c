"""What each worker of a batch runs on, here and on a cluster. Decisions alone: what is there is handed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from handscroll.errors import UsageError
from handscroll.request import count_devices


def devices_of_workers(workers: str | None, devices: str | None, device: str, cuda_devices: int) -> list[str]:
    """What each worker runs on: one device, as `cpu` or `cuda:1`, or several that make a picture together.

    workers: as `--workers`, a number, cpu:N or a list of CUDA devices; None takes every GPU, or one process where there
    is none. devices: of each picture, as `--devices`, a number or cpu:N. Raises UsageError.
    """
    group, on_cpu = _group_of(devices)
    if device not in ("auto", "cuda"):
        if workers is not None and not workers.isdigit():
            raise UsageError(f"--device names one device and --workers {workers} others; leave one of them out")
        _check_there([device], cuda_devices)
        return [device] * int(workers or 1)
    if device == "cuda" and (on_cpu or not cuda_devices or (workers or "").startswith("cpu")):
        raise UsageError("--device cuda: no GPU is here, or --workers or --devices name processors")
    if workers is not None and workers.startswith("cuda"):
        if on_cpu:
            raise UsageError(f"--workers {workers} are GPUs, and --devices {devices} are not; leave one of them out")
        _check_there(workers.split(","), cuda_devices)
        return _grouped(workers.split(","), group, f"--workers {workers}")
    if on_cpu or (workers or "").startswith("cpu") or not cuda_devices:
        count = 1 if workers is None else count_devices(workers)
        return [f"cpu:{group}" if group > 1 else "cpu"] * count
    found = _grouped([f"cuda:{index}" for index in range(cuda_devices)], group, f"this machine's {cuda_devices} GPUs")
    if workers is None:
        return found
    if int(workers) > len(found):
        of_each = f" of {group} devices" if group > 1 else ""
        raise UsageError(f"{workers} workers{of_each} are more than this machine's {cuda_devices} GPUs are enough for")
    return found[: int(workers)]


def _group_of(devices: str | None) -> tuple[int, bool]:
    """How many devices make a picture together, and whether they are processes on the CPU."""
    if devices is None:
        return 1, False
    if devices.startswith("cuda"):
        raise UsageError(
            f"--devices {devices} names the devices of one picture; a batch takes a number there, and --workers "
            f"{devices} for a process on each"
        )
    return count_devices(devices), devices.startswith("cpu")


def _check_there(devices: Sequence[str], cuda_devices: int) -> None:
    for device in devices:
        if device.startswith("cuda:") and int(device.removeprefix("cuda:")) >= cuda_devices:
            raise UsageError(f"{device} is not here: this machine has {cuda_devices} GPUs")


def _grouped(devices: Sequence[str], group: int, what: str) -> list[str]:
    if len(devices) < group:
        raise UsageError(f"{what} are fewer than the {group} devices of a picture; use a smaller --devices")
    if what.startswith("--") and len(devices) % group:
        raise UsageError(f"{what} cannot be shared out in groups of {group}; leave {len(devices) % group} of them out")
    return [",".join(devices[first : first + group]) for first in range(0, len(devices) - group + 1, group)]


def on_device(request: Mapping[str, Any], device: str) -> dict[str, Any]:
    """A request's fields, with what a worker runs on."""
    several = "," in device or device.startswith("cpu:") or device.isdigit()
    return {**request, "device": "auto" if several else device, "devices": device if several else None}


@dataclass(frozen=True)
class Arranged:
    """How many workers there are on a cluster, and what each takes of it: `cpus` and `gpus` as Ray counts them.

    `device`: what a worker runs on, as `on_device` takes it. `threads`: of each, 0 where torch decides. `on_a_machine`:
    how many may share a machine's memory. `has`: the cluster in words.
    """

    workers: int
    cpus: int
    gpus: int
    device: str
    threads: int
    on_a_machine: int
    has: str


def arranged(
    machines: Sequence[Mapping[str, float]], workers: int | None, device: str, devices: str | None, most: int | None
) -> Arranged:
    """What workers a cluster of such machines has, each by its `CPU` and `GPU`. The rest as of `RayPool`.

    One worker for each GPU, or each machine where there is none; the devices of a group are of one machine. Raises
    UsageError for more than there can be.
    """
    cores, gpus = (sum(int(machine.get(kind, 0)) for machine in machines) for kind in ("CPU", "GPU"))
    has = f"{cores} cores and {gpus} GPUs on {len(machines)} machine{'s' * (len(machines) != 1)}"
    if device.startswith("cuda:"):
        raise UsageError(f"--device {device} names a GPU of this machine; on a cluster use auto, cpu or cuda")
    if device == "cuda" and not gpus:
        raise UsageError(f"the cluster has no GPU, only {has}; use --device cpu")
    group = 1 if devices is None else count_devices(devices)
    on_cpu = device == "cpu" or (devices or "").startswith("cpu") or not gpus
    room = [int(machine.get("CPU" if on_cpu else "GPU", 0)) // group for machine in machines]
    count = workers or (sum(1 for each in room if each) if on_cpu else sum(room))
    if not 1 <= count <= sum(room):
        if not sum(room):
            raise UsageError(f"the cluster has {has}, and no machine enough of them for --devices {devices or 1}")
        of_each = f" of {group} devices each" if group > 1 else ""
        raise UsageError(
            f"{count} workers{of_each} do not fit: the cluster has {has}; use --workers {sum(room)} or fewer"
        )
    count = min(count, most or count)
    several = f"cpu:{group}" if on_cpu else str(group)
    return Arranged(
        workers=count,
        cpus=group if on_cpu else 1,
        gpus=0 if on_cpu else group,
        device=several if group > 1 else "cpu" if on_cpu else "cuda",
        threads=max(1, cores // count) if on_cpu and group == 1 else 0,
        on_a_machine=-(-count // sum(1 for each in room if each)),
        has=has,
    )
