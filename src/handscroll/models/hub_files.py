"""Which files of a repository on the hub are fetched: by name, and of the small ones no more than a small one takes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from handscroll.errors import CheckpointError
from handscroll.models.folder import COMPONENTS
from handscroll.models.index import LAYOUT
from handscroll.units import gibibytes, shown
from handscroll.weights.folder import candidates
from handscroll.weights.foreign import PICKLE_SUFFIXES

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TOKENIZER_SUFFIXES = (".json", ".model", ".jinja")  # of all files of one

# Gemma's tokenizer.json, the largest of the small files, takes 33 MB; a licence some kilobytes.
MAX_SMALL_BYTES = 256 << 20
MAX_LICENCE_BYTES = 1 << 20
_LICENCE = re.compile(r"(LICEN[CS]E|NOTICE)(\.(txt|md))?")
# A plain name: nothing in it is a pattern, leads to another folder or steers a terminal.
_PLAIN = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


def is_small_file(name: str) -> bool:
    """Whether a file of this name in a repository is a small one of a checkpoint, needed wherever it is there.

    Of the indexes of weights only those of the chosen files are, which the weights' reader looks for itself.
    """
    folder, _, base = name.rpartition("/")
    match folder:
        case "":
            return base in ("model_index.json", "handscroll.json")
        case "scheduler":
            return base.endswith(".json")
        case "tokenizer":
            return base.endswith(TOKENIZER_SUFFIXES)
    return folder in COMPONENTS and base == "config.json"


def choose_files(names: Iterable[str], hub_id: str) -> tuple[list[str], list[str]]:
    """Of all file names in a repository, those to fetch: the small ones, and the weights.

    Where a component is stored more than once, its bf16 variant is taken, since it is half the size of the fp32 files
    and what they are rounded to anyway; otherwise the plain files. An fp16 variant is taken only if there is nothing
    else: text encoder and autoencoder overflow in it. Raises CheckpointError if the repository lacks a component.
    """
    names = sorted(name for name in names if _PLAIN.fullmatch(name))
    if "model_index.json" not in names:
        other = "" if hub_id.endswith("_diffusers") else f"; is there a {hub_id}_diffusers?"
        raise CheckpointError(f"{hub_id}: not in diffusers' layout, which holds {LAYOUT}{other}")
    small = [name for name in names if is_small_file(name) or _LICENCE.fullmatch(name)]
    weights: list[str] = []
    for component in COMPONENTS:
        inside = [name.removeprefix(f"{component}/") for name in names if name.startswith(f"{component}/")]
        found = candidates(inside)
        if not found:
            pickled = any(name.endswith(PICKLE_SUFFIXES) for name in inside)
            why = "only pickles, which can run code and are never fetched" if pickled else "no weights"
            raise CheckpointError(f"{hub_id}: {component}/ holds {why}; handscroll reads safetensors")
        chosen = next((candidate for candidate in found if candidate.variant == "bf16"), found[0])
        small += [f"{component}/{chosen.index}"] if chosen.index else []
        weights += [f"{component}/{name}" for name in chosen.names]
    return small, weights


def check_small(small: Iterable[str], sizes: Mapping[str, int], hub_id: str) -> list[str]:
    """Those of the small files that are small. A licence that is not is left where it is.

    sizes: of every file in the repository, in bytes. Raises CheckpointError for a file that is needed and too large.
    """
    kept = []
    for name in small:
        size = sizes.get(name, 0)
        if _LICENCE.fullmatch(name) and size > MAX_LICENCE_BYTES:
            continue
        if size > MAX_SMALL_BYTES:
            raise CheckpointError(
                f"{hub_id}: {shown(name)} takes {gibibytes(size)}, and no such file of a checkpoint is that large; "
                "it is not fetched"
            )
        kept.append(name)
    return kept
