"""Threads, and what the tests of Triton's kernels need before they run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from triton_cases import INTERPRETS, mended_interpreter


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These tests run thousands of tiny operators: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """Triton's interpreter as devices compute, where it is asked for."""
    if INTERPRETS:
        with mended_interpreter():
            yield
    else:
        yield
