"""fp32 that is fp32 while a job computes, whatever was set before and however, and all of it put back."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

import handscroll
from handscroll.runtime import arithmetic
from handscroll.runtime.arithmetic import full_fp32

Miniature = Callable[..., Path]
PLACES = [
    ("generic", "all"),
    *product(("cuda", "mkldnn"), ("all", "matmul", "conv", "rnn")),
]


def told() -> dict[tuple[str, str], str]:
    return {place: torch._C._get_fp32_precision_getter(*place) for place in PLACES}


def older() -> list[object]:
    """What the older flags tell, or that they refuse."""
    found: list[object] = []
    for get in (torch._C._get_cublas_allow_tf32, torch._C._get_cudnn_allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(get())
        except RuntimeError:
            found.append("refuses")
    return found


def fresh() -> None:
    """As PyTorch starts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_float32_matmul_precision("highest")
        torch._C._set_cudnn_allow_tf32(True)
    for place in [("generic", "all"), ("cuda", "all"), ("mkldnn", "all")]:
        torch._C._set_fp32_precision_setter(*place, "none")
    for place in product(("mkldnn",), ("matmul", "conv", "rnn")):
        torch._C._set_fp32_precision_setter(*place, "none")


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    fresh()
    yield
    fresh()


def older_way() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = False


def older_way_for_all() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_float32_matmul_precision("medium")


def newer_way() -> None:
    torch._C._set_fp32_precision_setter("cuda", "matmul", "tf32")
    torch._C._set_fp32_precision_setter("cuda", "conv", "ieee")


def newer_way_for_all() -> None:
    torch._C._set_fp32_precision_setter("generic", "all", "tf32")


def newer_way_for_a_library() -> None:
    torch._C._set_fp32_precision_setter("mkldnn", "all", "bf16")
    torch._C._set_fp32_precision_setter("cuda", "all", "tf32")


def both_ways() -> None:
    older_way()
    newer_way()


WAYS = (fresh, older_way, older_way_for_all, newer_way, newer_way_for_all, newer_way_for_a_library, both_ways)


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("way", WAYS)
def test_whatever_was_set_is_put_aside_and_put_back(way: Callable[[], None], device: str) -> None:
    way()
    before, older_before = told(), older()
    for _ in range(2):
        with full_fp32(device):
            inside = told()
            libraries = ("cuda", "mkldnn") if device != "cpu" else ("mkldnn",)
            assert {inside[place] for place in product(libraries, ("matmul", "conv", "rnn"))} == {"ieee"}
            if device != "cpu" and "refuses" not in older_before:
                assert older() == [False, False, "highest"]
        assert told() == before
        assert older() == older_before


@pytest.mark.parametrize("way", WAYS)
def test_who_followed_the_setting_of_all_follows_it_again(way: Callable[[], None]) -> None:
    """Not only the same is told afterwards: what is set above later has the effect that it would have had."""

    def later() -> list[dict[tuple[str, str], str]]:
        found = []
        for place in (("generic", "all"), ("cuda", "all"), ("mkldnn", "all")):
            torch._C._set_fp32_precision_setter(*place, "tf32")
            found.append(told())
        return found

    way()
    expected = later()
    fresh()
    way()
    with full_fp32("cuda"):
        pass
    assert later() == expected


def test_it_is_put_back_after_an_error_and_within_another() -> None:
    older_way_for_all()
    before = told()
    with pytest.raises(KeyError), full_fp32("cuda"), full_fp32("cpu"):
        raise KeyError
    assert told() == before


def test_no_warning_reaches_the_caller() -> None:
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "import torch; from handscroll.runtime.arithmetic import full_fp32\n"
        "with full_fp32('cuda'): pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_way_to_run_sets_it(miniature: Miniature, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """generate, resume, decode, the class and an attached autoencoder."""
    import miniatures
    from handscroll import Handscroll, Request, decode_latent, generate
    from handscroll.banded import backend

    seen: set[str] = set()
    conv = backend.Conv.__call__

    def watched(self: backend.Conv, row_block: torch.Tensor) -> torch.Tensor:
        seen.add(torch._C._get_fp32_precision_getter("mkldnn", "conv"))
        return conv(self, row_block)

    monkeypatch.setattr(backend.Conv, "__call__", watched)
    torch._C._set_fp32_precision_setter("generic", "all", "bf16")
    model = str(miniature("1.6b"))

    def seen_by(run: Callable[[], object]) -> set[str]:
        seen.clear()
        run()
        return set(seen)

    request = Request("a lake", model=model, width=64, height=64, steps=1, seed=1, device="cpu")
    latent = tmp_path / "l.safetensors"
    assert seen_by(lambda: generate(request, tmp_path / "p.png", save_latent=latent)) == {"ieee"}
    assert seen_by(lambda: decode_latent(latent, tmp_path / "q.png")) == {"ieee"}
    picture = Handscroll.from_pretrained(model, device="cpu")("a lake", width=64, height=64, steps=1)
    assert seen_by(picture.numpy) == {"ieee"}
    assert seen_by(lambda: list(picture.rows())) == {"ieee"}
    assert seen_by(lambda: picture.save(tmp_path / "r.png")) == {"ieee"}
    autoencoder = handscroll.attach(miniatures.make_autoencoder())
    with torch.no_grad():
        assert seen_by(lambda: autoencoder.decode(torch.randn(1, 32, 2, 2))) == {"ieee"}
        assert seen_by(lambda: autoencoder.encode(torch.randn(1, 3, 64, 64))) == {"ieee"}
    assert torch._C._get_fp32_precision_getter("mkldnn", "conv") == "bf16"
    assert arithmetic._own_setting("mkldnn", "conv") == "none"


def test_jobs_that_overlap_leave_what_was_set_before() -> None:
    """One begins while another computes, and ends after it."""
    torch._C._set_fp32_precision_setter("mkldnn", "matmul", "bf16")
    before = told()
    first, second = full_fp32("cpu"), full_fp32("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert told()["mkldnn", "matmul"] == "ieee"
    second.__exit__(None, None, None)
    assert told() == before
