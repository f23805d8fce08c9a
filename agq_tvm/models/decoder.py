"""The description of a decoder that every later stage works from; knows neither TVM nor torch."""

from dataclasses import dataclass

import numpy as np

PREFILL_BUCKETS = (8, 16, 32, 64, 128)
"""Row counts that prefill is compiled for."""


@dataclass(frozen=True)
class Linear:
    """One matrix product of a layer: `y = x Wᵀ`, W of several checkpoint matrices stacked along N.

    Attributes
    ----------
    name : str
        Role inside the layer: ``"qkv"``, ``"o"``, ``"gate_up"`` or ``"down"``.
    parts : tuple of str
        Module names in the checkpoint, relative to the layer, in the order of their rows.
    rows : tuple of int
        Rows (output features) of each part.
    in_features : int
        K, the inner dimension.
    """

    name: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    in_features: int


@dataclass(frozen=True)
class DecoderConfig:
    """Shapes and constants of a pre-norm decoder with rotary positions and a gated MLP.

    Attributes
    ----------
    family : str
        Hugging Face ``model_type``.
    rope_inverse_frequencies : tuple of float
        One per pair of a head's channels (``head_dim / 2``), any rope scaling already applied.
    eos_token_ids : tuple of int
        Tokens that end a generation.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm_epsilon: float
    tied_embeddings: bool
    rope_inverse_frequencies: tuple[float, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    layer_prefix = "model.layers.{layer}."
    embedding = "model.embed_tokens"
    final_norm = "model.norm"
    head = "lm_head"
    input_norm = "input_layernorm"
    mlp_norm = "post_attention_layernorm"

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The quantized linears of one layer, in the order in which they run."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        return (
            Linear("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (q, kv, kv), hidden),
            Linear("o", ("self_attn.o_proj",), (hidden,), q),
            Linear("gate_up", ("mlp.gate_proj", "mlp.up_proj"), (inner, inner), hidden),
            Linear("down", ("mlp.down_proj",), (hidden,), inner),
        )

    def rope_tables(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cos and sin, float32 [context, head_dim / 2], computed in float64."""
        angles = np.outer(np.arange(context), np.asarray(self.rope_inverse_frequencies, "float64"))
        return np.cos(angles).astype("float32"), np.sin(angles).astype("float32")
