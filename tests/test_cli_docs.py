"""docs/cli.md says what --help says."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_is_what_help_prints() -> None:
    wanted = runpy.run_path(str(DOCS / "make_cli.py"))["page"]()
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == wanted, "out of date: run python docs/make_cli.py"


def test_the_page_is_plain_and_names_every_command() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert "\x1b" not in page
    assert max(map(len, page.splitlines())) <= 120
    for command in ("generate", "decode", "plan", "resume", "quantize", "compare", "info", "models", "doctor", "bench"):
        assert f"## `handscroll {command}`" in page
