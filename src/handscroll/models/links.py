"""Links of the Hugging Face hub, as they are pasted from a browser or a terminal."""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qs, unquote, urlsplit

from handscroll.errors import UsageError

_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co", "hf-mirror.com"})
_OTHER_KINDS = {"datasets": "a data set", "spaces": "a space", "papers": "a paper", "collections": "a collection"}
# Pages of the hub that belong to nobody.
_PAGES = re.compile("api|blog|chat|docs|enterprise|join|learn|login|new|posts|pricing|settings|tasks")
_OF_A_REVISION = frozenset({"tree", "blob", "resolve", "raw", "commit", "commits", "blame"})
# Branches may have slashes in their names; these are the hub's own: refs/pr/3, refs/convert/parquet.
_REF = re.compile(r"refs/(?:pr|convert)/[^/]+")


def split_link(text: str) -> tuple[str, str | None] | None:
    """`https://huggingface.co/owner/name/tree/REV` -> (`owner/name`, REV or None); None for what is no link of the hub.

    The scheme may be left out, and HF_ENDPOINT names one more host. The branch `main` counts as none, as it is what is
    taken anyway. Raises UsageError for a link to something else than a model.
    """
    found = _path_of(_bare(text))
    if found is None:
        return None
    path, revision = found
    names = [unquote(each) for each in path.split("/") if each]
    if names[:2] == ["api", "models"]:
        names = names[1:]
    if names and names[0] in _OTHER_KINDS:
        raise UsageError(f"{text!r} leads to {_OTHER_KINDS[names[0]]}; give a model, as owner/name")
    if names and names[0] == "models":
        names = names[1:]
    if len(names) < 2 or _PAGES.fullmatch(names[0]):
        raise UsageError(f"{text!r} leads to no model of the hub; give it as owner/name")
    if len(names) > 3 and names[2] in _OF_A_REVISION:
        revision = _revision_in("/".join(names[3:]))
    return f"{names[0]}/{names[1].removesuffix('.git')}", None if revision == "main" else revision


def _bare(text: str) -> str:
    """A link without what stands around it where it was copied from: a command, brackets, the end of a sentence."""
    text = re.sub(r"^git\s+clone\s+", "", text.strip())
    return text.strip("<>()[]{}\"'`").rstrip(".,;:!)>]}\"'`")


def _revision_in(rest: str) -> str | None:
    """Of a path after a revision's place, such as `refs/pr/3/vae` or `main/vae`, the revision."""
    reference = _REF.match(rest)
    return reference[0] if reference else rest.split("/")[0] or None


def _path_of(text: str) -> tuple[str, str | None] | None:
    """The path of a link of the hub, and a revision after an @ or a `?revision=`; None for what is no such link."""
    if found := re.fullmatch(r"(?:ssh://)?git@hf\.co[:/](.+)|hf://(?:models/)?(.+)", text):
        path, _, revision = (found[1] or found[2]).partition("@")
        return path, _revision_in(unquote(revision))
    link = text if "://" in text else f"https://{text}"
    try:
        parts = urlsplit(link)
        host = (parts.hostname or "").lower()
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or host not in _hosts():
        return None
    path, _, revision = parts.path.partition("@")
    asked = parse_qs(parts.query).get("revision", [""])[0]
    return path, _revision_in(unquote(revision) or asked)


def _hosts() -> frozenset[str]:
    own = urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname
    return _HOSTS | {own.lower()} if own else _HOSTS
