"""Which weights of a checkpoint are kept in 8 or 4 bits, and what that takes. No torch.

A component that is stored so says it in its config.json, as compressed-tensors does: `quantization_config` with
`quant_method`, `format` and `config_groups`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from handscroll.weights.forms import GROUPS, Form, packed_bytes

# What weights may be kept in. int8 multiplies in 8 bits; int8-weights and int4 are made wide for their layer.
STORAGES = ("int8", "int8-weights", "int4", "fp8")
# While a matrix is quantised or made wide, a piece at a time.
QUANTISING_BYTES = 24 * 2**20
_STORED_AS = {"int8": "int8", "int8-weights": "int8", "int4": "int4", "fp8": "fp8"}
NATIVE = ("int8", "fp8")

# Matrices whose errors pictures bear: those of the blocks. Norms, modulation, the depthwise convolution, the embeddings
# and the last layer stay as they are; docs/quantisation.md has the figures.
_MATRICES = {
    "transformer": re.compile(
        r"transformer_blocks\.\d+\.(attn[12]\.to_([qkv]|out\.0)|ff\.conv_(inverted|point))\.weight"
    ),
    "text_encoder": re.compile(r"(model\.)?layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"),
}
# Neighbours that share a scale in 4 bits. The text encoder's bytes count more, its errors less.
_GROUP = {"transformer": 32, "text_encoder": 128}


def form_of(component: str, storage: str, name: str, shape: tuple[int, ...]) -> Form | None:
    """How a tensor is kept in a storage; None for plainly, as it is stored.

    storage: one of STORAGES, or empty for none. A matrix whose rows no group divides stays as it is.
    """
    pattern = _MATRICES.get(component)
    if not storage or pattern is None or not pattern.fullmatch(name):
        return None
    stored = _STORED_AS[storage]
    if stored != "int4":
        return Form(stored)
    groups = [group for group in GROUPS if group <= _GROUP[component] and shape[1] % group == 0]
    return Form("int4", max(groups)) if groups else None


@dataclass(frozen=True, slots=True)
class WeightCost:
    """What the weights of a layer take: in files, resident, and while they are computed with, in bytes.

    widened_bytes: of working_bytes those of matrices that are made wide for it; 0 where all are used as they are kept.
    plain_bytes: what all would take if nothing were quantised.
    """

    stored_bytes: int
    resident_bytes: int
    working_bytes: int
    widened_bytes: int = 0
    plain_bytes: int = 0

    @property
    def spared_bytes(self) -> int:
        """How much less is resident than if nothing were quantised."""
        return self.plain_bytes - self.resident_bytes


def weight_cost(
    component: str,
    storage: str,
    matrices: Iterable[tuple[str, tuple[int, ...]]],
    parameters: int,
    element_bytes: int,
    stored_so: bool,
) -> WeightCost:
    """Of a layer with so many parameters, `matrices` among them by name and shape, that computes in `element_bytes`.

    stored_so: whether the files hold it in that storage; else they hold `element_bytes` a parameter.
    """
    plain, packed, wide = parameters, 0, 0
    for name, shape in matrices:
        form = form_of(component, storage, name, shape)
        if form is not None:
            plain -= math.prod(shape)
            packed += packed_bytes(form, shape)
            wide += math.prod(shape) * element_bytes
    resident_bytes = plain * element_bytes + packed
    stored_bytes = resident_bytes if stored_so else parameters * element_bytes
    if storage in NATIVE:
        return WeightCost(stored_bytes, resident_bytes, resident_bytes, 0, parameters * element_bytes)
    working_bytes = plain * element_bytes + wide
    return WeightCost(stored_bytes, resident_bytes, working_bytes, wide, parameters * element_bytes)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a component is stored. `storage` is one of STORAGES; `dtype` what its other tensors are in, if it says so."""

    storage: str
    dtype: str = ""

    @classmethod
    def from_config(cls, settings: object) -> Self | None:
        """From a config's `quantization_config`; None for one that is not read here."""
        if not isinstance(settings, Mapping) or settings.get("quant_method") != "compressed-tensors":
            return None
        groups = settings.get("config_groups")
        if not isinstance(groups, Mapping) or len(groups) != 1:
            return None
        (group,) = groups.values()
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping) or weights.get("symmetric") is not True or weights.get("actorder"):
            return None
        known: Any = (settings.get("format"), weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
        activations = group.get("input_activations") is not None
        storage = {
            ("int-quantized", "int", 8, "channel"): "int8" if activations else "int8-weights",
            ("pack-quantized", "int", 4, "group"): "int4" if not activations else None,
            ("float-quantized", "float", 8, "channel"): "fp8" if activations else None,
        }.get(known)
        said = settings.get("handscroll")
        dtype = said.get("dtype") if isinstance(said, Mapping) else None
        if storage is None or dtype not in (None, "fp32", "bf16", "fp16"):
            return None
        return cls(storage, dtype or "")

    def as_config(self, group: int = 0) -> dict[str, Any]:
        """The same for a config.json. group: of 4 bits."""
        formats = {"int8": "int-quantized", "int8-weights": "int-quantized", "int4": "pack-quantized"}
        bits, kind = (4, "int") if self.storage == "int4" else (8, "float" if self.storage == "fp8" else "int")
        weights: dict[str, Any] = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False}
        weights |= {"strategy": "group", "group_size": group} if self.storage == "int4" else {"strategy": "channel"}
        activations = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.get(self.storage, "float-quantized"),
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": activations if self.storage in NATIVE else None,
                    "output_activations": None,
                }
            },
            "ignore": ["lm_head"],
            "handscroll": {"precision": self.storage, "dtype": self.dtype},
        }

    def refusal(self, model: str, component: str, wanted: str) -> str:
        """Why a component that is stored so is not made into another storage, in one line."""
        return (
            f"{model}: its {component.replace('_', ' ')} is stored in {self.storage} already and cannot be made "
            f"{wanted}; take the original"
        )

    def is_stored_as(self, storage: str) -> bool:
        return _STORED_AS[self.storage] == _STORED_AS.get(storage)
