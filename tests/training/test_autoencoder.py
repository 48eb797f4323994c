"""The linear start, the windows it is fitted to, and the room that a package has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from training.autoencoder import as_floats, fidelity, linear_autoencoder, reconstruct, reconstruction_loss
from training.captions import build_tokenizer, sample_captions
from training.export import LIMIT
from training.linear_start import PatchPCA
from training.transformer import Painter
from training.windows import MIXTURE, SIDE, make_windows, window_jobs
from training.world import render, sample_scene


@pytest.fixture(scope="module")
def windows() -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    return np.stack([render(sample_scene(rng), SIDE, SIDE).transpose(2, 0, 1) for _ in range(12)])


def test_the_first_step_is_already_as_good_as_principal_components(windows: NDArray[np.uint8]) -> None:
    pictures = as_floats(windows)
    chain, _ = fidelity(reconstruct(linear_autoencoder(windows), pictures), pictures)
    components, _ = fidelity(PatchPCA.fit(pictures, keep=32).reconstruct(pictures), pictures)
    assert chain > components - 1.0


def test_an_error_at_an_edge_costs_more_than_in_the_sky() -> None:
    target = torch.zeros(1, 3, 32, 32)
    target[..., 16:] = 1
    losses = []
    for column in (4, 16):
        output = target.clone()
        output[..., column] += 0.1
        losses.append(float(reconstruction_loss(output, target)))
    assert losses[1] > losses[0]


def test_all_weights_fit_into_a_package(windows: NDArray[np.uint8]) -> None:
    painter = Painter(build_tokenizer(sample_captions(2000, seed=3)))
    shipped = (painter.text_encoder, painter.transformer, linear_autoencoder(windows))
    weights = sum(p.numel() for model in shipped for p in model.parameters())
    assert 2 * weights < LIMIT - 2**18, "the rest is for the tokenizer and the configs"


def test_every_size_gets_its_share_of_windows() -> None:
    jobs = window_jobs(4000, seed=1)
    for size, share, _ in MIXTURE:
        assert sum(count for s, count, _ in jobs if s == size) == pytest.approx(4000 * share, rel=0.2)


def test_windows_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.windows.MIXTURE", ((256, 0.5, 1), (512, 0.5, 2)))
    path = tmp_path / "windows.npy"
    make_windows(path, 6, seed=4, processes=1)
    made = np.load(path)
    assert made.shape == (7, 3, SIDE, SIDE)
    assert all(window.max() > window.min() for window in made)
    make_windows(path, 600, seed=4, processes=1)
    assert len(np.load(path)) == 7
