"""diffusers' own tests of AutoencoderDC and of its Sana pipelines, as they are and with every autoencoder attached.

    python bench/diffusers_tests.py /path/to/diffusers            # a checkout, with tests/ and src/
    python bench/diffusers_tests.py /path/to/diffusers --tests tests/pipelines/sana -- -k slicing

The tests run twice, each time in a process of its own, from the checkout's folder. The second time every AutoencoderDC
is attached as soon as it is made. As many must pass as before; what passed before and does not now is named. Nothing is
fetched unless HF_HUB_OFFLINE=0 is set, since a hub that is out of reach is asked again for minutes: tests that need it
fail both times. Their tokenizer, `hf-internal-testing/dummy-gemma`, is stood in for by one of a few tokens, both times.
The tests themselves need accelerate, httpx, parameterized and requests_mock. Exit code 1 if a test fails only when
attached, or if none passes at all. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCES = HERE.parent / "src"
ATTACH = "HANDSCROLL_ATTACH_ALL"
TESTS = (
    "tests/models/autoencoders/test_models_autoencoder_dc.py",
    "tests/pipelines/sana",
    "tests/pipelines/pag/test_pag_sana.py",
    "tests/pipelines/prx",
)
TOKENIZER = "hf-internal-testing/dummy-gemma"
TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "a", "b", "c", "▁")
Outcomes = dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of diffusers")
    parser.add_argument("--tests", nargs="+", default=None, help="files or folders in it")
    parser.add_argument("options", nargs="*", help="more options of pytest, after --")
    arguments = parser.parse_args(argv)
    checkout = arguments.checkout.resolve()
    asked = arguments.tests or [each for each in TESTS if (checkout / each).exists()]
    if not (checkout / "tests").is_dir() or not asked:
        parser.error(f"{arguments.checkout} is no checkout of diffusers: it has none of {', '.join(TESTS)}")
    plain, attached = (run(checkout, [*asked, *arguments.options], attach=attach) for attach in (False, True))
    lost = lost_tests(plain, attached)
    print(f"as they are: {counts_text(plain)}\nattached:    {counts_text(attached)}", file=sys.stderr)
    print("\n".join(f"only attached: {name}: {attached.get(name, 'not run')}" for name in lost), file=sys.stderr)
    print(json.dumps({"plain": Counter(plain.values()), "attached": Counter(attached.values()), "lost": lost}))
    return 1 if lost or "passed" not in plain.values() else 0


def run(checkout: Path, options: Sequence[str], attach: bool) -> Outcomes:
    """One run of the tests: each test's name with passed, failed, error or skipped."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "tests.xml")
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(SOURCES), environment.get("PYTHONPATH", "")])
        environment[ATTACH] = "1" if attach else ""
        environment.setdefault("HF_HUB_OFFLINE", "1")
        command = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, "-p", "no:cacheprovider"]
        command += [f"--junitxml={found}", *options]
        subprocess.run(command, cwd=checkout, env=environment, stdout=sys.stderr, check=False)
        return outcomes(found.read_text()) if found.exists() else {}


def outcomes(xml: str) -> Outcomes:
    """From pytest's report in JUnit's form."""
    found: Outcomes = {}
    for case in ElementTree.fromstring(xml).iter("testcase"):
        marks = {"failure": "failed", "error": "error", "skipped": "skipped"}
        kinds = [marks[child.tag] for child in case if child.tag in marks]
        found[f"{case.get('classname')}.{case.get('name')}"] = kinds[0] if kinds else "passed"
    return found


def lost_tests(plain: Outcomes, attached: Outcomes) -> list[str]:
    """What passed before and does not now."""
    return sorted(name for name, outcome in plain.items() if outcome == "passed" and attached.get(name) != "passed")


def counts_text(found: Outcomes) -> str:
    counts = Counter(found.values())
    return ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "error", "skipped") if counts[kind])


# ---------------------------------------------------------------------------------------------------------------------
# What the tests' process does with this file, which it loads as a plugin of pytest


def pytest_configure(config: Any) -> None:
    use_tokenizer_of_few_tokens()
    if os.environ.get(ATTACH):
        attach_all()


def attach_all() -> None:
    """Every AutoencoderDC is attached when it is made, whoever makes it."""
    from diffusers import AutoencoderDC

    import handscroll

    make = AutoencoderDC.__init__

    @functools.wraps(make)
    def make_attached(self: Any, *given: Any, **named: Any) -> None:
        make(self, *given, **named)
        handscroll.attach(self)

    AutoencoderDC.__init__ = make_attached


def use_tokenizer_of_few_tokens() -> None:
    """Where the hub's tokenizer cannot be had, one of eight tokens under its name."""
    from transformers import GemmaTokenizer

    load = GemmaTokenizer.from_pretrained

    def loaded(name: Any, *given: Any, **named: Any) -> Any:
        if name != TOKENIZER:
            return load(name, *given, **named)
        try:
            return load(name, *given, **named)
        except (OSError, ValueError):
            return GemmaTokenizer(vocab={token: number for number, token in enumerate(TOKENS)}, merges=[])

    GemmaTokenizer.from_pretrained = loaded


if __name__ == "__main__":
    sys.exit(main())
