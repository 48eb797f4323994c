"""What stands in for an autoencoder's `_decode` and `_encode` while it is attached."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from handscroll.banded.autoencoder import decode_rows, decoder_units, encode, encoder_units
from handscroll.banded.exchange import Exchange
from handscroll.bands import Bands
from handscroll.errors import BudgetError, SizeError, UsageError
from handscroll.events import OnEvent, Progress, ignore
from handscroll.integrations.diffusers.budget import VERBS, Job, check_allocator, route_within, spec_of
from handscroll.integrations.diffusers.modes import Half, reason_of_call, reason_of_modes, reason_of_module
from handscroll.integrations.diffusers.weights import execution_device
from handscroll.runtime.arithmetic import full_fp32
from handscroll.runtime.distributed.processes import ProcessRanks
from handscroll.runtime.heap import large_blocks_returned
from handscroll.runtime.memory import enforced, trim

METHODS = {"decoder": "_decode", "encoder": "_encode"}
# Of latents: one of these needs the least, which is not the smallest, whose only sweep holds all weights.
SMALL_SIDES = (1, 2, 4, 8, 16)
_LOG = logging.getLogger("handscroll")

# Makes a bar of so many sweeps, with `update` and `close`.
Bar = Callable[[int], Any]


@dataclass(frozen=True)
class Settings:
    """What `attach` was asked for."""

    strip_rows: int | None = None
    memory_bytes: int | None = None
    on_event: OnEvent = ignore
    group: Any = None  # of ranks that make a band each


class Attachment:
    """One attached autoencoder: its settings, and its two halves by rows.

    It holds no reference that would keep the autoencoder alive, and goes with it into copies and pickles; what shows
    progress stays out of a pickle, since it belongs to this process.
    """

    def __init__(self, autoencoder: Any, settings: Settings, bar: Bar | None = None) -> None:
        self._of = weakref.ref(autoencoder)
        self.settings = settings
        self.bar = bar
        self.said: set[str] = set()

    @property
    def autoencoder(self) -> Any:
        autoencoder = self._of()
        if autoencoder is None:
            raise UsageError("this autoencoder is a shallow copy of an attached one that is gone; attach it itself")
        return autoencoder

    def __getstate__(self) -> dict[str, Any]:
        return {"autoencoder": self._of(), "settings": replace(self.settings, on_event=ignore, group=None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["autoencoder"], state["settings"])  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        return Attachment(memo.get(id(self._of()), self._of()), self.settings, self.bar)

    # What diffusers calls

    def decode(self, z: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W], in place of `AutoencoderDC._decode`."""
        return self._run("decoder", z)

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C, h, w], in place of `AutoencoderDC._encode`."""
        return self._run("encoder", x)

    def _run(self, name: str, given: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            if self.settings.memory_bytes is not None:
                return _run_uncompiled(self, name, given)
            self._say_of_compiling()
            return getattr(type(self.autoencoder), METHODS[name])(self.autoencoder, given)
        return self._run_now(name, given, *_caller(name))

    def _run_now(self, name: str, given: Tensor, caller: Any = None, batch: int = 0) -> Tensor:
        """caller: the autoencoder that was called, where that is known, and `batch` with how many pictures."""
        autoencoder = self.autoencoder
        whole = getattr(type(autoencoder), METHODS[name])
        if caller is not None and caller is not autoencoder:
            self._run_whole_or_refuse("this autoencoder is a shallow copy of the one that was attached")
            return whole(caller, given)
        if not torch.jit._trace.is_tracing() and (given.dim() != 4 or not given.numel()):
            return whole(autoencoder, given)  # nothing to do, or diffusers' own error
        half = Half.of(autoencoder, name)
        reason = reason_of_module(half) or reason_of_call(half, given) or self._reason_of_size(half, given)
        if reason is not None:
            self._run_whole_or_refuse(reason)
            return whole(autoencoder, given)
        if self._would_tile(half, given):
            self._say("tiling is on, and not used while attached: by rows whole pictures fit, without seams")
        moved = given.to(half.device, half.dtype)
        route: dict[str, Any] = {}
        if half.weights.moved:
            route["materialize"] = half.weights.real
        if self.settings.memory_bytes is not None:
            job = self._job(half, max(batch, len(moved)), *moved.shape[2:])
            if moved.data_ptr() != given.data_ptr():
                job = replace(job, held_bytes=job.held_bytes + moved.nbytes)
            stage = route_within(spec_of(autoencoder.config), job, self.settings.memory_bytes)
            route |= {"heights": stage.strip_rows, "starts": stage.starts}
        limit_bytes = self._limit_bytes(half, moved)
        try:
            return self._by_rows(half, moved, route, limit_bytes)
        except torch.OutOfMemoryError:
            if limit_bytes is None:
                raise
        self._say("more than the memory that was allowed is taken: the device's libraries find no way within it")
        return self._by_rows(half, moved, route, None)

    def _by_rows(self, half: Half, given: Tensor, route: dict[str, Any], limit_bytes: int | None) -> Tensor:
        """limit_bytes: of the whole process on a CUDA device, which cuDNN takes for what its scratch may be."""
        run = self._decoded if half.name == "decoder" else self._encoded
        limited = enforced(str(half.device), limit_bytes)
        # PyTorch's own convolutions on CUDA are TF32 by default.
        with (
            full_fp32(half.device.type),
            limited,
            self._kept_memory(half.device),
            self._progress(half.name) as on_sweep,
        ):
            return run(half, given, {**route, "on_sweep": on_sweep})

    def _limit_bytes(self, half: Half, given: Tensor) -> int | None:
        """What a CUDA device's allocator may reserve in all: what it holds, what was allowed, and the result."""
        if self.settings.memory_bytes is None or half.device.type != "cuda" or half.weights.moved:
            return None
        torch.cuda.empty_cache()
        batch, channels, height, width = given.shape
        if half.name == "decoder":
            factor, channels = _upscales(half.module), self.autoencoder.config.in_channels
            samples = channels * height * factor * width * factor
        else:
            factor, channels = self.autoencoder.spatial_compression_ratio, self.autoencoder.config.latent_channels
            samples = channels * -(-height // factor) * -(-width // factor)
        held_bytes = torch.cuda.memory_reserved(half.device)
        return held_bytes + self.settings.memory_bytes + batch * samples * given.element_size()

    def _decoded(self, half: Half, z: Tensor, route: dict[str, Any]) -> Tensor:
        factor = _upscales(half.module)
        batch, _, height, width = z.shape
        exchange = self._exchange(height)
        rows = height if exchange is None else len(exchange.rows)
        out = z.new_empty(batch, self.autoencoder.config.in_channels, rows * factor, width * factor)
        row = 0
        for row_block in decode_rows(half.module, z, self.settings.strip_rows, exchange=exchange, **route):
            out[:, :, row : row + row_block.shape[2]] = row_block
            row += row_block.shape[2]
            del row_block
        return out if exchange is None else exchange.scaled(factor).whole(out, dim=2)

    def _encoded(self, half: Half, x: Tensor, route: dict[str, Any]) -> Tensor:
        factor = round(1 / encoder_units(half.module)[-1].in_scale)
        exchange = self._exchange(x.shape[2] // factor)
        return encode(half.module, x, self.settings.strip_rows, exchange=exchange, **route)

    def _exchange(self, rows: int) -> Exchange | None:
        """Of so many rows of the latent; None where one rank makes all, or each of them does."""
        if self.settings.group is None:
            return None
        ranks = ProcessRanks.of(self.settings.group)
        return None if ranks.size > rows else Exchange(ranks, Bands.of(rows, ranks.size))

    # What is decided before any work

    def check_memory(self, names: Sequence[str] = tuple(METHODS)) -> None:
        """Raises UsageError where the memory cannot be kept in these halves whatever the size."""
        if self.settings.memory_bytes is None:
            return
        spec_of(self.autoencoder.config)
        for name in names:
            if getattr(self.autoencoder, name, None) is None:
                continue  # diffusers' own error, if ever it is called
            half = Half.of(self.autoencoder, name)
            if (reason := reason_of_module(half)) is not None:
                self._run_whole_or_refuse(reason)
            check_allocator(execution_device(self.autoencoder) or half.device)

    def check_any_size(self) -> None:
        """Raises BudgetError where no picture can be decoded within the memory."""
        side_px, refusals = self.autoencoder.spatial_compression_ratio, []
        for sides in SMALL_SIDES:
            try:
                return self.check("decoder", 1, sides * side_px, sides * side_px)
            except BudgetError as error:
                refusals.append(error)
        raise min(refusals, key=lambda error: error.minimum_bytes)

    def check(self, name: str, batch: int, height_px: int, width_px: int) -> None:
        """Raises what running so many pictures of this size would raise, without an input.

        BudgetError where the memory is too little, UsageError where it cannot be kept at all.
        """
        if self.settings.memory_bytes is None:
            return
        autoencoder = self.autoencoder
        half = Half.of(autoencoder, name)
        if (reason := reason_of_module(half)) is not None:
            self._run_whole_or_refuse(reason)
        sides = (height_px, width_px)
        if name == "decoder":
            sides = (height_px // _upscales(half.module), width_px // _upscales(half.module))
        job = replace(self._job(half, batch, *sides), device=execution_device(autoencoder) or half.device)
        route_within(spec_of(autoencoder.config), job, self.settings.memory_bytes)

    def check_modes(self) -> None:
        """Raises UsageError where a memory was allowed and PyTorch's present modes let nothing run by rows."""
        if self.settings.memory_bytes is None:
            return
        device = execution_device(self.autoencoder) or Half.of(self.autoencoder, "decoder").device
        if (reason := reason_of_modes(device)) is not None:
            self._run_whole_or_refuse(reason)

    def _job(self, half: Half, batch: int, height: int, width: int) -> Job:
        """height, width: of the half's input, [B, C, height, width]."""
        if half.name == "decoder":
            factor = _upscales(half.module)
            rows, columns, height, width = height, width, height * factor, width * factor
        else:
            factor = self.autoencoder.spatial_compression_ratio
            rows, columns = -(-height // factor), -(-width // factor)
        held_bytes = 0
        if self.autoencoder.use_slicing and batch > 1:
            # Each slice's result is kept until all are put together into another.
            samples = (
                self.autoencoder.config.in_channels * height * width
                if half.name == "decoder"
                else self.autoencoder.config.latent_channels * rows * columns
            )
            batch, held_bytes = 1, batch * samples * half.dtype.itemsize
        resident = not half.weights.moved
        return Job(half.name, batch, rows, columns, width, height, half.dtype, half.device, held_bytes, resident)

    def _reason_of_size(self, half: Half, given: Tensor) -> str | None:
        """Why a picture of this size can be encoded whole alone. Raises SizeError where it cannot be at all."""
        if half.name == "decoder":
            return None
        height, width = given.shape[2:]
        factor = round(1 / encoder_units(half.module)[-1].in_scale)
        if not height % factor and not width % factor:
            return None
        line = f"a picture of {width}x{height} has sides that are no multiples of {factor}"
        if self._would_tile(half, given):
            return f"{line}, which only tiling encodes"
        first = half.module.conv_in
        rounds_up = hasattr(first, "downsample") and not first.downsample and not first.shortcut
        if rounds_up and not any(-(-side // 2) % (factor // 2) for side in (height, width)):
            return f"{line}, which a strided convolution rounds up"
        raise SizeError(f"{line} and cannot be encoded; crop or resize it")

    def _would_tile(self, half: Half, given: Tensor) -> bool:
        """Whether diffusers itself would take this input tile by tile."""
        autoencoder, (height, width) = self.autoencoder, given.shape[2:]
        kind = "latent" if half.name == "decoder" else "sample"
        large = width > getattr(autoencoder, f"tile_{kind}_min_width")
        large = large or height > getattr(autoencoder, f"tile_{kind}_min_height")
        return bool(autoencoder.use_tiling and large)

    def _run_whole_or_refuse(self, reason: str) -> None:
        if self.settings.memory_bytes is not None:
            raise UsageError(f"memory cannot be kept: {reason}; attach without memory, and the whole module is run")
        self._say(f"the whole module is run, not rows: {reason}")

    @torch.compiler.assume_constant_result
    def _say_of_compiling(self) -> bool:
        """Runs while PyTorch traces a call, once for each graph."""
        self._say("the whole module is run, not rows: torch.compile makes its own code of the layers")
        return True

    def _say(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            _LOG.warning("handscroll: %s", line)

    # What goes on meanwhile

    @contextmanager
    def _progress(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Gives what to call with the number of sweeps that are done, and of all."""
        bars: list[Any] = []

        def on_sweep(done: int, of: int) -> None:
            self._between_sweeps()
            if self.bar is not None:
                if not bars:
                    bars.append(self.bar(of))
                bars[0].update()
            self.settings.on_event(Progress(VERBS[name], done, of))

        try:
            yield on_sweep
        finally:
            for bar in bars:
                bar.close()

    @contextmanager
    def _kept_memory(self, device: torch.device) -> Iterator[None]:
        """What is freed goes back at once where a memory was allowed, and else between two sweeps."""
        keeps = self.settings.memory_bytes is not None
        with large_blocks_returned() if keeps and device.type == "cpu" else nullcontext():
            try:
                yield
            finally:
                self._between_sweeps()
                trim()

    def _between_sweeps(self) -> None:
        if self.settings.memory_bytes is None:
            trim()
        elif torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _upscales(decoder: Any) -> int:
    """Pixels a side that the decoder makes of each latent position."""
    last = decoder_units(decoder)[-1]
    return round(last.in_scale * last.factor)


@torch.compiler.disable(reason="handscroll keeps the memory that it was allowed, which compiled layers do not")
def _run_uncompiled(attachment: Attachment, name: str, given: Tensor) -> Tensor:
    return attachment._run_now(name, given)


def _caller(name: str) -> tuple[Any, int]:
    """The autoencoder whose `decode` or `encode` calls ours, and the batch that it was given; None where another does.

    A shallow copy has our methods too, and its own layers; and with slicing ours are given one picture at a time.
    """
    frame: FrameType | None = sys._getframe(3)
    for _ in range(2):  # a list that is built in a loop has a frame of its own up to Python 3.11
        if frame is not None and frame.f_code.co_name in ("decode", "encode"):
            given = frame.f_locals.get("z" if name == "decoder" else "x")
            found = frame.f_locals.get("self")
            is_autoencoder = isinstance(found, torch.nn.Module) and hasattr(found, METHODS[name])
            return (found, len(given)) if is_autoencoder and isinstance(given, Tensor) else (None, 0)
        frame = None if frame is None else frame.f_back
    return None, 0
