"""The training of transformer and text encoder: what it reads, what its steps do, and that it can be cut off."""

from __future__ import annotations

import argparse
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from training.captions import build_tokenizer, sample_captions
from training.claims import ATTRIBUTES, claims
from training.latents import Bucket, LatentFiles, paint
from training.scorer import answers
from training.transformer import (
    Batch,
    CaptionedLatents,
    Losses,
    Painter,
    TransformerTraining,
    covered,
    from_noise,
    losses,
    placing_loss,
)
from training.world import PLACED, Box, places, render, sample_scene
from transformers import PreTrainedTokenizerFast

SQUARE, WIDE = Bucket(128, 128), Bucket(192, 128)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(sample_captions(500, seed=3))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a few pictures of two sizes, in place of the plan's; their latents are noise."""
    monkeypatch.setattr("training.transformer.PLAN", ((SQUARE, 16), (WIDE, 16)))
    monkeypatch.setattr("training.transformer.SHARES", {SQUARE.name: (0.5, 0.5), WIDE.name: (0.5, 0.5)})
    rng = np.random.default_rng(0)
    for bucket in (SQUARE, WIDE):
        captions = [paint((bucket, i))[1] for i in range(16)]
        files = LatentFiles(tmp_path, bucket)
        files.append(rng.normal(size=(16, *files.shape)).astype(np.float16), captions)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def options(work: Path, **changes: object) -> argparse.Namespace:
    plain = {
        "steps": 3,
        "tokens": 64,
        "workers": 2,
        "rate": 1e-3,
        "precision": "fp32",
        "minutes": 5.0,
        "horizon": 10,
        "decay": 0.5,
    }
    return argparse.Namespace(work=work, device="cpu", **{**plain, **changes})


def drawn(work: Path, tokenizer: PreTrainedTokenizerFast, bucket: Bucket, count: int, seed: int) -> Batch:
    return CaptionedLatents(LatentFiles(work, bucket), tokenizer).draw(count, np.random.default_rng(seed))


def lost(painter: Painter, batch: Batch, emphasis: float = 0.0) -> Losses:
    return losses(painter, batch, from_noise(batch.latents, torch.Generator().manual_seed(0)), emphasis)


def test_truths_are_those_of_the_pictures(tmp_path: Path) -> None:
    for seed in range(20):
        truths = answers(LatentFiles(tmp_path, SQUARE).scene(seed))
        labels = {a.name: a.labels[t] for a, t in zip(ATTRIBUTES, truths, strict=True) if t >= 0}
        for line in paint((SQUARE, seed))[1].split("\t"):
            for name, allowed in claims(line).items():
                assert labels[name] in allowed


def test_what_a_caption_leaves_out_is_unsaid(work: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    files = CaptionedLatents(LatentFiles(work, SQUARE), tokenizer)
    batch = files.held_out(2)
    for i in range(2):
        claimed = claims(files.captions[i][0])
        for attribute, truth, said in zip(ATTRIBUTES, batch.truths[i].tolist(), batch.said[i].tolist(), strict=True):
            assert said == (truth if attribute.name in claimed else len(attribute.labels))
    assert (files._batch(np.arange(2), ["", ""]).said == torch.tensor([len(a.labels) for a in ATTRIBUTES])).all()


def test_the_readers_teach_the_text_encoder(work: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    painter = Painter(tokenizer)
    made = lost(painter, drawn(work, tokenizer, WIDE, 4, seed=1))
    words = painter.text_encoder.embed_tokens.weight
    from_flow, from_reading, from_placing, from_hearing = (
        torch.autograd.grad(loss, words, retain_graph=True)[0]
        for loss in (made.flow, made.reading, made.placing, made.hearing)
    )
    assert from_flow.abs().max() == 0, "a fresh output lets nothing through"
    assert from_reading.abs().max() > 0
    assert from_placing.abs().max() > 0
    assert from_hearing.abs().max() > 0


def test_what_the_blocks_give_is_kept_small(work: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    painter, batch = Painter(tokenizer), drawn(work, tokenizer, WIDE, 4, seed=1)
    before = lost(painter, batch)
    first = painter.transformer.patch_embed.proj.weight
    with torch.no_grad():
        first.mul_(20)
    after = lost(painter, batch)
    assert after.activity > 2 * before.activity
    (slope,) = torch.autograd.grad(after.activity, first)
    assert (slope * first).sum() > 0, "a smaller weight is a smaller loss"


def test_things_are_where_they_are_said_to_be() -> None:
    """Without its boat a picture changes in the boat's box, and hardly elsewhere."""
    rng, found = np.random.default_rng(3), 0
    while found < 6:
        scene = sample_scene(rng)
        if scene.subject != "boat" or scene.island:
            continue
        found += 1
        with_it, without = (render(s, 192, 128) for s in (scene, dataclasses.replace(scene, subject="none")))
        changed = np.abs(with_it.astype(int) - without).max(axis=-1) > 20
        cover = covered(places(scene, 192, 128), 128, 192)[PLACED.index("subject")] > 0
        assert changed.any()
        assert changed[cover].sum() > 0.9 * changed.sum()


def test_a_token_is_covered_by_as_much_as_a_box_takes_of_it() -> None:
    cover = covered({"subject": Box(0.25, 0.5, 0.625, 2.0)}, 2, 4)
    assert cover.dtype == np.float32
    assert cover[PLACED.index("subject")].tolist() == [[0, 0, 0, 0], [0, 1, 0.5, 0]]
    assert np.count_nonzero(cover) == 2


def test_a_place_that_is_known_costs_nothing() -> None:
    cover = torch.zeros(2, len(PLACED), 4, 4)
    cover[0, 1, 2:, 1:3] = 1
    known, unknown = torch.where(cover > 0, 0.0, -30.0), torch.zeros_like(cover)
    assert float(placing_loss(known, cover)) == pytest.approx(0, abs=1e-6)
    assert float(placing_loss(unknown, cover)) == pytest.approx(np.log(16 / 4))
    assert float(placing_loss(unknown, torch.zeros_like(cover))) == 0, "nothing is there"


@torch.no_grad()
def test_errors_at_small_things_weigh_more(work: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    painter, batch = Painter(tokenizer), drawn(work, tokenizer, SQUARE, 8, seed=1)
    plain, stressed = (
        lost(painter, dataclasses.replace(batch, cover=cover), 4.0).flow
        for cover in (torch.zeros(8, len(PLACED), 4, 4), torch.ones(8, len(PLACED), 4, 4))
    )
    assert float(stressed) == pytest.approx(5 * float(plain), rel=1e-5)


def test_workers_do_not_read_from_each_other(work: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    painter = Painter(tokenizer).eval()
    batches = [drawn(work, tokenizer, (SQUARE, WIDE)[i % 2], 2, seed=i) for i in range(8)]

    @torch.no_grad()
    def reading(batch: Batch) -> float:
        return float(lost(painter, batch).reading)

    alone = [reading(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(reading, batches))
    assert together == pytest.approx(alone, rel=1e-5)


def test_a_training_that_was_cut_off_goes_on(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = TransformerTraining(options(work))
    first.run()
    assert "step      3  held-out loss 128x128" in capsys.readouterr().out
    second = TransformerTraining(options(work, steps=5))
    assert second.step == 3
    for name, weight in second.model.state_dict().items():
        assert torch.equal(weight, first.model.state_dict()[name])
    second.run()
    assert second.step == 5


def test_a_folder_without_pictures_says_what_to_do(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(SystemExit, match="recipe"):
        TransformerTraining(options(tmp_path)).run()
