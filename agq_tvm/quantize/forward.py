"""One plain LLaMA forward in torch; who calls it decides how a linear is computed."""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from agq_tvm.models.decoder import DecoderConfig

LayerSteps = Generator[tuple[str, Tensor], Tensor, Tensor]
# Called with queries [H, T, D] and keys [KV heads, T, D] as attention multiplies them, after their rotation.
WatchAttention = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Norms:
    """The norm weights of one layer, float32 [hidden_size] each."""

    attention: Tensor
    mlp: Tensor


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide every row by its root mean square and scale the channels."""
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon) * weight


def rope_tables(config: DecoderConfig, length: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, float32 [length, head_dim], the two halves of a head alike."""
    cos, sin = (torch.from_numpy(table) for table in config.rope_tables(length))
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def layer_steps(
    config: DecoderConfig,
    norms: Norms,
    hidden: Tensor,
    rope: tuple[Tensor, Tensor],
    half_cache: bool,
    watch: WatchAttention | None = None,
) -> LayerSteps:
    """Run one layer, leaving the linears to the caller.

    A generator: it yields (name of the linear, its input [T, K]), wants the output [T, N] sent back, and
    returns the layer's output [T, hidden_size].

    Parameters
    ----------
    config : DecoderConfig
    norms : Norms
    hidden : float32 tensor [T, hidden_size]
    rope : pair of float32 tensors [T, head_dim]
    half_cache : bool
        Round keys (after their rotation) and values to float16, as a compiled model caches them.
    watch : callable, optional
        Shown the queries and keys.
    """
    qkv = yield "qkv", rms_norm(hidden, norms.attention, config.norm_epsilon)
    hidden = hidden + (yield "o", _attention(config, qkv, rope, half_cache, watch))
    gate_up = yield "gate_up", rms_norm(hidden, norms.mlp, config.norm_epsilon)
    gate, up = gate_up.chunk(2, -1)
    return hidden + (yield "down", functional.silu(gate) * up)


def run_layer(steps: LayerSteps, linear: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Drive `layer_steps` with one function for all linears, called with a name and an input [T, K]."""
    try:
        request = next(steps)
        while True:
            request = steps.send(linear(*request))
    except StopIteration as stop:
        return stop.value


def _attention(
    config: DecoderConfig,
    qkv: Tensor,
    rope: tuple[Tensor, Tensor],
    half_cache: bool,
    watch: WatchAttention | None,
) -> Tensor:
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
    rows = qkv.view(len(qkv), heads + 2 * kv_heads, width).transpose(0, 1)
    q, k, v = rows.split((heads, kv_heads, kv_heads))
    q, k = _rotate(q, *rope), _rotate(k, *rope)
    if half_cache:
        k, v = k.half().float(), v.half().float()
    if watch is not None:
        watch(q, k)
    out = functional.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=True, scale=width**-0.5, enable_gqa=True
    )[0]
    return out.transpose(0, 1).reshape(len(qkv), heads * width)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
