"""The description of a decoder that every later stage works from; knows neither TVM nor torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PREFILL_BUCKETS = (8, 16, 32, 64, 128)
"""Row counts that prefill is compiled for."""


def filled_tiles(rows: int) -> int:
    """Return what a number of rows left by pruning is rounded up to, to fill the register tiles of matrix products."""
    tile = min(PREFILL_BUCKETS)
    return -(-rows // tile) * tile


@dataclass(frozen=True)
class Linear:
    """One matrix product of a layer: `y = x Wᵀ + bias`, W of several checkpoint matrices stacked along N.

    Attributes
    ----------
    name : str
        Role inside the layer: ``"qkv"``, ``"o"``, ``"gate_up"`` (``"up"`` of an MLP without gate) or ``"down"``.
    parts : tuple of str
        Module names in the checkpoint, relative to the layer, in the order of their rows.
    rows : tuple of int
        Rows (output features) of each part.
    in_features : int
        K, the inner dimension.
    bias : bool
        Whether each part has a bias.
    interleaved_heads : int
        Not 0: a float model stores the rows of its only part by head, [heads, 3, head_dim]; they are used, and
        kept in checkpoints, as q, k and v one after the other, [3, heads, head_dim].
    """

    name: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    in_features: int
    bias: bool = False
    interleaved_heads: int = 0

    def row_order(self) -> np.ndarray | slice:
        """Return what brings the rows of a stored part into the order in which they are used."""
        if not self.interleaved_heads:
            return slice(None)
        return np.arange(self.rows[0]).reshape(self.interleaved_heads, 3, -1).swapaxes(0, 1).reshape(-1)


@dataclass(frozen=True)
class NormStyle:
    """What all norms of a decoder have in common.

    Attributes
    ----------
    kind : str
        ``"rms"``: x / sqrt(mean x² + ε) · weight. ``"layer"``: (x - mean) / sqrt(variance + ε) · weight + bias.
    epsilon : float
    affine : bool
        Whether weight and bias were learned; otherwise they are 1 and 0 and in no file.
    """

    kind: str
    epsilon: float
    affine: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        """The vectors that the norm computes with."""
        return ("weight",) if self.kind == "rms" else ("weight", "bias")

    def vectors(self, module: str, channels: int, read: Callable[[str], np.ndarray]) -> list[np.ndarray]:
        """Return the vectors of one norm, float32 [channels] each, in the order of `parts`.

        Parameters
        ----------
        module : str
            Its name in the checkpoint.
        channels : int
        read : callable
            From a tensor's name to the tensor.
        """
        if self.affine:
            return [read(f"{module}.{part}") for part in self.parts]
        return [np.full(channels, value, "float32") for _, value in zip(self.parts, (1, 0), strict=False)]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shapes, constants and traits of a decoder, and where its tensors are.

    Attributes
    ----------
    family : str
        Hugging Face ``model_type``.
    embedding_size : int
        Channels of embedding and head; unlike `hidden_size` only if there are projections.
    context_length : int
        Positions that the model can take, a sliding window of attention included.
    norm : NormStyle
    norm_placement : str
        ``"before"``: x + f(norm(x)). ``"after"``: norm(x + f(x)). ``"shared"``: norm(x) + f(norm(x)).
    activation : str
        Of the MLP: ``"silu"``, ``"relu"``, ``"gelu"`` or ``"gelu_tanh"``.
    gated : bool
        Whether the MLP multiplies the activation by a second projection.
    positions : str
        ``"rotary"``, ``"learned"`` (a table added to the embedding) or ``"alibi"`` (a slope for each head, times the
        distance to the key, added to scores).
    rope_inverse_frequencies : tuple of float
        One per pair of a head's channels (``head_dim / 2``), any rope scaling already applied; rotary only.
    position_offset : int
        Row of the position table that stands for position 0; learned only.
    linears : tuple of Linear
        Of one layer, in the order in which they run.
    eos_token_ids : tuple of int
        Tokens that end a generation.
    base_prefix : str
        What begins the name of every tensor but the head's; files of the bare decoder leave it out.
    layer_prefix : str
        Prefix of a layer's modules, with ``{layer}``.
    embedding, head, input_norm, mlp_norm : str
        Module names, those of norms relative to the layer.
    final_norm, embedding_norm, position_table, project_in, project_out : str or None
        Module names of what not every decoder has. Projections lead from the embedding's channels to the hidden
        ones and back, without bias.
    """

    family: str
    vocab_size: int
    hidden_size: int
    embedding_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm: NormStyle
    norm_placement: str = "before"
    activation: str
    gated: bool
    positions: str
    rope_inverse_frequencies: tuple[float, ...] = ()
    position_offset: int = 0
    linears: tuple[Linear, ...]
    tied_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    base_prefix: str
    layer_prefix: str
    embedding: str
    head: str = "lm_head"
    input_norm: str
    mlp_norm: str
    final_norm: str | None
    embedding_norm: str | None = None
    position_table: str | None = None
    project_in: str | None = None
    project_out: str | None = None

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        """The 8-bit matrices outside the layers, by role (an attribute with the module's name): their shape (N, K)."""
        shapes = {"embedding": (self.vocab_size, self.embedding_size)}
        if self.project_in:
            shapes["project_in"] = (self.hidden_size, self.embedding_size)
        if self.project_out:
            shapes["project_out"] = (self.embedding_size, self.hidden_size)
        if not self.tied_embeddings:
            shapes["head"] = shapes["embedding"]
        return shapes

    @property
    def norm_modules(self) -> list[str]:
        """The module names of all norms."""
        prefixes = [self.layer_prefix.format(layer=layer) for layer in range(self.num_layers)]
        names = [prefix + norm for prefix in prefixes for norm in (self.input_norm, self.mlp_norm)]
        return names + [name for name in (self.embedding_norm, self.final_norm) if name]

    def rope_tables(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cos and sin, float32 [context, head_dim / 2], computed in float64."""
        angles = np.outer(np.arange(context), np.asarray(self.rope_inverse_frequencies, "float64"))
        return np.cos(angles).astype("float32"), np.sin(angles).astype("float32")

    def alibi_slopes(self) -> np.ndarray:
        """Return the slope of every head, float32 [num_heads].

        2^(-8 i / n) for i = 1..n where n, the number of heads, is a power of two. Other numbers take those of the
        power below, and for the remaining heads every second one of the power above.
        """
        power = 1 << math.floor(math.log2(self.num_heads))
        exponents = [8 * i / power for i in range(1, power + 1)]
        exponents += [4 * i / power for i in range(1, 2 * power, 2)]
        return np.exp2(-np.array(exponents[: self.num_heads])).astype("float32")
