"""What is made of saved results: the regression guard and the chart."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
MACHINE = {"processor": "A", "cores": 2, "threads": 2, "torch": "2", "diffusers": "0"}
GIB = 2**30


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    import guard

    monkeypatch.setattr(guard, "RESULTS", tmp_path)
    return guard


def result(date: str = "2026-01-01", **changes: Any) -> dict[str, Any]:
    rows = {"seconds": 4.0, "peak_bytes": GIB, "seconds_over_whole": 0.7, "peak_bytes_over_whole": 0.3, "of_limit": 0.8}
    whole = {"seconds": 6.0, "peak_bytes": 3 * GIB, "seconds_over_whole": 1.0, "of_limit": 0.5}
    small = {"size": "1024x1024", "pixels": 2**20, "modes": {"whole": whole, "rows": rows}, "failed": {}}
    large = {
        "size": "2048x2048",
        "pixels": 2**22,
        "modes": {"rows": {**rows, "seconds": 16.0}},
        "failed": {"whole": "needs about 12 GiB of memory", "tiled": "ended by signal 9"},
    }
    head = {"date": date, "time": "10:00", "machine": MACHINE, "stage": "decode", "model": "m", "precision": "fp32"}
    return {**head, "device": "cpu", "sizes": [small, large], "curves": {}, **changes}


def changed(**of_rows: float) -> dict[str, Any]:
    new = result("2026-01-02")
    new["sizes"][0]["modes"]["rows"].update(of_rows)
    return new


def written(folder: Path, **results: Any) -> list[str]:
    paths = [folder / f"{name}.json" for name in results]
    for path, found in zip(paths, results.values(), strict=True):
        path.write_text(json.dumps(found))
    return list(map(str, paths))


# The guard


@pytest.mark.parametrize(
    ("of_rows", "worse"),
    [
        ({}, None),
        ({"seconds": 400.0}, None),  # the machine was busy: so were the others
        ({"seconds_over_whole": 0.76}, None),
        ({"seconds_over_whole": 0.78}, "seconds_over_whole"),
        ({"peak_bytes_over_whole": 0.4}, "peak_bytes_over_whole"),
        ({"of_limit": 0.7}, "of_limit"),
        ({"of_limit": 0.99, "seconds_over_whole": 0.5}, None),
    ],
)
def test_what_got_worse(guard: Any, tmp_path: Path, capsys: Any, of_rows: Any, worse: str | None) -> None:
    assert guard.main(written(tmp_path, old=result(), new=changed(**of_rows))) == (1 if worse else 0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WORSE")]
    assert len(lines) == (1 if worse else 0)
    assert not worse or worse in lines[0]


def test_the_tolerance_can_be_set(guard: Any, tmp_path: Path) -> None:
    files = written(tmp_path, old=result(), new=changed(seconds_over_whole=0.76))
    assert guard.main([*files, "--tolerance", "0.05"]) == 1


def test_a_size_that_fails_now_is_worse(guard: Any, tmp_path: Path, capsys: Any) -> None:
    new = result("2026-01-02")
    del new["sizes"][1]["modes"]["rows"]
    new["sizes"][1]["failed"]["rows"] = "ended by signal 9"
    assert guard.main(written(tmp_path, old=result(), new=new)) == 1
    assert "WORSE 2048x2048 ended by signal 9" in capsys.readouterr().out


def test_a_cost_that_is_less_constant_is_worse(guard: Any, tmp_path: Path) -> None:
    curves = [{"rows": {"points": [{"size": "1024x1024"}], "seconds_spread": spread}} for spread in (1.1, 1.3)]
    old, new = result(curves=curves[0]), result("2026-01-02", curves=curves[1])
    assert guard.main(written(tmp_path, old=old, new=new)) == 1
    assert guard.main(written(tmp_path, old=new, new=old)) == 0


def test_one_file_is_held_to_the_newest_older_one(guard: Any, tmp_path: Path, capsys: Any) -> None:
    others = {
        "oldest": result("2025-01-01"),
        "older": result("2025-06-01"),
        "newer": result("2026-06-01"),
        "elsewhere": result("2025-12-31", machine={**MACHINE, "processor": "B"}),
        "encode": result("2025-12-31", stage="encode"),
        "other": {"date": "2025-12-31"},
    }
    *_, new = written(tmp_path, **others, new=changed(of_limit=0.5))
    assert guard.main([new]) == 1
    assert "2025-06-01 older.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (result(stage="encode"), "differ in stage"),
        (result(machine={**MACHINE, "threads": 1}), "differ in threads"),
        (result(sizes=[]), "no ratio in common"),
        ({"date": "2026-01-01"}, "is no result of side_by_side.py"),
        ([], "is no result of side_by_side.py"),
    ],
)
def test_what_cannot_be_compared(guard: Any, tmp_path: Path, capsys: Any, new: Any, why: str) -> None:
    assert guard.main(written(tmp_path, old=result(), new=new)) == 2
    printed = capsys.readouterr()
    assert why in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not printed.out


def test_files_that_are_none(guard: Any, tmp_path: Path, capsys: Any) -> None:
    (new,) = written(tmp_path, new=result())
    (tmp_path / "broken.json").write_text("{")
    assert guard.main([str(tmp_path / "nowhere.json"), new]) == 2
    assert guard.main([str(tmp_path / "broken.json"), new]) == 2
    assert guard.main([new]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [error.partition(": ")[2].split(": ")[-1] for error in errors[:2]] == [
        "No such file or directory",
        "is no JSON",
    ]
    assert "no older result of decode" in errors[2]


# The chart


@pytest.fixture
def chart(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(BENCH)
    import chart

    return chart


def test_a_chart_names_machine_date_and_what_cannot_be_done(chart: Any, tmp_path: Path) -> None:
    import matplotlib

    files = written(tmp_path, decode=result(), generate=result("2026-01-03", stage="generate"))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        chart.main([*files, "-o", str(tmp_path / "images" / "bench.svg")])
    drawn = (tmp_path / "images" / "bench.svg").read_text()
    for text in ("A, 2 threads", "2026-01-01 to 2026-01-03", "handscroll", "1024²", "2048²", "12 GiB", "whole picture"):
        assert text in drawn


def test_the_newest_of_several_results_counts(chart: Any) -> None:
    new = copy.deepcopy(result("2026-02-01"))
    new["sizes"][0]["modes"]["rows"]["seconds"] = 3.0
    new["sizes"].append({"size": "4096x1024", "pixels": 2**22, "modes": {}, "failed": {}})
    (ways,) = chart.gathered([new, result()], ["whole", "rows"]).values()
    assert ways["rows"][2**20]["seconds"] == 3.0
    assert ways["rows"][2**22]["seconds"] == 16.0
    assert ways["whole"][2**22] == {"needed_bytes": 12 * GIB}
    assert list(chart.gathered([new], ["rows"]).values()) == [{"rows": ways["rows"]}]


def test_results_of_two_machines_are_no_chart(chart: Any, tmp_path: Path) -> None:
    files = written(tmp_path, one=result(), two=result(machine={**MACHINE, "processor": "B"}))
    with pytest.raises(SystemExit):
        chart.main([*files, "-o", str(tmp_path / "c.svg")])
    with pytest.raises(SystemExit):
        chart.main([*written(tmp_path, other={"date": "x"}), "-o", str(tmp_path / "c.svg")])
    assert not list(tmp_path.glob("*.svg"))
