"""Prompts that begin with a dash, such as `- a list`, on a command line whose options do too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def prompts_apart(program: Any, arguments: Sequence[str]) -> list[str]:
    """The arguments with a text that begins with a dash put last, after `--`, where it is no option.

    What has a blank before any `=` cannot name an option, nor can a number or dashes alone, unless it is one of a
    letter with its value: those stay. `program` is the command line's group of commands.
    """
    given = list(arguments)
    command = program.commands.get(given[0]) if given else None
    if command is None:
        return given
    with_value, letters = _options_of(command)
    kept, apart, is_value = given[:1], [], False
    for argument in given[1:]:
        if argument == "--" and not is_value:
            return given  # somebody put them apart
        if not is_value and _is_text(argument) and not argument.startswith(letters):
            apart.append(argument)
            continue
        kept.append(argument)
        is_value = not is_value and argument in with_value
    return [*kept, "--", *apart] if apart else given


def way_out(arguments: Sequence[str]) -> str:
    """What to do where a prompt may have been taken for options, after a usage error; nothing where none may."""
    taken = any(each.startswith("-") and not each.startswith("--") and len(each) > 2 for each in arguments)
    takes_prompt = bool(arguments) and arguments[0] in ("generate", "plan")
    return (
        "; a prompt that begins with - goes last, after --" if taken and takes_prompt and "--" not in arguments else ""
    )


def _options_of(command: Any) -> tuple[set[str], tuple[str, ...]]:
    """The options of a command that take a value, and those of a single letter."""
    with_value: set[str] = set()
    letters: set[str] = set()
    for each in command.params:
        if each.param_type_name == "option":
            names = {*each.opts, *each.secondary_opts}
            letters |= {name for name in names if not name.startswith("--")}
            with_value |= set() if each.is_flag else names
    return with_value, tuple(letters)


def _is_text(argument: str) -> bool:
    if re.fullmatch(r"-[0-9]\S*|---+", argument):
        return True  # no option is called so
    return argument.startswith("-") and any(map(str.isspace, argument.partition("=")[0]))
