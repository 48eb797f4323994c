"""Which weights of a checkpoint are kept in 8 or 4 bits, and what that takes. No torch.

A component that is stored so says it in its config.json: `quantization_config`, as compressed-tensors writes it with
`quant_method`, `format` and `config_groups`, or as bitsandbytes does. Where matrices have corrections, which other
tools would leave out, `quant_method` is handscroll.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from handscroll.request import STORED
from handscroll.weights.forms import BEYOND, GROUPS, PARTS, Form, form_in, most_rank, packed_bytes
from handscroll.weights.header import TensorEntry

# What weights may be kept in. int8 multiplies in 8 bits; int8-weights and int4 are made wide for their layer.
STORAGES = STORED
# While a matrix is quantised or made wide, a piece at a time.
QUANTISING_BYTES = 24 * 2**20
# Numbers quantised a second, and those beside which a correction is looked for, on two cores.
_QUANTISED_RATE, _CORRECTED_RATE = 9e7, 1e7
# Of a matrix whose correction is looked for, by direction and row or column: in fp64, twice.
_DIRECTION_BYTES = 24
_STORED_AS = {"int8": "int8", "int8-weights": "int8", "int4": "int4", "fp8": "fp8"}
NATIVE = ("int8", "fp8")
OWN_METHOD = "handscroll"
# What others keep weights in, which is made wide when it is read.
OTHERS = ("nf4", "fp4")

Shape = tuple[int, ...]
# The matrices of a layer in their order, and what each is kept in.
Layer = Sequence[tuple[Shape, Form | None]]

# Matrices whose errors pictures bear: those of the blocks. Norms, modulation, the depthwise convolution, the embeddings
# and the last layer stay as they are; docs/quantisation.md has the figures.
_MATRICES = {
    "transformer": re.compile(
        r"transformer_blocks\.\d+\.(attn[12]\.to_([qkv]|out\.0)|ff\.conv_(inverted|point))\.weight"
    ),
    "text_encoder": re.compile(r"(model\.)?layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"),
}
# In 4 bits: neighbours that share a scale, and the rank of the correction. The text encoder's bytes count more, its
# errors less.
_GROUP = {"transformer": 32, "text_encoder": 128}
_RANK = {"transformer": 32, "text_encoder": 0}


def form_of(component: str, storage: str, name: str, shape: tuple[int, ...]) -> Form | None:
    """How a tensor is kept in a storage; None for plainly, as it is stored.

    storage: one of STORAGES, or empty for none. A matrix whose rows no group divides stays as it is.
    """
    if not storage or not is_quantisable(component, name):
        return None
    stored = _STORED_AS.get(storage)
    if stored is None:  # one of OTHERS
        return None
    if stored != "int4":
        return Form(stored)
    groups = [group for group in GROUPS if group <= _GROUP[component] and shape[1] % group == 0]
    return Form("int4", max(groups), min(_RANK[component], most_rank(shape))) if groups else None


def is_quantisable(component: str, name: str) -> bool:
    """Whether a tensor is one of those that may be kept in 8 or 4 bits."""
    pattern = _MATRICES.get(component)
    return pattern is not None and pattern.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class WeightCost:
    """What the weights of a layer take: in files (of OTHERS, at most), resident, and while they are computed with, in
    bytes.

    widened_bytes: of working_bytes those of matrices that are made wide for it; 0 where all are used as they are kept.
    plain_bytes: what all would take if nothing were quantised. making_bytes: beside all these, while a matrix is
    quantised or made wide. quantised, corrected: numbers that are quantised when they are read, and those of them
    beside which a correction is looked for.
    """

    stored_bytes: int
    resident_bytes: int
    working_bytes: int
    widened_bytes: int = 0
    plain_bytes: int = 0
    making_bytes: int = 0
    quantised: int = 0
    corrected: int = 0

    @property
    def making_seconds(self) -> float:
        """About what quantising takes when it is read."""
        return (self.quantised - self.corrected) / _QUANTISED_RATE + self.corrected / _CORRECTED_RATE

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
    stored: Quantisation | None = None,
) -> WeightCost:
    """Of a layer with so many parameters, `matrices` among them by name and shape, that computes in `element_bytes`.

    stored: how the files hold it; None for plainly, `element_bytes` a parameter. Of layers that are not stored alike,
    the most of any.
    """
    matrices = list(matrices)
    layers: Iterable[Layer] = stored.layers if stored is not None else ()
    costs = [
        _cost(layer, parameters, element_bytes, stored, storage if is_native(component, storage) else "")
        for layer in layers or [[(shape, form_of(component, storage, name, shape)) for name, shape in matrices]]
    ]
    return WeightCost(*(max(getattr(cost, field.name) for cost in costs) for field in fields(WeightCost)))


def is_native(component: str, storage: str) -> bool:
    """Whether matrices that are kept in a storage are computed with as they are: a text encoder's are made wide."""
    return component == "transformer" and storage in NATIVE


def _cost(layer: Layer, parameters: int, element_bytes: int, stored: Quantisation | None, native: str) -> WeightCost:
    """native: the storage that is computed with as it is; empty for none."""
    plain, packed, wide, used, quantised, corrected = parameters, 0, 0, 0, 0, 0
    making, whole = stored is not None and stored.is_bitsandbytes, 0
    for shape, form in layer:
        if form is None:
            continue
        numbers, its_bytes = math.prod(shape), packed_bytes(form, shape)
        plain -= numbers
        packed += its_bytes
        if form.storage == native:
            used += its_bytes
        else:
            used += numbers * element_bytes
            wide += numbers * element_bytes
        making = making or stored is None or form.storage != native
        its_whole = its_bytes if form.rank else 0  # the correction is for all rows
        if stored is None:
            quantised += numbers
            corrected += numbers if form.rank else 0
            its_whole += _DIRECTION_BYTES * sum(shape[:2]) * (form.rank + BEYOND) if form.rank else 0
        whole = max(whole, its_whole)
    resident_bytes = plain * element_bytes + packed
    return WeightCost(
        stored_bytes=parameters * element_bytes if stored is None else resident_bytes,
        resident_bytes=resident_bytes,
        working_bytes=plain * element_bytes + used,
        widened_bytes=wide,
        plain_bytes=parameters * element_bytes,
        making_bytes=QUANTISING_BYTES * making + whole,
        quantised=quantised,
        corrected=corrected,
    )


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How a component is stored. `storage` is one of STORAGES or OTHERS; `dtype` what its other tensors are in, if it
    says so.

    corrected: whether its config says that matrices have corrections. is_bitsandbytes: stored as that library does
    (weights/bitsandbytes.py). `layers`: how the matrices of its layers are stored, by their headers, each way once;
    empty where these are not known.
    """

    storage: str
    dtype: str = ""
    corrected: bool = False
    is_bitsandbytes: bool = False
    layers: tuple[Layer, ...] = ()

    @classmethod
    def from_config(cls, settings: object) -> Self | None:
        """From a config's `quantization_config`; None for one that is not read here."""
        if isinstance(settings, Mapping) and settings.get("quant_method", "bitsandbytes") == "bitsandbytes":
            return cls._of_bitsandbytes(settings)  # whose older configs name no method
        if not isinstance(settings, Mapping) or settings.get("quant_method") not in ("compressed-tensors", OWN_METHOD):
            return None
        corrected = settings["quant_method"] == OWN_METHOD
        groups = settings.get("config_groups")
        if not isinstance(groups, Mapping) or len(groups) != 1:
            return None
        (group,) = groups.values()
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping) or weights.get("symmetric") is not True or weights.get("actorder"):
            return None
        known: Any = (settings.get("format"), weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
        if not all(isinstance(each, str | int) for each in known):
            return None
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
        if corrected and storage != "int4":
            return None
        return cls(storage, dtype or "", corrected)

    @classmethod
    def _of_bitsandbytes(cls, settings: Mapping[str, Any]) -> Self | None:
        """As https://huggingface.co/docs/transformers/quantization/bitsandbytes: 8 bits by row, or nf4 or fp4."""
        in_8_bits, in_4_bits = settings.get("load_in_8bit") is True, settings.get("load_in_4bit") is True
        kind = settings.get("bnb_4bit_quant_type", "fp4")
        if in_8_bits == in_4_bits or (in_4_bits and kind not in OTHERS):
            return None
        return cls(kind if in_4_bits else "int8-weights", is_bitsandbytes=True)

    def with_layers(self, matrices: Sequence[tuple[str, Shape]], layers: int, tensors: Iterable[TensorEntry]) -> Self:
        """With what the headers say of its layers; `matrices` are those of the first, by name and shape.

        What is of no form that is read is left to those who read it.
        """
        known = {entry.name.removeprefix("model."): (entry.dtype, entry.shape) for entry in tensors}
        found: dict[Layer, None] = {}
        for index in range(layers):
            layer: list[tuple[Shape, Form | None]] = []
            for name, shape in matrices:
                owner = name.replace(".0.", f".{index}.", 1).removesuffix("weight")
                parts = {suffix: known[owner + suffix] for suffix in PARTS if owner + suffix in known}
                try:
                    layer.append((shape, form_in(shape, parts)))
                except (ValueError, KeyError):
                    return self
            found[tuple(layer)] = None
        return replace(self, layers=tuple(found))

    def as_config(self, group: int = 0) -> dict[str, Any]:
        """The same for a config.json. group: of 4 bits."""
        formats = {"int8": "int-quantized", "int8-weights": "int-quantized", "int4": "pack-quantized"}
        bits, kind = (4, "int") if self.storage == "int4" else (8, "float" if self.storage == "fp8" else "int")
        weights: dict[str, Any] = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False}
        weights |= {"strategy": "group", "group_size": group} if self.storage == "int4" else {"strategy": "channel"}
        activations = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
        return {
            "quant_method": OWN_METHOD if self.corrected else "compressed-tensors",
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
        return _STORED_AS.get(self.storage, self.storage) == _STORED_AS.get(storage)
