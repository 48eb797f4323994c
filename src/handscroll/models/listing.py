"""In what a checkpoint's weights are stored, told from what is known of it before they are here. No file is opened."""

from __future__ import annotations

from collections.abc import Mapping

from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.folder import COMPONENTS

# Between the 2 bytes of half precisions and the 4 of fp32, for each of a component's parameters.
_FP32_FROM_BYTES = 3.0


def stored_in(files: Mapping[str, int], spec: CheckpointSpec, half: str) -> tuple[tuple[str, str], ...]:
    """(component, dtype) of the weight files in a listing: their names in the repository, and their bytes.

    Two bytes a parameter are the half precision of a file's variant, or `half` where its name says none. A component
    whose files have no size is left out.
    """
    counts = {
        "text_encoder": spec.text_encoder.parameter_count,
        "transformer": spec.transformer.parameter_count,
        "vae": spec.autoencoder.parameter_count,
    }
    found = []
    for component in COMPONENTS:
        names = [name for name in files if name.startswith(f"{component}/")]
        n_bytes = sum(files[name] for name in names)
        if not n_bytes:
            continue
        variant = next((each for each in ("bf16", "fp16") if all(f".{each}" in name for name in names)), half)
        found.append((component, "fp32" if n_bytes / counts[component] >= _FP32_FROM_BYTES else variant))
    return tuple(found)
