"""A checkpoint's tokenizer, by transformers' own classes, from whichever files hold it; no code of the folder runs."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from handscroll.errors import CheckpointError, HandscrollError, is_out_of_memory
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.config import read_config
from handscroll.models.hub_files import TOKENIZER_SUFFIXES
from handscroll.units import one_line, shown
from handscroll.weights.foreign import FIRST_BYTES, unreadable, what_it_is
from handscroll.weights.json_text import MAX_MESSAGE

TABLE, SENTENCEPIECE, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
NEEDED_FOR_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
# What transformers itself falls back to, and the one of Gemma-2, which a file without settings is for.
GENERAL, GEMMA = "PreTrainedTokenizerFast", "GemmaTokenizer"
FEWEST_TOKENS = 16  # a vocabulary of the special tokens alone is what a class makes of files that it does not find


def read_tokenizer(spec: CheckpointSpec) -> Any:
    """The tokenizer of `spec.folder`, padding on the right. Raises CheckpointError naming the file.

    Its class is the one that model_index.json names, as in diffusers.
    """
    folder = spec.folder / "tokenizer"
    _check_files(folder)
    with errors_named(spec):
        tokenizer = _made(spec, folder)
        _complete(spec, tokenizer)
        tokenizer([""], padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    return tokenizer


@contextmanager
def errors_named(spec: CheckpointSpec) -> Iterator[None]:
    """Whatever the library raises inside becomes a CheckpointError naming the folder; what it logs is not shown.

    That is what its parsers and models raise, and panics of its Rust code, which are no Exception.
    """
    try:
        with _quiet():
            yield
    except (HandscrollError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if is_out_of_memory(error):
            raise
        said = one_line(error, MAX_MESSAGE)
        raise CheckpointError(f"{spec.folder / 'tokenizer'}: does not work as a tokenizer: {said}") from error


def _check_files(folder: Path) -> None:
    for file in sorted(folder.glob("*")):  # a library that finds one of them broken goes on without it
        if not file.name.endswith(TOKENIZER_SUFFIXES):
            continue
        try:
            with file.open("rb") as stream:
                first = stream.read(FIRST_BYTES)
        except OSError as error:
            raise CheckpointError(unreadable(file, error)) from error
        if said := what_it_is(first):
            raise CheckpointError(f"{file}: {said}")
    if not any((folder / name).is_file() for name in (TABLE, SENTENCEPIECE)):
        raise CheckpointError(f"{folder}: holds no tokenizer; expected {TABLE} or {SENTENCEPIECE}")
    lacking = [package for module, package in NEEDED_FOR_SENTENCEPIECE.items() if not _is_here(module)]
    if not (folder / TABLE).is_file() and lacking:
        raise CheckpointError(
            f"{folder / SENTENCEPIECE}: reading it takes packages that are not installed: "
            f"`pip install {' '.join(NEEDED_FOR_SENTENCEPIECE.values())}`, or put {TABLE} beside it"
        )


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False


def _made(spec: CheckpointSpec, folder: Path) -> Any:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "padding_side": "right"}
    settings = read_config(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    if not (folder / TABLE).is_file():
        options["add_bos_token"] = bool(settings.get("add_bos_token", True))  # as Gemma-2 was trained
    return _class_of(spec, folder).from_pretrained(folder, **options)


def _class_of(spec: CheckpointSpec, folder: Path) -> Any:
    """The class that model_index.json names; a general one reads the whole of tokenizer.json."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    _, name = read_config(spec.folder / "model_index.json")["tokenizer"]  # checked when the index was read
    if not name.isidentifier() or "Tokenizer" not in name:
        raise CheckpointError(f"{spec.folder / 'model_index.json'}: names no tokenizer: {shown(name)}")
    if name == GENERAL and not (folder / TABLE).is_file():
        name = GEMMA
    found = tokenizer_class_from_name(name)
    if found is None:
        raise CheckpointError(
            f"{spec.folder / 'model_index.json'}: the tokenizer is a {shown(name)}, which transformers does not know"
        )
    return found


def _complete(spec: CheckpointSpec, tokenizer: Any) -> None:
    """Gives a tokenizer without settings the padding that its text encoder was made with. Raises CheckpointError."""
    folder = spec.folder / "tokenizer"
    if len(tokenizer) < FEWEST_TOKENS:
        raise CheckpointError(f"{folder}: holds no vocabulary; expected it in {TABLE} or {SENTENCEPIECE}")
    if tokenizer.pad_token is None:
        number = spec.text_encoder.pad_token_id
        token = None if number is None else tokenizer.convert_ids_to_tokens(number)
        if token is None:
            raise CheckpointError(f'{folder}: names no token for padding; add "pad_token" to {SETTINGS}')
        tokenizer.pad_token = token


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers logs what it tries first; what fails in the end is raised."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
