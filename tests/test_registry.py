"""Short names, and what a user may mean by a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from handscroll.errors import UnknownModelError
from handscroll.models.registry import BY_NAME, ENTRIES, resolve

OFFICIAL = {
    "Sana_600M_512px_diffusers": (512, "fp16"),
    "Sana_600M_1024px_diffusers": (1024, "fp16"),
    "Sana_1600M_512px_diffusers": (512, "fp16"),
    "Sana_1600M_512px_MultiLing_diffusers": (512, "fp16"),
    "Sana_1600M_1024px_diffusers": (1024, "fp16"),
    "Sana_1600M_1024px_MultiLing_diffusers": (1024, "fp16"),
    "Sana_1600M_1024px_BF16_diffusers": (1024, "bf16"),
    "Sana_1600M_2Kpx_BF16_diffusers": (2048, "bf16"),
    "Sana_1600M_4Kpx_BF16_diffusers": (4096, "bf16"),
    "SANA1.5_1.6B_1024px_diffusers": (1024, "bf16"),
    "SANA1.5_4.8B_1024px_diffusers": (1024, "bf16"),
    "Sana_Sprint_0.6B_1024px_diffusers": (1024, "bf16"),
    "Sana_Sprint_1.6B_1024px_diffusers": (1024, "bf16"),
}


def test_every_official_checkpoint_has_a_short_name() -> None:
    listed = {entry.hub_id: (entry.native_px, entry.precision) for entry in ENTRIES if entry.hub_id}
    assert listed == {f"Efficient-Large-Model/{name}": facts for name, facts in OFFICIAL.items()}
    assert len(BY_NAME) == len(ENTRIES)
    for entry in ENTRIES:
        assert entry.name == entry.name.lower()
        assert entry.licence
        assert entry.note
        assert "\n" not in entry.licence + entry.note


def test_the_built_in_model_lies_inside_the_package() -> None:
    folder = BY_NAME["tiny-landscape"].builtin_folder
    assert folder is not None
    assert folder.parts[-3:] == ("handscroll", "builtin", "tiny-landscape")
    assert BY_NAME["sana-1.6b"].builtin_folder is None


def test_names_hub_ids_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sana-1.6b").mkdir()
    (tmp_path / "owner/model").mkdir(parents=True)
    assert resolve("sana-1.6b-4k") is BY_NAME["sana-1.6b-4k"]
    assert resolve("Sana-1.6B") is BY_NAME["sana-1.6b"]
    assert resolve("Efficient-Large-Model/Sana_1600M_4Kpx_BF16_diffusers") is BY_NAME["sana-1.6b-4k"]
    assert resolve("./sana-1.6b") == Path("sana-1.6b")
    assert resolve(Path("sana-1.6b")) == Path("sana-1.6b")
    assert resolve("~/owner/model") == tmp_path / "owner/model"
    assert resolve("owner/model") == Path("owner/model")
    assert resolve("owner/other.model-2_diffusers") == "owner/other.model-2_diffusers"


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("sana-1.6-4k", "sana-1.6b-4k"),
        ("sprint-1.6b", "sana-sprint-1.6b"),
        ("tinylandscape", "tiny-landscape"),
        ("zzz", "handscroll models"),
        ("", "handscroll models"),
        ("a/b/c", "handscroll models"),
        ("own..er/model", "handscroll models"),
        ("own er/model", "handscroll models"),
        ("-owner/model", "handscroll models"),
        ("./nowhere", "no such model folder"),
        ("/nowhere/at/all", "no such model folder"),
        ("~/nowhere", "no such model folder"),
        (Path("nowhere"), "no such model folder"),
        ("two\nlines", "handscroll models"),
    ],
)
def test_what_means_nothing_is_answered_with_what_might(model: str | Path, says: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        resolve(model)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
