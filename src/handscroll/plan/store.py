"""Where a map lives between two passes, and what that takes of the device's memory."""

from __future__ import annotations

from typing import Literal

from handscroll.limits import MAP_CHUNK_BYTES

# On the device itself; in the host's memory beside a CUDA device; in a file of the scratch folder.
Store = Literal["memory", "host", "disk"]


def stored_bytes(map_bytes: int, store: Store, *, rewritten: bool = False) -> int:
    """Bytes of device memory for a map; one that is `rewritten` is read while its successor of that size is written."""
    if store != "memory":
        return 0
    return map_bytes + (2 * min(map_bytes, MAP_CHUNK_BYTES) if rewritten else 0)
