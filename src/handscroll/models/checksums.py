"""Whether the files of a hub checkpoint are what was fetched: each against the checksum that the cache names it by.

In huggingface_hub's cache a file of a snapshot is a link to a blob. Its name is the SHA-256 of its bytes, or of a small
file the SHA-1 by which git knows it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from handscroll.errors import CheckpointError
from handscroll.weights.foreign import unreadable

PIECE_BYTES = 4 << 20


def damaged_files(folder: Path) -> list[Path]:
    """The blobs of a snapshot whose bytes are not those that they are named by. Reads all of it.

    Files that are no links, as on systems without them, have no checksum and are passed over. Raises CheckpointError
    for a file that cannot be read.
    """
    blobs = {path.resolve() for path in folder.rglob("*") if path.is_symlink() and path.is_file()}
    return sorted(blob for blob in blobs if is_damaged(blob))


def is_damaged(blob: Path) -> bool:
    """Whether a blob's bytes are not those that it is named by. Raises CheckpointError if it cannot be read."""
    checksums: list[hashlib._Hash]
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        checksums = [hashlib.sha256()]
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
        git = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
        checksums = [git, hashlib.sha1(usedforsecurity=False)]  # some mirrors name files by the plain one
    else:
        return False
    try:
        with blob.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                for checksum in checksums:
                    checksum.update(piece)
    except OSError as error:
        raise CheckpointError(unreadable(blob, error)) from error
    return blob.name not in {checksum.hexdigest() for checksum in checksums}
