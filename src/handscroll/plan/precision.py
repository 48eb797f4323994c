"""Which precision each component computes in. The sampler's state and every attention sum are fp32 whatever it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from handscroll.errors import UsageError
from handscroll.models.checkpoint import CheckpointSpec
from handscroll.models.quantisation import OTHERS, STORAGES

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# Narrower transformers spend their time elsewhere than in matrices: the built-in model, 192 wide, takes 3.5 s for a
# 1024x1024 picture in either precision where bf16 multiplies twice as fast.
BF16_MIN_WIDTH = 1024


@dataclass(frozen=True)
class Precision:
    """What each component computes in, fp32, bf16 or fp16; `note` is a remark for the user, or empty.

    `text_encoder_storage` and `transformer_storage`: what their matrices are kept in (quantisation.STORAGES), empty for
    plainly.
    """

    text_encoder: str
    transformer: str
    autoencoder: str
    note: str = ""
    text_encoder_storage: str = ""
    transformer_storage: str = ""

    def storage_of(self, component: str) -> str:
        """Of text_encoder, transformer or autoencoder; empty for plainly."""
        return str(getattr(self, f"{component}_storage", ""))

    def told(self, component: str) -> str:
        """All that decides a component's numbers, as `bf16`, or `int8+bf16` where its matrices are kept otherwise."""
        computed, storage = getattr(self, component), self.storage_of(component)
        return f"{storage}+{computed}" if storage else str(computed)

    @property
    def exact(self) -> bool:
        """Whether the weights are those that are stored, but for the type that is computed in."""
        return not self.text_encoder_storage and not self.transformer_storage

    def __str__(self) -> str:
        names = ("text_encoder", "transformer", "autoencoder")
        parts = {name.replace("_", " "): self.told(name) for name in names}
        if len(set(parts.values())) == 1:
            return self.transformer
        return ", ".join(f"{name} {precision}" for name, precision in parts.items())

    def after(self, made: str) -> Precision:
        """This precision to decode what was `made` in another, as `str` puts it: its autoencoder behind their rest."""
        told = precisions_before(made)
        if told is None:
            return self
        storages, computed = zip(*(each.rpartition("+")[::2] for each in told), strict=True)
        return replace(
            self,
            text_encoder=computed[0],
            transformer=computed[1],
            text_encoder_storage=storages[0],
            transformer_storage=storages[1],
        )


def precisions_before(made: str) -> tuple[str, str] | None:
    """The text encoder's and the transformer's precision in what `str` of a `Precision` says; None for other texts."""
    if "," in made:
        found = {name: precision for name, _, precision in (part.rpartition(" ") for part in made.split(", "))}
    else:
        found = {"text encoder": made, "transformer": made}
    text_encoder, transformer = found.get("text encoder", ""), found.get("transformer", "")
    return (text_encoder, transformer) if all(map(_is_told, (text_encoder, transformer))) else None


def _is_told(precision: str) -> bool:
    storage, _, computed = precision.rpartition("+")
    return computed in BYTES and (storage in (*STORAGES, *OTHERS) or precision == computed)


def resolve_precision(
    spec: CheckpointSpec,
    requested: str,
    device: str,
    bf16_is_faster: bool,
    text_requested: str = "auto",
    has_fp8: bool = False,
) -> Precision:
    """`requested` is auto, a precision, what the transformer's weights are kept in, which then computes as auto does,
    or both, as int8+bf16; `text_requested` what the text encoder's are kept in, or auto; `device` a device name;
    `bf16_is_faster` what was measured on a CPU; `has_fp8` whether the device multiplies fp8. Raises UsageError for a
    storage that it lacks, or that is not the one of weights that are quantised already.

    auto follows the checkpoint on an accelerator, and on a CPU computes in fp32 unless bf16 is faster there. What its
    publisher says comes before what its files are stored in, and a transformer in half precision takes with it what is
    stored in fp32: an official autoencoder always is, and its model card runs it in bf16. Text encoder and autoencoder
    are never fp16: their activations pass its 65,504 and the picture turns black.
    """
    wanted_storage, requested = split(requested)
    if "fp8" in (wanted_storage, getattr(spec.quantisation_of("transformer"), "storage", "")) and not has_fp8:
        raise UsageError("fp8 needs a CUDA device that multiplies it (compute capability 8.9); use int8 or int4")
    storage, text_storage = (
        _storage(spec, *each) for each in (("transformer", wanted_storage), ("text_encoder", text_requested))
    )
    stored = {name: spec.dtype_of(name) for name in ("text_encoder", "transformer", "vae")}
    published = spec.recommended or stored["transformer"]
    bf16_is_faster = bf16_is_faster and spec.transformer.width >= BF16_MIN_WIDTH
    if requested != "auto":
        wanted = dict.fromkeys(stored, requested)
    elif device == "cpu" and not bf16_is_faster:
        wanted = dict.fromkeys(stored, "fp32")
    else:
        wanted = {name: published if dtype == "fp32" else dtype for name, dtype in stored.items()}
        wanted["transformer"] = published
        if device == "cpu":
            wanted = {name: "bf16" if dtype == "bf16" else "fp32" for name, dtype in wanted.items()}
    note = ""
    if wanted["transformer"] == "bf16" and published == "fp16":
        note = "this checkpoint was published in fp16 and gives poor pictures in bf16; prefer its BF16 version"
    return Precision(
        text_encoder=_never_fp16(wanted["text_encoder"]),
        transformer=wanted["transformer"],
        autoencoder=_never_fp16(wanted["vae"]),
        note=note,
        text_encoder_storage=text_storage,
        transformer_storage=storage,
    )


def split(requested: str) -> tuple[str, str]:
    """What weights are to be kept in, empty for as they are stored, and what is to be computed in, or auto."""
    storage, _, computed = requested.partition("+")
    return (storage, computed or "auto") if storage in STORAGES else ("", requested)


def _storage(spec: CheckpointSpec, component: str, requested: str) -> str:
    """What a component's matrices are kept in: what is asked for, else what they are stored in, else nothing.

    Raises UsageError where they are stored in something else than is asked for.
    """
    stored = spec.quantisation_of(component)
    wanted = requested if requested in STORAGES else ""
    if stored is None or (wanted and stored.is_stored_as(wanted)):
        return wanted
    if wanted:
        raise UsageError(stored.refusal(spec.name, component, wanted))
    return stored.storage


def _never_fp16(dtype: str) -> str:
    return "bf16" if dtype == "fp16" else dtype
