"""The stages of a run: each loads its module when it is first used, and the one before is freed first."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from handscroll.errors import HandscrollError
from handscroll.plan.plan import Plan
from handscroll.runtime.checkpoint import DTYPES, load_module
from handscroll.runtime.memory import release
from handscroll.runtime.text import EMBEDDING_TABLE
from handscroll.spec import CheckpointSpec


class Stages:
    """Text encoder, transformer and autoencoder of one checkpoint, one of them in memory at a time.

    A context manager; `keep=True` holds on to every module once it is loaded, for repeated use.
    """

    def __init__(self, spec: CheckpointSpec, plan: Plan, *, keep: bool = False) -> None:
        self.spec, self.plan, self.keep = spec, plan, keep
        self.loaded: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.free()

    def free(self) -> None:
        """Forgets every module and gives its memory back."""
        if not self.loaded:
            return
        self.loaded.clear()
        release(self.plan.device)

    @property
    def text(self) -> Any:
        """The text encoder; its embedding table stays in the file, which gives the few rows that a prompt needs."""
        return self._get("text_encoder", self.plan.precision.text_encoder, leave={EMBEDDING_TABLE})

    @property
    def dit(self) -> Any:
        """The transformer."""
        factor = self.spec.transformer.patch_size
        size = (self.plan.latent_height // factor, self.plan.latent_width // factor)
        native = self.spec.transformer.sample_size // factor
        # Away from the native size diffusers computes the position embedding anew, from the stored one's width alone.
        has_table = self.spec.transformer.interpolation_scale is not None
        leave = {"patch_embed.pos_embed"} if has_table and size != (native, native) and not self.keep else set()
        return self._get("transformer", self.plan.precision.transformer, leave=leave)

    @property
    def decoder(self) -> Any:
        """The autoencoder with its decoder alone."""
        return self._get("vae", self.plan.precision.autoencoder, part="decoder")

    def _get(self, component: Any, precision: str, **options: Any) -> Any:
        key = f"{component} {precision}"
        if key not in self.loaded:
            if not self.keep:
                self.free()
            try:
                self.loaded[key] = load_module(
                    self.spec, component, dtype=DTYPES[precision], device=self.plan.device, **options
                )
            except OSError as error:
                raise HandscrollError(f"{self.spec.folder / component}: cannot be read: {error.strerror}") from error
        return self.loaded[key]
