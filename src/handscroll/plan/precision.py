"""Which precision each component computes in. The sampler's state and every attention sum are fp32 whatever it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from handscroll.models.checkpoint import CheckpointSpec

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

# Narrower transformers spend their time elsewhere than in matrices: the built-in model, 192 wide, takes 3.5 s for a
# 1024x1024 picture in either precision where bf16 multiplies twice as fast.
BF16_MIN_WIDTH = 1024


@dataclass(frozen=True)
class Precision:
    """One of fp32, bf16, fp16 for each component; `note` is a remark for the user, or empty."""

    text_encoder: str
    transformer: str
    autoencoder: str
    note: str = ""

    def __str__(self) -> str:
        parts = {
            "text encoder": self.text_encoder,
            "transformer": self.transformer,
            "autoencoder": self.autoencoder,
        }
        if len(set(parts.values())) == 1:
            return self.transformer
        return ", ".join(f"{name} {precision}" for name, precision in parts.items())

    def after(self, made: str) -> Precision:
        """This precision to decode what was `made` in another, as `str` puts it: its autoencoder behind their rest."""
        told = precisions_before(made)
        return self if told is None else replace(self, text_encoder=told[0], transformer=told[1])


def precisions_before(made: str) -> tuple[str, str] | None:
    """The text encoder's and the transformer's precision in what `str` of a `Precision` says; None for other texts."""
    if "," in made:
        found = {name: precision for name, _, precision in (part.rpartition(" ") for part in made.split(", "))}
    else:
        found = {"text encoder": made, "transformer": made}
    text_encoder, transformer = found.get("text encoder", ""), found.get("transformer", "")
    return (text_encoder, transformer) if {text_encoder, transformer} <= BYTES.keys() else None


def resolve_precision(spec: CheckpointSpec, requested: str, device: str, bf16_is_faster: bool) -> Precision:
    """`requested` is auto or a precision; `device` a device name; `bf16_is_faster` what was measured on a CPU.

    auto follows the checkpoint on an accelerator, and on a CPU computes in fp32 unless bf16 is faster there. What its
    publisher says comes before what its files are stored in, and a transformer in half precision takes with it what is
    stored in fp32: an official autoencoder always is, and its model card runs it in bf16. Text encoder and autoencoder
    are never fp16: their activations pass its 65,504 and the picture turns black.
    """
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
    )


def _never_fp16(dtype: str) -> str:
    return "bf16" if dtype == "fp16" else dtype
