"""Whatever map a sweep starts from, wherever maps are kept and weights come from: the same bits."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from autoencoder_cases import (
    CASES,
    DTYPES,
    autoencoder,
    decode,
    in_dtype,
    latent_of,
    streamed,
)
from handscroll.banded.autoencoder import cut_at_barriers, decode_rows, decoder_units, encode, encoder_units
from handscroll.banded.rows import RowMap
from handscroll.runtime.maps import DiskMap, HostMap

# Configurations that have every kind of unit between them.
ROUTED = (
    "f32",
    "f32 with batch norm and relu",
    "no layers in the last stage",
    "without shortcuts",
    "mixed stages",
    "three scales",
    "ResBlocks only",
)


def every_start(count: int) -> list[list[int]]:
    """For each sweep every map that it could start from."""
    return [list(starts) for starts in itertools.product(*(range(index + 1) for index in range(count)))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROUTED)
def test_every_route_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    decoder, latent = in_dtype(name, dtype), latent_of(autoencoder(name), 3, 4).to(dtype)
    expected = streamed(decoder, latent)
    routes = every_start(len(cut_at_barriers(decoder_units(decoder), 3, 4)))
    chosen = random.Random(0)
    for starts in routes if len(routes) <= 12 else [routes[0], *chosen.sample(routes, 10), routes[-1]]:
        heights = [chosen.choice((1, 2, 3, 7, 50)) for _ in starts]
        assert torch.equal(streamed(decoder, latent, heights=heights, starts=starts), expected), (starts, heights)


class Counted(RowMap):
    """Knows what is open."""

    opened: ClassVar[dict[int, Counted]] = {}

    def __init__(self, sweep: int, height: int) -> None:
        super().__init__(height, chunk_bytes=1000)
        self.sweep, self.reads = sweep, 0
        assert sweep not in self.opened
        self.opened[sweep] = self

    def row_blocks(self, strip_rows: int, keep: bool = False) -> Iterator[Tensor]:
        self.reads += 1
        return super().row_blocks(strip_rows, keep)

    def close(self) -> None:
        super().close()
        self.opened.pop(self.sweep, None)


@pytest.fixture
def opened() -> Iterator[dict[int, Counted]]:
    Counted.opened.clear()
    yield Counted.opened
    Counted.opened.clear()


@pytest.mark.parametrize(
    ("starts", "stored"),
    [
        ([0, 1, 2, 3, 4], [[1], [2], [3], [4], []]),
        ([0, 0, 0, 0, 0], [[], [], [], [], []]),
        ([0, 1, 1, 1, 1], [[1], [1], [1], [1], []]),
        ([0, 0, 2, 1, 3], None),
        ([0, 1, 0, 3, 1], [[1], [1], [1, 3], [1], []]),
    ],
)
def test_maps_live_from_their_first_reader_to_their_last(
    starts: list[int], stored: list[list[int]] | None, opened: dict[int, Counted]
) -> None:
    model = autoencoder("f32")
    latent = latent_of(model, 3, 4)
    after: list[list[int]] = []
    result = decode(
        model, latent, 2, starts=starts, new_map=Counted, on_sweep=lambda done, of: after.append(sorted(opened))
    )
    assert torch.equal(result, decode(model, latent, 2))
    assert stored is None or after == stored
    assert not opened


def test_a_decode_that_is_abandoned_closes_its_maps(opened: dict[int, Counted]) -> None:
    model = autoencoder("f32")
    latent = latent_of(model, 3, 4)
    rows = decode_rows(model.decoder, latent, 1, starts=[0, 1, 1, 3, 1], new_map=Counted)
    next(rows)
    assert sorted(opened) == [1]
    rows.close()
    assert not opened

    def stop(done: int, of: int) -> None:
        if done == 3:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        decode(model, latent, 1, starts=[0, 1, 1, 3, 1], new_map=Counted, on_sweep=stop)
    assert not opened


@pytest.mark.parametrize("kind", ["host", "disk"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps_kept_elsewhere_give_the_same_bits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    decoder, latent = in_dtype("f32", dtype), latent_of(autoencoder("f32"), 3, 4).to(dtype)

    def new_map(sweep: int, height: int) -> RowMap:
        return HostMap(height, chunk_bytes=1000) if kind == "host" else DiskMap(height, tmp_path)

    expected = streamed(decoder, latent)
    for strip_rows in (1, 3):
        for starts in ([0, 1, 2, 3, 4], [0, 1, 1, 3, 1]):
            assert torch.equal(streamed(decoder, latent, strip_rows, starts=starts, new_map=new_map), expected)


class Weights:
    """A decoder on the meta device, whose modules are filled while they are lent and spoilt after."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.real = in_dtype(name, dtype)
        self.decoder = copy.deepcopy(self.real).to("meta")
        self.twins = dict(zip(self.decoder.modules(), self.real.modules(), strict=True))

    @contextmanager
    def materialize(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        lent = []
        for module in itertools.chain(*(module.modules() for module in modules)):
            for table in ("_parameters", "_buffers"):
                own, real = getattr(module, table), getattr(self.twins[module], table)
                lent.append((own, dict(own)))
                for name, value in real.items():
                    copied = None if value is None else value.clone()
                    own[name] = copied if copied is None or table == "_buffers" else nn.Parameter(copied, False)
        yield
        for own, before in lent:
            for value in own.values():
                if value is not None:
                    value.fill_(1 if value.dtype == torch.int64 else float("nan"))
            own.update(before)


@pytest.mark.parametrize("plain", [False, True], ids=["", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_materialized_weights_give_the_same_bits(name: str, dtype: torch.dtype, plain: bool) -> None:
    weights = Weights(name, dtype)
    height, width = CASES[name].sizes[-1]
    latent = latent_of(autoencoder(name), height, width).to(dtype)
    expected = streamed(weights.real, latent, 2, plain=plain)
    assert torch.equal(streamed(weights.decoder, latent, 2, plain=plain, materialize=weights.materialize), expected)
    assert all(parameter.is_meta for parameter in weights.decoder.parameters())


def test_one_module_is_materialized_at_a_time() -> None:
    weights, entered, most = Weights("f32", torch.float32), [0], [0]

    @contextmanager
    def materialize(modules: Sequence[nn.Module]) -> Iterator[None]:
        entered[0] += len(modules)
        most[0] = max(most[0], entered[0])
        with weights.materialize(modules):
            yield
        entered[0] -= len(modules)

    latent = latent_of(autoencoder("f32"), 3, 4)
    starts = [0, 1, 0, 1, 0]
    expected = streamed(weights.real, latent)
    assert torch.equal(streamed(weights.decoder, latent, materialize=materialize, starts=starts), expected)
    assert most == [1]
    with pytest.raises(ValueError, match="meta"):
        streamed(weights.decoder, latent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"starts": [0, 1]}, "starts must be one for each of 5 sweeps"),
        ({"starts": [0, 1, 3, 3, 4]}, "sweep 2 cannot start from map 3: only from maps 0 to 2"),
        ({"starts": [0, 1, 2, -1, 4]}, "sweep 3 cannot start from map -1"),
        ({"heights": [1, 1]}, "heights must be one for each of 5 sweeps"),
        ({"heights": [1, 1, 1, 0, 1]}, "at least 1 row"),
    ],
)
def test_routes_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    model = autoencoder("f32")
    with pytest.raises(ValueError, match=message):
        decode(model, latent_of(model, 3, 4), **options)


def test_encode_takes_routes_too() -> None:
    model = autoencoder("f32")
    image = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(2))
    expected = encode(model.encoder, image, 2)
    count = len(cut_at_barriers(encoder_units(model.encoder), 96, 64))
    for starts in every_start(count)[::5]:
        assert torch.equal(encode(model.encoder, image, starts=starts, heights=range(1, 1 + count)), expected)
