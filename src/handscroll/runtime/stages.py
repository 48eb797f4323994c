"""The stages of a run: each opens its module when it is first used, and the one before is freed first.

What is opened has names and shapes; its weights are read layer by layer as they are needed, but for what the plan keeps
in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from handscroll.banded.rows import RowMap
from handscroll.banded.transformer import Branch, predict
from handscroll.errors import HandscrollError
from handscroll.plan.decode import DecodeStage
from handscroll.plan.plan import Plan
from handscroll.plan.store import Store
from handscroll.runtime.checkpoint import open_module
from handscroll.runtime.memory import release
from handscroll.runtime.spill import DiskMap, HostMap
from handscroll.runtime.text import open_text_encoder
from handscroll.runtime.weights import DTYPES, WeightStream
from handscroll.spec import CheckpointSpec

Part = Literal["encoder", "decoder"]


@dataclass(frozen=True, eq=False)
class Opened:
    """A module and the stream that fills it. `kept`: all of it is in memory, and nothing need be lent."""

    module: Any
    stream: WeightStream
    kept: bool = False


class Transformer:
    """A checkpoint's transformer as its plan runs it: in bands, layer by layer."""

    def __init__(self, opened: Opened, plan: Plan, dtype: torch.dtype, scratch: Path | None) -> None:
        self.module, self.stream, self.plan, self.scratch = opened.module, opened.stream, plan, scratch
        self.config = opened.module.config
        self.dtype, self.device = dtype, torch.device(plan.device)

    def predict(self, branches: Sequence[Branch]) -> list[Tensor]:
        """What the transformer gives for each branch. Takes and returns what `banded.transformer.predict` does."""
        stage = self.plan.denoise
        if stage is not None and not stage.together and len(branches) > 1:
            return [self.predict([branch])[0] for branch in branches]
        residual: Store = "memory" if stage is None else stage.residual
        return predict(
            self.module,
            branches,
            layer=self._lend,
            band_rows=None if stage is None else stage.band_rows,
            new_map=lambda height: make_map(residual, height, self.scratch),
            lay_out=stage is not None and stage.lay_out,
        )

    @contextmanager
    def _lend(self, index: int) -> Iterator[nn.Module]:
        blocks = self.module.transformer_blocks
        with self.stream.lend(blocks[index]):
            self.stream.prefetch(blocks[(index + 1) % len(blocks)])  # after the last, for the next step
            yield blocks[index]


class Stages:
    """Text encoder, transformer and autoencoder of one checkpoint, one of them in memory at a time.

    A context manager; `keep=True` holds on to every module once it is loaded, whole, for repeated use. `plan` may be
    replaced between stages. `scratch` is the folder for maps that the plan puts on disk.
    """

    def __init__(self, spec: CheckpointSpec, plan: Plan, *, keep: bool = False, scratch: Path | None = None) -> None:
        self.spec, self.plan, self.keep, self.scratch = spec, plan, keep, scratch
        self.opened: dict[str, Opened] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.free()

    def free(self) -> None:
        """Forgets every module and gives its memory back."""
        if not self.opened:
            return
        for opened in self.opened.values():
            opened.stream.close()
        self.opened.clear()
        release(self.plan.device)

    @property
    def text(self) -> Any:
        """The text encoder; its embedding table stays in the file, which gives the few rows that a prompt needs."""
        return self._open("text_encoder", self.plan.precision.text_encoder).module

    @property
    def dit(self) -> Transformer:
        """The transformer; its position embedding is never stored."""
        precision = self.plan.precision.transformer
        return Transformer(self._open("transformer", precision), self.plan, DTYPES[precision], self.scratch)

    @property
    def decoder(self) -> Opened:
        """The autoencoder with its decoder alone."""
        return self._open("vae", self.plan.precision.autoencoder, "decoder")

    @property
    def encoder(self) -> Opened:
        """The autoencoder with its encoder alone."""
        return self._open("vae", self.plan.precision.autoencoder, "encoder")

    def new_map(self, index: int, height: int) -> RowMap:
        """The map that sweep `index` of the decoder starts from."""
        return self._new_map(self.plan.decoding, index, height)

    def new_encoder_map(self, index: int, height: int) -> RowMap:
        """The map that sweep `index` of the encoder starts from."""
        return self._new_map(self.plan.encoding, index, height)

    def _new_map(self, stage: DecodeStage | None, index: int, height: int) -> RowMap:
        store = stage.sweeps[index].store if stage else "memory"
        return make_map(store or "memory", height, self.scratch)

    @contextmanager
    def at(self, plan: Plan) -> Iterator[None]:
        """Runs another plan of the same job while it is entered: of a size through which the picture grows."""
        own, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = own

    def _open(self, component: Any, precision: str, part: Part | None = None) -> Opened:
        key = f"{component} {part or ''} {precision}"
        if key not in self.opened:
            if not self.keep:
                self.free()
            try:
                self.opened[key] = self._opened(component, DTYPES[precision], part)
            except OSError as error:
                raise HandscrollError(f"{self.spec.folder / component}: cannot be read: {error.strerror}") from error
        return self.opened[key]

    def _opened(self, component: Any, dtype: torch.dtype, part: Part | None) -> Opened:
        if component == "text_encoder":
            module, stream = open_text_encoder(self.spec, dtype=dtype, device=self.plan.device)
            if self.keep:
                stream.keep(module)
            return Opened(module, stream, self.keep)
        leave = {"patch_embed.pos_embed"} if component == "transformer" else set()
        module, stream = open_module(self.spec, component, dtype=dtype, device=self.plan.device, part=part, leave=leave)
        if self.keep or (component == "vae" and self.plan.decode != "rows"):
            stream.keep(module)
            return Opened(module, stream, kept=True)
        if component == "transformer":
            blocks: Any = module.transformer_blocks
            resident = len(blocks) if self.plan.denoise is None else self.plan.denoise.resident_layers
            stream.keep(module, but=blocks[resident:])
            if self.plan.denoise is not None:
                stream.remember(int(1.01 * self.plan.denoise.host_bytes))  # alignment pads a little
        return Opened(module, stream)


def make_map(store: Store, height: int, scratch: Path | None) -> RowMap:
    """A map of so many rows where the plan wants it."""
    match store:
        case "host":
            return HostMap(height)
        case "disk":
            return DiskMap(height, scratch)
    return RowMap(height)
