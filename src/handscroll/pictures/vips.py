"""libvips, imported when it is first needed."""

from __future__ import annotations

from typing import Any


def load_vips() -> Any:
    import pyvips

    # A remembered operation would keep the scratch open, and its disk taken, after the picture is written.
    pyvips.cache_set_max(0)
    return pyvips
