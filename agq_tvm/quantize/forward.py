"""One plain decoder forward in torch, by the traits of its description; who calls it says how a linear is computed."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from agq_tvm.models.decoder import DecoderConfig

LayerSteps = Generator[tuple[str, Tensor], Tensor, Tensor]
# Called with queries [H, T, D] and keys [KV heads, T, D] as attention multiplies them, any rotation done, and with
# what it adds to scores, [H, T, T] or None.
WatchAttention = Callable[[Tensor, Tensor, Tensor | None], None]
# Called with queries, keys, values [KV heads, T, D] and that same bias; returns [H, T, D].
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
_ACTIVATIONS = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class Norm:
    """One norm: float32 [hidden_size] weight and bias; without a bias it is an RMSNorm."""

    epsilon: float
    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Normalize every row and scale (and shift) the channels."""
        if self.bias is not None:
            return functional.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.epsilon)
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.epsilon) * self.weight


@dataclass(frozen=True)
class Norms:
    """The norms of one layer."""

    attention: Norm
    mlp: Norm


@dataclass(frozen=True)
class Entry:
    """What makes hidden states of tokens.

    Attributes
    ----------
    embedding : float32 tensor [V, E]
    project : callable or None
        From [T, E] to [T, hidden_size].
    positions : float32 tensor [positions, hidden_size] or None
        Row i is added at position i.
    norm : Norm or None
    """

    embedding: Tensor
    project: Callable[[Tensor], Tensor] | None
    positions: Tensor | None
    norm: Norm | None

    def __call__(self, tokens: list[int]) -> Tensor:
        """Return the first layer's input, float32 [T, hidden_size]."""
        hidden = self.embedding[torch.tensor(tokens)]
        if self.project is not None:
            hidden = self.project(hidden)
        if self.positions is not None:
            hidden = hidden + self.positions[: len(tokens)]
        return hidden if self.norm is None else self.norm(hidden)


@dataclass(frozen=True)
class AttentionPositions:
    """How attention knows positions.

    Attributes
    ----------
    rope : pair of float32 tensors [T, head_dim] or None
        cos and sin, the two halves of a head alike.
    bias : float32 tensor [heads, T, T] or None
        Added to scores; masks what a row must not see.
    """

    rope: tuple[Tensor, Tensor] | None
    bias: Tensor | None

    def of_rows(self, rows: Tensor) -> "AttentionPositions":
        """Return what attention among rows at these positions needs, int64 [R], rising."""
        rope = None if self.rope is None else (self.rope[0][rows], self.rope[1][rows])
        return AttentionPositions(rope, None if self.bias is None else self.bias[:, rows][:, :, rows])


def read_norm(config: DecoderConfig, module: str | None, read: Callable[[str], np.ndarray]) -> Norm | None:
    """Read the norm of a module, or return None for None."""
    if module is None:
        return None
    vectors = config.norm.vectors(module, config.hidden_size, read)
    return Norm(config.norm.epsilon, *(torch.from_numpy(vector) for vector in vectors))


def read_norms(config: DecoderConfig, layer: int, read: Callable[[str], np.ndarray]) -> Norms:
    """Read the norms of a layer."""
    prefix = config.layer_prefix.format(layer=layer)
    return Norms(*(read_norm(config, prefix + name, read) for name in (config.input_norm, config.mlp_norm)))


def read_entry(
    config: DecoderConfig,
    table: Callable[[str], Tensor],
    operator: Callable[[Tensor], Callable[[Tensor], Tensor]],
    vector: Callable[[str], np.ndarray],
) -> Entry:
    """Read what makes hidden states of tokens.

    Parameters
    ----------
    config : DecoderConfig
    table : callable
        From the name of a matrix outside the layers to the matrix in float.
    operator : callable
        From such a matrix to what multiplies with it.
    vector : callable
        From a tensor's name to what stays float32.
    """
    positions = None
    if config.position_table:
        positions = torch.from_numpy(vector(f"{config.position_table}.weight"))[config.position_offset :]
    return Entry(
        embedding=table(config.embedding),
        project=operator(table(config.project_in)) if config.project_in else None,
        positions=positions,
        norm=read_norm(config, config.embedding_norm, vector),
    )


def attention_positions(config: DecoderConfig, length: int) -> AttentionPositions:
    """Return what attention over `length` positions needs."""
    if config.positions == "rotary":
        cos, sin = (torch.from_numpy(table) for table in config.rope_tables(length))
        return AttentionPositions((torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)), None)
    if config.positions == "alibi":
        index = torch.arange(length)
        distance = (index - index[:, None]).float()  # of the key (column) from the query (row); 0 or less if seen
        bias = torch.from_numpy(config.alibi_slopes())[:, None, None] * distance
        return AttentionPositions(None, bias.masked_fill(distance > 0, -torch.inf))
    return AttentionPositions(None, None)


def layer_steps(
    config: DecoderConfig,
    norms: Norms,
    hidden: Tensor,
    positions: AttentionPositions,
    half_cache: bool,
    watch: WatchAttention | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
    attend: Attend | None = None,
) -> LayerSteps:
    """Run one layer, leaving the linears to the caller.

    A generator: it yields (name of the linear, its input [T, K]), wants the output [T, N] sent back, and
    returns the layer's output [T, hidden_size].

    Parameters
    ----------
    config : DecoderConfig
    norms : Norms
    hidden : float32 tensor [T, hidden_size]
    positions : AttentionPositions
        For T positions.
    half_cache : bool
        Round keys (after their rotation) and values to float16, as a compiled model caches them.
    watch : callable, optional
        Shown the queries and keys.
    drop : callable, optional
        Given the rows after attention and its residual, returns those that the MLP goes on with.
    attend : callable, optional
        Instead of float attention; it is given the values as they are.
    """
    attention = partial(_attention_steps, config, positions, half_cache, watch, attend)
    hidden = yield from _residual_steps(config, norms.attention, hidden, attention)
    if drop is not None:
        hidden = drop(hidden)
    return (yield from _residual_steps(config, norms.mlp, hidden, partial(_mlp_steps, config)))


def run_layer(steps: LayerSteps, linear: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Drive `layer_steps` with one function for all linears, called with a name and an input [T, K]."""
    try:
        request = next(steps)
        while True:
            request = steps.send(linear(*request))
    except StopIteration as stop:
        return stop.value


# What a branch is given makes its input when asked, and a branch names no tensor: a generator that waits would keep
# it, and calibration has one waiting for every window.
def _residual_steps(
    config: DecoderConfig, norm: Norm, x: Tensor, branch: Callable[[Callable[[], Tensor]], LayerSteps]
) -> LayerSteps:
    if config.norm_placement == "after":
        return norm(x + (yield from branch(lambda: x)))
    if config.norm_placement == "shared":
        x = norm(x)
        return x + (yield from branch(lambda: x))
    return x + (yield from branch(lambda: norm(x)))


def _attention_steps(
    config: DecoderConfig,
    positions: AttentionPositions,
    half_cache: bool,
    watch: WatchAttention | None,
    attend: Attend | None,
    normed: Callable[[], Tensor],
) -> LayerSteps:
    return (yield "o", _attention(config, (yield "qkv", normed()), positions, half_cache, watch, attend))


def _mlp_steps(config: DecoderConfig, normed: Callable[[], Tensor]) -> LayerSteps:
    first, down = config.linears[2:]
    return (yield down.name, _activated(config, (yield first.name, normed())))


def _activated(config: DecoderConfig, inner: Tensor) -> Tensor:
    activation = _ACTIVATIONS[config.activation]
    if config.gated:
        gate, up = inner.chunk(2, -1)
        return activation(gate) * up
    return activation(inner)


def _attention(
    config: DecoderConfig,
    qkv: Tensor,
    positions: AttentionPositions,
    half_cache: bool,
    watch: WatchAttention | None,
    attend: Attend | None,
) -> Tensor:
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
    rows = qkv.view(len(qkv), heads + 2 * kv_heads, width).transpose(0, 1)
    q, k, v = rows.split((heads, kv_heads, kv_heads))
    if positions.rope is not None:
        q, k = _rotate(q, *positions.rope), _rotate(k, *positions.rope)
    if half_cache:
        k = k.half().float()
    if watch is not None:
        watch(q, k, positions.bias)
    if attend is None:
        out = float_attention(q, k, v.half().float() if half_cache else v, positions.bias)
    else:
        out = attend(q, k, v, positions.bias)
    return out.transpose(0, 1).reshape(len(qkv), heads * width)


def float_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attend in float: what an `Attend` is given and returns."""
    return functional.scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        attn_mask=bias,
        is_causal=bias is None,
        scale=q.shape[-1] ** -0.5,
        enable_gqa=True,
    )[0]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def start_probabilities(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return column 0 of the causal attention maps.

    Parameters
    ----------
    q : float32 tensor [H, T, D]
    k : float32 tensor [KV heads, T, D]
        Each shared by H / KV heads neighbouring heads of `q`.
    bias : float32 tensor [H, T, T], optional
        Added to scores.

    Returns
    -------
    float32 tensor [H, T]
        What every query gives to the first key; 1 for the first query.
    """
    scores = _scores(q, k, bias)
    return torch.exp(scores[..., 0] - scores.logsumexp(-1))


def attention_map(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the mean over heads of the causal attention maps, float32 [T, T]; see `start_probabilities`."""
    return _scores(q, k, bias).softmax(-1).mean(0)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    scores = q @ k.repeat_interleave(len(q) // len(k), 0).mT * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
