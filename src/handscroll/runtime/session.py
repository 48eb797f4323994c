"""The models of one checkpoint at work: each is opened when a stage asks for it, and the one before is freed first.

What is opened has names and shapes; its weights are read layer by layer as they are needed, but for what the plan keeps
resident.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from handscroll.banded.autoencoder import Materialize
from handscroll.banded.exchange import Exchange
from handscroll.banded.transformer import Branch, predict
from handscroll.errors import HandscrollError
from handscroll.events import OnEvent, Progress, ignore, pulse
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.transformer import EMBEDDERS, TransformerSpec
from handscroll.plan.host import layers_room_bytes
from handscroll.plan.plan import Plan
from handscroll.plan.stages import DENOISE, DENOISE_PART, TEXT, TEXT_PART
from handscroll.plan.store import Store
from handscroll.runtime.distributed import Team
from handscroll.runtime.lending import lend
from handscroll.runtime.maps import new_map
from handscroll.runtime.memory import release
from handscroll.runtime.modules import Component, Half, open_module
from handscroll.runtime.text_encoder import open_text_encoder
from handscroll.weights.dtypes import DTYPES
from handscroll.weights.stream import WeightStream


@dataclass(frozen=True, eq=False)
class Opened:
    """A module and the stream that fills it. `resident`: all of it is in memory, and nothing need be read."""

    module: Any
    stream: WeightStream
    resident: bool = False

    @property
    def materialize(self) -> Materialize | None:
        """Makes submodules real while its context is entered; None where all of them are."""
        return None if self.resident else lambda modules: self.stream.materialize(*modules)


@dataclass(frozen=True, slots=True)
class OpenedAs:
    """What a module is open as. `module`: text_encoder, transformer, encoder or decoder."""

    module: str
    precision: str
    device: str


class Transformer:
    """A checkpoint's transformer as a plan runs it: in row blocks, layer by layer.

    `scratch`: where its maps go. `pulse` is called before each layer. `team`: who makes the other bands of its maps.
    """

    def __init__(
        self,
        opened: Opened,
        spec: TransformerSpec,
        plan: Plan,
        scratch: Path | None,
        pulse: Callable[[str], None],
        team: Team | None = None,
    ) -> None:
        self.spec = spec
        self.module, self.stream, self.plan, self.scratch = opened.module, opened.stream, plan, scratch
        self._pulse, self._team = pulse, team
        self.config = opened.module.config
        self.dtype, self.device = DTYPES[plan.precision.transformer], torch.device(plan.device)

    def predict(self, branches: Sequence[Branch]) -> list[Tensor]:
        """What the transformer gives for each branch. Takes and returns what `banded.transformer.predict` does."""
        plan = self.plan.denoise
        if plan is not None and not plan.together and len(branches) > 1:
            return [self.predict([branch])[0] for branch in branches]
        residual: Store = "memory" if plan is None else plan.residual
        exchanges = None
        if self._team is not None:
            self._team.tell_branches(self.plan, branches)
            exchanges = self._team.exchanges(self.plan, self.spec, branches)
        made = predict(
            self.module,
            branches,
            layer=self._materialize,
            band_rows=None if plan is None else plan.band_rows,
            new_map=lambda height: new_map(residual, height, self.scratch),
            lay_out=plan is not None and plan.lay_out,
            exchanges=exchanges,
        )
        if exchanges is None:
            return made
        scaled = [exchange.scaled(self.spec.patch_size) for exchange in exchanges]
        return [exchange.whole(each, dim=2) for exchange, each in zip(scaled, made, strict=True)]

    @contextmanager
    def _materialize(self, index: int) -> Iterator[nn.Module]:
        blocks = self.module.transformer_blocks
        self._pulse(DENOISE.name)
        with self.stream.materialize(blocks[index]):
            self.stream.prefetch(blocks[(index + 1) % len(blocks)])  # after the last, for the next step
            yield blocks[index]


def embedder_units(transformer: Any) -> list[nn.Module]:
    """Of what embeds a timestep and a prompt, the modules that run one after the other."""
    within = [each for name in EMBEDDERS for each in transformer.get_submodule(name).modules()]
    return [each for each in within if next(each.parameters(recurse=False), None) is not None]


class Session:
    """Text encoder, transformer and autoencoder of one checkpoint, one of them in memory at a time.

    A context manager. Beside the one at work, those stay in memory that the plan keeps (`Plan.kept`), each of them
    whole. `scratch` is the folder for maps that a plan puts on disk. What a module is opened in, and how much of it
    stays in memory, is the plan's that it is first opened with; `free_but` before another plan is to be followed.
    `opened` says what is open, by module, precision and device. `on_event` is given a pulse between two blocks, and
    told once of each tensor that is not used. With a `team` this is one rank of several, which make bands of a picture.
    """

    def __init__(
        self,
        spec: CheckpointSpec,
        *,
        scratch: Path | None = None,
        on_event: OnEvent = ignore,
        team: Team | None = None,
    ) -> None:
        self.spec, self.on_event, self.team = spec, on_event, team
        self.scratch = scratch
        self._told: set[str] = set()
        self._untold: list[Progress] | None = None  # while a file is read: what is told after
        self._raised: OSError | None = None  # by the listener, while a file is read
        self.opened: dict[OpenedAs, Opened] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.free()

    @property
    def scratch(self) -> Path | None:
        return self._scratch

    @scratch.setter
    def scratch(self, folder: Path | None) -> None:
        self._scratch = folder
        if self.team is not None:
            self.team.scratch = folder

    def exchange(self, plan: Plan) -> Exchange | None:
        """Of the rows of the plan's latent; None where this rank makes all."""
        return None if self.team is None else self.team.exchange(plan)

    def pulse(self, stage: str) -> None:
        """Gives the listener a moment to end the job in."""
        self.on_event(pulse(stage))

    @property
    def held_bytes(self) -> int:
        """What the open modules hold on their device, or in the process on a CPU."""
        return sum(opened.stream.held_bytes for opened in self.opened.values())

    def free(self) -> None:
        """Forgets every module and gives its memory back."""
        self.free_but(())

    def free_but(self, kept: Collection[str]) -> None:
        """Forgets every module but those that are open whole and are to be kept, and gives their memory back."""
        self._forget([key for key, opened in self.opened.items() if key.module not in kept or not opened.resident])

    def _forget(self, keys: Collection[OpenedAs]) -> None:
        for key in keys:
            self.opened.pop(key).stream.close()
        for device in {key.device for key in keys}:
            release(device)

    def open_text_encoder(self, plan: Plan) -> Any:
        """The text encoder; its embedding table stays in the file, which gives the few rows that a prompt needs."""

        def opened(kept: bool) -> Opened:
            dtype = DTYPES[plan.precision.text_encoder]
            module, stream = open_text_encoder(
                self.spec,
                dtype=dtype,
                device=plan.device,
                storage=plan.precision.text_encoder_storage,
                on_event=self._tell_once,
                on_layer=lambda: self.pulse(TEXT.name),
            )
            if kept:
                stream.make_resident(module)
            return Opened(module, stream, resident=kept)

        return self._once(TEXT_PART.module, "text_encoder", plan.precision.told("text_encoder"), plan, opened).module

    def open_transformer(self, plan: Plan) -> Transformer:
        """The transformer, its first layers resident as the plan says; its position embedding is never stored."""

        def opened(kept: bool) -> Opened:
            module, stream = self._open_module("transformer", plan.precision.transformer, plan)
            blocks: Any = module.transformer_blocks
            if kept or plan.denoise is None:
                stream.make_resident(module, before_each=self._pulse_while_opening)
                return Opened(module, stream, resident=True)
            units = embedder_units(module) if plan.denoise.embedders_pass else []
            passing = [*blocks[plan.denoise.resident_layers :], *units]
            stream.make_resident(module, but=passing, before_each=self._pulse_while_opening)
            for unit in units:
                lend(unit, stream, frees=True)
            layer_bytes = stream.sent_bytes_of(blocks[0]) if len(blocks) else 0
            stream.pin(layers_room_bytes(plan.denoise.host_layers, layer_bytes))
            return Opened(module, stream)

        precision = plan.precision.told("transformer")
        opened_as = self._once(DENOISE_PART.module, "transformer", precision, plan, opened)
        return Transformer(opened_as, self.spec.transformer, plan, self.scratch, self.pulse, self.team)

    def open_autoencoder(self, plan: Plan, half: Half) -> Opened:
        """The autoencoder with one half alone."""

        def opened(kept: bool) -> Opened:
            module, stream = self._open_module("vae", plan.precision.autoencoder, plan, half)
            resident = kept or plan.decode != "rows"
            if resident:
                stream.make_resident(module)
            return Opened(module, stream, resident=resident)

        return self._once(half, f"vae's {half}", plan.precision.autoencoder, plan, opened)

    def _open_module(
        self, component: Component, precision: str, plan: Plan, half: Half | None = None
    ) -> tuple[Any, WeightStream]:
        leave = {"patch_embed.pos_embed"} if component == "transformer" else set()
        return open_module(
            self.spec,
            component,
            dtype=DTYPES[precision],
            device=plan.device,
            part=half,
            leave=leave,
            storage=plan.precision.transformer_storage if component == "transformer" else "",
            on_event=self._tell_once,
        )

    def _pulse_while_opening(self) -> None:
        """Quantising while reading takes long enough for somebody to want an end."""
        try:
            self.pulse(DENOISE.name)
        except OSError as error:  # no fault of the file's
            self._raised = error
            raise

    def _tell_once(self, event: Progress) -> None:
        if event.detail not in self._told:
            self._told.add(event.detail)
            if self._untold is None:
                self.on_event(event)
            else:
                self._untold.append(event)

    def _once(self, module: str, title: str, precision: str, plan: Plan, opened: Callable[[bool], Opened]) -> Opened:
        """What is open of a module, in a precision and on the plan's device; else it takes the place of the others.

        Raises CheckpointError where the file has changed under what is resident.
        """
        key = OpenedAs(module, precision, plan.device)
        if key in self.opened:
            self.opened[key].stream.check()
            return self.opened[key]
        others = [other for other in self.opened if other.module == module or other.module not in plan.kept]
        self._forget(others)
        untold = self._untold = []
        try:
            self.opened[key] = opened(module in plan.kept)
        except OSError as error:
            if error is self._raised:
                raise
            raise HandscrollError(f"{self.spec.folder}: its {title} cannot be read: {error.strerror}") from error
        finally:
            self._untold = None
        for event in untold:  # what a listener raises is no fault of the file's
            self.on_event(event)
        return self.opened[key]
