"""The processes of a run as one of them sees them: what the leader tells, and how bands are cut."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from handscroll.banded.exchange import Exchange
from handscroll.banded.transformer import Branch
from handscroll.bands import Bands
from handscroll.models.transformer import TransformerSpec
from handscroll.plan.denoise import bands_of_branches
from handscroll.plan.plan import Plan
from handscroll.runtime.distributed.plain import as_plain, of_plain
from handscroll.runtime.distributed.processes import ProcessRanks, as_bytes
from handscroll.weights.dtypes import DTYPES

LEADER = 0
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What a rank says of itself in one message.
MAX_FACTS_BYTES = 1 << 16


@dataclass(frozen=True)
class Command:
    """What the leader tells: what to do, by which plan (for this rank's device), with which tensors."""

    do: str
    plan: Plan | None
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    scratch: str | None


@dataclass(eq=False)
class Team:
    """`ranks` that make one picture. `device`: of this rank. All but the leader `hear` what the leader `tell`s.

    `scratch`: the leader's folder for files that are read again soon (`Session` sets it), which others use where they
    have it too.
    """

    ranks: ProcessRanks
    device: str
    scratch: Path | None = None

    @property
    def leads(self) -> bool:
        return self.ranks.rank == LEADER

    def exchange(self, plan: Plan) -> Exchange:
        """Of the rows of the plan's latent."""
        return Exchange(self.ranks, Bands.of(plan.latent_height, self.ranks.size, plan.speeds or None))

    def exchanges(self, plan: Plan, spec: TransformerSpec, branches: Sequence[Branch]) -> list[Exchange]:
        """Of the rows of the token map, for each branch."""
        rows, columns = plan.latent_height // spec.patch_size, plan.latent_width // spec.patch_size
        tokens = [branch.text.shape[1] for branch in branches]
        found = bands_of_branches(spec, rows, columns, tokens, self.ranks.size, plan.speeds)
        return [Exchange(self.ranks, bands) for bands in found]

    def tell(self, do: str, plan: Plan | None = None, **given: Tensor | float | str | None) -> None:
        """As the leader, tells all ranks what to do next; every rank then does it, the leader too."""
        if not self.leads:
            return
        tensors = {
            name: value.detach().cpu().contiguous() for name, value in given.items() if isinstance(value, Tensor)
        }
        facts = {name: value for name, value in given.items() if not isinstance(value, Tensor | None)}
        of_tensors = [[name, _NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in tensors.items()]
        header = {
            "do": do,
            "plan": None if plan is None else as_plain(plan),
            "tensors": of_tensors,
            "facts": facts,
            "scratch": None if self.scratch is None else str(self.scratch.absolute()),
        }
        self._send(json.dumps(header).encode())
        for tensor in tensors.values():
            self._broadcast(as_bytes(tensor))

    def tell_branches(self, plan: Plan, branches: Sequence[Branch]) -> None:
        """Tells all ranks to predict; `branches_of` makes of the command what was given here."""
        first = branches[0]
        given: dict[str, Tensor | None] = {"timestep": first.timestep, "guidance": first.guidance}
        for index, branch in enumerate(branches):
            latent = branch.latent if index == 0 or branch.latent is not first.latent else None
            given |= {f"latent{index}": latent, f"text{index}": branch.text, f"mask{index}": branch.mask}
        self.tell("predict", plan, branches=len(branches), **given)

    def branches_of(self, command: Command) -> list[Branch]:
        given = {name: tensor.to(self.device) for name, tensor in command.tensors.items()}
        return [
            Branch(
                given.get(f"latent{index}", given["latent0"]),
                given[f"text{index}"],
                given.get(f"mask{index}"),
                given["timestep"],
                given.get("guidance"),
            )
            for index in range(command.facts["branches"])
        ]

    def hear(self) -> Command:
        """Waits for what the leader tells."""
        header = json.loads(self._receive())
        tensors = {}
        for name, dtype, shape in header["tensors"]:
            tensor = torch.empty(shape, dtype=DTYPES[dtype])
            self._broadcast(as_bytes(tensor))
            tensors[name] = tensor
        plan = None if header["plan"] is None else self._of_device(of_plain(Plan, header["plan"]))
        return Command(header["do"], plan, tensors, header["facts"], header["scratch"])

    def collect(self, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What every rank says of itself, on every rank. Raises ValueError for more than is taken."""
        data = json.dumps(facts).encode()
        if len(data) > MAX_FACTS_BYTES:
            raise ValueError(f"{len(data)} bytes are more than {MAX_FACTS_BYTES}")
        own = torch.frombuffer(bytearray(data.ljust(MAX_FACTS_BYTES)), dtype=torch.uint8)
        return [json.loads(part.numpy().tobytes()) for part in self.ranks.gather(own)()]

    def _of_device(self, plan: Plan) -> Plan:
        """A plan of the leader's for this rank's device."""
        smaller = None if plan.smaller is None else self._of_device(plan.smaller)
        return dataclasses.replace(plan, device=self.device, smaller=smaller)

    def _send(self, data: bytes) -> None:
        self._broadcast(torch.tensor([len(data)]))
        self._broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _receive(self) -> bytes:
        count = torch.zeros(1, dtype=torch.int64)
        self._broadcast(count)
        data = torch.empty(int(count), dtype=torch.uint8)
        self._broadcast(data)
        return data.numpy().tobytes()

    def _broadcast(self, tensor: Tensor) -> None:
        """From the leader, into the tensors of the others."""
        dist.broadcast(tensor, dist.get_global_rank(self.ranks.group, LEADER), self.ranks.group)
