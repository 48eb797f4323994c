"""A `Gemma2Model` as its config describes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

from handscroll.models.config import (
    MAX_CHANNELS,
    MAX_HEADS,
    MAX_LAYERS,
    require_positive,
    require_within,
    spec_from_config,
)
from handscroll.models.parameters import linear_parameters

# What of a layer runs one after the other: all of its matrices.
LAYER_UNITS = ("self_attn", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True, slots=True)
class TextEncoderSpec:
    """A `Gemma2Model`. The defaults are transformers', and are those of gemma-2-2b."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    max_position_embeddings: int = 8192
    sliding_window: int | None = 4096
    attention_bias: bool = False
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2

    def __post_init__(self) -> None:
        require_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
        require_positive(self, "num_attention_heads", "num_key_value_heads")
        require_within(
            self,
            vocab_size=(1, 2**24),
            hidden_size=(1, MAX_CHANNELS),
            intermediate_size=(1, MAX_CHANNELS),
            num_hidden_layers=(1, MAX_LAYERS),
            num_attention_heads=(1, MAX_HEADS),
            num_key_value_heads=(1, MAX_HEADS),
            head_dim=(1, MAX_HEADS),
            max_position_embeddings=(1, 2**24),
            sliding_window=(1, 2**24),
            rms_norm_eps=(0, 1),
            pad_token_id=(0, self.vocab_size - 1),
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From the contents of `text_encoder/config.json`. Raises ValueError naming the field."""
        return spec_from_config(cls, config)

    @property
    def embedding_parameter_count(self) -> int:
        """The table of token embeddings, of which a prompt needs a row a token."""
        return self.vocab_size * self.hidden_size

    @property
    def layer_parameter_count(self) -> int:
        hidden, bias = self.hidden_size, self.attention_bias
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = (
            linear_parameters(hidden, queries, bias)
            + 2 * linear_parameters(hidden, keys, bias)
            + linear_parameters(queries, hidden, bias)
        )
        return attention + 3 * hidden * self.intermediate_size + 4 * hidden

    @property
    def unit_parameter_count(self) -> int:
        """Of the largest unit (`LAYER_UNITS`) of a layer."""
        matrices = self.layer_matrices()
        return max(sum(math.prod(shape) for name, shape in matrices if f".{unit}." in name) for unit in LAYER_UNITS)

    def layer_matrices(self) -> list[tuple[str, tuple[int, int]]]:
        """Names and shapes `[N, K]` of the first layer's matrices."""
        hidden, wide = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes = {"self_attn.q_proj": (queries, hidden), "self_attn.o_proj": (hidden, queries)}
        shapes |= {"self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden)}
        shapes |= {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
        return [(f"layers.0.{name}.weight", shape) for name, shape in shapes.items()]

    @property
    def parameter_count(self) -> int:
        return self.embedding_parameter_count + self.num_hidden_layers * self.layer_parameter_count + self.hidden_size
