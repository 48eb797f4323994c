"""The side-by-side benchmark measures what it says, on miniatures."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from handscroll.runtime.memory import trim

BENCH = Path(__file__).parents[2] / "bench"
Report = dict[str, Any]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """bench/side_by_side.py as a module; what it sets for its children ends with the test."""
    monkeypatch.syspath_prepend(BENCH)
    import report
    import side_by_side

    for name in ("HANDSCROLL_CACHE", "HANDSCROLL_TRITON", "TORCHINDUCTOR_CACHE_DIR", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(report, "RESULTS", report.RESULTS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield side_by_side
    torch.set_num_threads(threads)


@pytest.fixture
def compare(bench: Any, capsys: Any) -> Callable[..., tuple[Report, str]]:
    """Runs the benchmark in this process: `compare("decode", "--sizes", "64")` gives its report and its table."""

    def run(*arguments: object) -> tuple[Report, str]:
        exit_code = bench.main([*map(str, arguments), "--miniature", "--here"])
        printed = capsys.readouterr()
        report = json.loads(printed.out.splitlines()[-1])
        assert exit_code == any("rows" in at_size["failed"] for at_size in report["sizes"])
        assert "/" not in json.dumps(report["machine"])
        return report, printed.err

    return run


# The stages


def test_decode_only_tiles_are_another_picture(compare: Any) -> None:
    report, table = compare("decode", "--sizes", "544x64", "--modes", "whole,tiled,tiled-1024,patch,rows")
    (at_size,) = report["sizes"]
    assert list(at_size["modes"]) == ["whole", "tiled", "patch", "rows"]
    assert at_size["failed"] == {"tiled-1024": "a single tile: the same as whole"}
    for mode, found in at_size["modes"].items():
        assert found["seconds"] > 0
        assert found["gflops"] == pytest.approx(at_size["flop"] / found["seconds"] / 1e9)
        assert found["of_limit"] == pytest.approx(found["gflops"] / report["limit"]["gflops"])
        assert (found["max_difference"] <= 1e-3) == (mode != "tiled")
        assert mode in table
    assert at_size["modes"]["rows"]["seconds_over_tiled"] > 0


def test_encode(compare: Any) -> None:
    report, _ = compare("encode", "--sizes", "64,128x64", "--modes", "whole,rows")
    square, wide = report["sizes"]
    assert (square["size"], wide["size"], wide["pixels"]) == ("64x64", "128x64", 8192)
    assert all(at["modes"]["rows"]["max_difference"] <= 1e-4 for at in report["sizes"])
    assert report["curves"]["rows"]["seconds_spread"] >= 1


@pytest.mark.parametrize("model", ["sana-1.6b-4k", "sana-sprint-0.6b"])
def test_denoise(compare: Any, model: str) -> None:
    report, _ = compare("denoise", "--sizes", "96x64", "--modes", "whole,rows", "--model", model)
    (at_size,) = report["sizes"]
    assert at_size["modes"]["rows"]["max_difference"] <= 1e-4
    assert report["limit"]["kind"] == "matrix"
    assert report["model"] == f"{model}, miniature"


def test_text(compare: Any) -> None:
    report, table = compare("text", "--modes", "whole,rows", "--layers", "1")
    (at_size,) = report["sizes"]
    assert at_size["pixels"] is None
    assert at_size["modes"]["rows"]["max_difference"] <= 1e-4
    assert at_size["flop"] > 0
    assert "a prompt" in table


def test_generate(compare: Any) -> None:
    report, _ = compare("generate", "--sizes", "64", "--steps", "1", "--modes", "whole,rows")
    (at_size,) = report["sizes"]
    assert not at_size["failed"]
    assert report["model"] == "tiny-landscape"
    assert report["limit"] is None
    assert at_size["modes"]["rows"]["max_difference"] <= 2  # 8-bit samples


# How they are compared


def test_a_measurement_in_a_process_of_its_own(bench: Any, tmp_path: Path) -> None:
    settings = bench.settings_of(bench.parse_arguments(["decode", "--miniature"]))
    environment = {"OMP_NUM_THREADS": "1"}
    found = bench.run_child(settings, "rows", (64, 64), tmp_path, environment, float("inf"))
    assert found["seconds"] > 0
    assert found["max_difference"] is None  # nothing to be held to
    assert bench.run_child(settings, "rows", (64, 64), tmp_path, environment, 0.0) == "no time left"


def test_a_child_that_takes_too_long_is_ended(bench: Any) -> None:
    with pytest.raises(bench.child.ChildError, match="not done in 1 s"):
        bench.child.run([sys.executable, "-S", "-c", "import time; time.sleep(60)"], timeout_seconds=1)


def test_the_first_to_go_where_memory_runs_out(bench: Any) -> None:
    if not Path("/proc/self/oom_score_adj").exists():
        pytest.skip("this system has no such score")
    code = "import time; time.sleep(0.5); print(open('/proc/self/oom_score_adj').read())"
    assert bench.child.run([sys.executable, "-S", "-c", code]).answer == 1000


def test_ratios_are_taken_round_by_round(bench: Any) -> None:
    whole = [{"seconds": seconds, "peak_bytes": 10} for seconds in (1.0, 10.0, 4.0)]
    rows = [{"seconds": 0.5, "peak_bytes": 5}, {"seconds": 8.0, "peak_bytes": None}, None]
    runs = {"whole": whole, "rows": rows}
    assert bench.ratio(runs, "rows", "whole", "seconds") == pytest.approx((0.5 + 0.8) / 2)
    assert bench.ratio(runs, "rows", "whole", "peak_bytes") == 0.5
    assert bench.ratio(runs, "rows", "tiled", "seconds") is None


def test_medians_and_rates(bench: Any) -> None:
    runs = [
        {"seconds": seconds, "peak_bytes": peak, "max_difference": difference, "compile_seconds": None}
        for seconds, peak, difference in ((1.0, 10, 0.1), (9.0, 30, 0.3), (2.0, 20, 0.2))
    ]
    found = bench.summary(runs, 10**10, {"gflops": 50.0})
    assert (found["seconds"], found["peak_bytes"], found["max_difference"]) == (2.0, 20, 0.3)
    assert (found["gflops"], found["of_limit"]) == (5.0, 0.1)
    assert "compile_seconds" not in found
    assert bench.summary([{**runs[0], "compile_seconds": 7.0}], None, None)["compile_seconds"] == 7.0


def test_a_failed_way_is_reported(bench: Any, compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(stage: Any, mode: str, *_: object) -> dict[str, Any] | str:
        return "MemoryError" if mode == "rows" else {"seconds": 2.0, "peak_bytes": None, "max_difference": None}

    monkeypatch.setattr(bench, "run_here", run)
    report, table = compare("decode", "--sizes", "64", "--modes", "rows,whole", "--repeats", "2")
    (at_size,) = report["sizes"]
    assert at_size["failed"] == {"rows": "MemoryError"}
    assert at_size["modes"]["whole"]["seconds_each"] == [2.0, 2.0]
    assert "seconds_over_whole" not in at_size["modes"].get("rows", {})
    assert "MemoryError" in table


def test_what_would_not_fit_is_not_tried(bench: Any, compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "available_bytes", lambda: bench.PROCESS_BYTES + 10**6)
    report, _ = compare("decode", "--sizes", "512", "--modes", "whole,rows")
    (at_size,) = report["sizes"]
    assert at_size["failed"]["whole"].startswith("needs about")
    assert at_size["modes"]["rows"]["max_difference"] is None


def test_what_the_official_decoder_takes(bench: Any) -> None:
    """Design and literature agree: 8.4 TFLOP at 1024 px; measured whole, it held 2.4 GiB above its model there."""
    stage = bench.stages.open_stage(bench.stages.Settings("decode"))
    assert stage.flop((1024, 1024)) == pytest.approx(8.4e12, rel=0.02)
    assert stage.flop((2048, 1024)) == pytest.approx(2 * 8.4e12, rel=0.02)
    weights_bytes = 160e6 * 4
    assert stage.needed_bytes("whole", (1024, 1024)) - weights_bytes == pytest.approx(2.4 * 2**30, rel=0.2)
    assert stage.needed_bytes("whole", (4096, 4096)) > 30 * 2**30
    assert stage.needed_bytes("tiled", (4096, 4096)) < 3 * 2**30


def test_what_a_step_of_the_official_transformer_takes(bench: Any) -> None:
    stage = bench.stages.open_stage(bench.stages.Settings("denoise", precision="bf16"))
    assert stage.needed_bytes("rows", (1024, 1024)) == pytest.approx(1.6e9 * 2, rel=0.05)
    # Two branches, two for each weight and position, and the padded prompts.
    assert stage.flop((1024, 1024)) == pytest.approx(2 * 2 * 1.6e9 * 1024, rel=0.2)


def test_the_peak_starts_again(bench: Any) -> None:
    one_run = bench.one_run
    resident = one_run.reset_peak("cpu")
    if resident is None:
        pytest.skip("this system cannot reset the peak")
    size = 64 * 2**20
    torch.ones(size // 4)
    assert one_run.peak("cpu", True) - resident > 0.9 * size
    trim()  # the heap may have had room for it, and have kept it
    one_run.reset_peak("cpu")
    assert one_run.peak("cpu", True) - resident < 0.5 * size


def test_a_saved_report(compare: Any, tmp_path: Path) -> None:
    options = ("--sizes", "64,128x64", "--modes", "rows", "--save", "--results", tmp_path)
    report, _ = compare("decode", *options)
    compare("decode", *options)
    first, second = sorted(tmp_path.iterdir(), key=lambda path: len(path.name))
    assert first.name.startswith(f"{report['date']}-decode-64x64-128x64px-fp32-")
    assert second.name == first.name.replace(".json", "-2.json")
    assert json.loads(first.read_text()) == report


@pytest.mark.parametrize(
    "arguments",
    [
        ["decode", "--modes", "rows,tiles"],
        ["decode", "--modes", ""],
        ["denoise", "--modes", "patch"],
        ["denoise", "--modes", "rows,triton"],
        ["decode", "--sizes", "100"],
        ["decode", "--sizes", "x"],
        ["decode", "--repeats", "0"],
        ["paint"],
    ],
)
def test_what_cannot_be_is_refused(bench: Any, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse_arguments(arguments)


def test_a_file_name_of_a_machine(bench: Any) -> None:
    description = {"processor": "Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", "cores": 2}
    assert bench.machine.slug(description) == "intel-xeon-platinum-8488c-2-cores"
    assert bench.machine.slug({**description, "gpu": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"
    assert bench.machine.describe()["cores"] >= 1


# The cost curve


def test_a_constant_cost_has_a_spread_of_one(bench: Any) -> None:
    def at(pixels: int, seconds: float, peak_bytes: int | None) -> dict[str, Any]:
        return {"size": "s", "pixels": pixels, "modes": {"rows": {"seconds": seconds, "peak_bytes": peak_bytes}}}

    curve = bench.curve.curve_of([at(4 * 10**6, 8.0, 8 * 10**6), at(10**6, 2.2, 3 * 10**6)], "rows")
    assert [point["seconds_per_megapixel"] for point in curve["points"]] == [2.2, 2.0]
    assert curve["seconds_spread"] == pytest.approx(1.1)
    assert curve["peak_bytes_spread"] == pytest.approx(1.5)
    assert bench.curve.curve_of([at(10**6, 2.0, None)], "rows") is None


def test_the_curve_of_saved_results(bench: Any, tmp_path: Path, capsys: Any) -> None:
    files = []
    for index, (pixels, seconds) in enumerate(((10**6, 1.0), (2 * 10**6, 2.0))):
        modes = {"rows": {"seconds": seconds, "peak_bytes": None}}
        files.append(tmp_path / f"{index}.json")
        sizes = [{"size": "s", "pixels": pixels, "modes": modes}]
        files[-1].write_text(json.dumps({"stage": "decode", "sizes": sizes}))
    bench.curve.main([*map(str, files)])
    assert json.loads(capsys.readouterr().out)["rows"]["seconds_spread"] == 1
