"""Kernels that make activation codes: what comes before a linear, fused with its quantization.

Codes are written by k-block, then row, as `linear.py` reads them. For s = max|y| / L over a row or a group:
q = round half to even of y · (1/s); a row (or group) of zeros has s = 1. Static: q = y / s + z, clipped to -L..L.
L is 127, or 7 for codes of 4 bits. Two terms: y - s q is quantized again, into as many rows after the first ones.
For the integer-only product of `linear_shifted.py` channels are gathered in the order of their exponents.
For float products y is written as it is.
Mixed: codes of 4 to 7 bits with a zero point for each group of a row, see `agq_tvm.quantize.mixed`.
"""

import math
from dataclasses import dataclass

from agq_tvm.kernels.emit import (
    LANES,
    erf,
    exp,
    float32,
    lane_chunks,
    reduce_integers,
    rounded,
    store_vector,
    task_loop,
)
from agq_tvm.kernels.intrin.base import ACTIVATION_LIMIT
from agq_tvm.kernels.layout import K_BLOCK, Layout, k_blocks
from agq_tvm.kernels.mixed import quantize_mixed_row
from agq_tvm.kernels.norm import store_moments, store_sum
from agq_tvm.kernels.space import Space, rows_of_task
from agq_tvm.tvm_seam import IRBuilder, T, tirx

SMALLEST_MAXIMUM = 127 * 2.0**-126
"""Below it a row counts as zeros, so that 1/s stays finite."""


@dataclass(frozen=True)
class QuantizeKernel:
    """What is quantized, and how.

    Attributes
    ----------
    source : str
        One of `SOURCES`: what makes y from the inputs.
    rows, channels : int
        M and K of the linear that follows.
    group_size : int
        Of that linear's weights.
    mode : str
        ``"per-token"``, ``"per-token-group"``, ``"static"``, or ``"none"``: no codes, only y.
    epsilon : float
        Of the norm; unused otherwise.
    refined : bool
        Whether y is multiplied, channel by channel, with a vector: TRIP's inverse powers of two.
    bits : int
        Of the codes, 8 or 4.
    terms : int
        1, or 2 with scales of groups.
    shifted : bool
        Whether channels are put into another order, in which the vector stands that they are multiplied with, and
        the sum of the codes is shifted left before each k-block. For refined static codes of one group.
    mixed : bool
        With scales of groups: whether each channel has bits and a step of its own.
    adds : bool
        Of a norm: whether its input is the sum of the first two inputs, a residual, which is the last output.
    """

    source: str
    rows: int
    channels: int
    group_size: int
    mode: str
    epsilon: float = 0.0
    refined: bool = False
    bits: int = 8
    terms: int = 1
    shifted: bool = False
    mixed: bool = False
    adds: bool = False

    @property
    def limit(self) -> int:
        """The largest code."""
        return ACTIVATION_LIMIT if self.bits == 8 else 7

    @property
    def groups(self) -> int:
        """G, the number of groups along K."""
        return -(-self.channels // self.group_size)

    @property
    def scales(self) -> int:
        """Scales of a row: G for scales of groups, else 1."""
        return self.groups if self.mode == "per-token-group" else 1

    @property
    def name(self) -> str:
        """E.g. ``rms_norm_quantize_per_token_group_g32_m128_k576``."""
        prefix = "" if self.source == "plain" else f"{'add_' if self.adds else ''}{self.source}_"
        if self.mode == "none":
            return f"{prefix}float_g{self.group_size}_m{self.rows}_k{self.channels}"
        mode = self.mode.replace("-", "_")
        form = f"{mode}{'_refined' if self.refined else ''}{'_4bit' if self.bits == 4 else ''}"
        form += "_two_terms" if self.terms == 2 else "_mixed" if self.mixed else "_shifted" if self.shifted else ""
        return f"{prefix}quantize_{form}_g{self.group_size}_m{self.rows}_k{self.channels}"

    @property
    def in_place(self) -> bool:
        """Whether y is the input itself, in whole groups, so that nothing has to be copied."""
        changed = self.refined or self.shifted or self.mixed or self.terms == 2 or self.mode == "none"
        return self.source == "plain" and not changed and self.channels % self.group_size == 0

    def input_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the float32 inputs.

        x, or the two that are added; by source the norm's gain and bias; the refining vector; static (s, z), or the
        powers of two of mixed codes, see `agq_tvm.kernels.mixed`.
        """
        M, K = self.rows, self.channels
        vectors = {"rms_norm": 1, "layer_norm": 2}.get(self.source, 0)
        shapes = [(M, 2 * K if self.source == "silu_mul" else K)] * (1 + self.adds) + [(K,)] * vectors
        shapes += [(K,)] * self.refined
        if self.mixed:
            return [*shapes, (3, self.groups * self.group_size)]
        return [*shapes, (2,)] if self.mode == "static" else shapes

    def index_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the int32 inputs after those: which channel stands at each place, and the shifts of k-blocks."""
        return [(self.channels,), (k_blocks(self.channels, self.group_size),)] if self.shifted else []

    def output_shapes(self, layout: Layout) -> list[tuple[tuple[int, ...], str]]:
        """Shapes and types of codes [KB, R, S, 2, D], scales [R, G or 1] and sums [R, G]; R is M times the terms.

        Without codes: of y [M, K in whole groups], float32. Then of the residual [M, K], if there is one.
        """
        residual = [((self.rows, self.channels), "float32")] * self.adds
        blocks, rows = k_blocks(self.channels, self.group_size), self.terms * self.rows
        if self.mode == "none":
            return [((rows, blocks * K_BLOCK), "float32"), *residual]
        return [
            ((blocks, rows, layout.steps, 2, layout.depth), "int8"),
            ((rows, self.scales), "float32"),
            ((rows, self.groups), "int32"),
            *residual,
        ]


def default(kernel: QuantizeKernel) -> dict[str, int]:
    """Return the decisions made by hand."""
    # Two groups at once: what is left of each is short chains.
    return {"rows": 1, "groups": lane_chunks(kernel.groups, 2)[1]}


def space(kernel: QuantizeKernel) -> Space:
    """Return the decisions of a quantizer.

    rows
        That a thread takes at a time; all of them: there is one thread.
    groups
        Of a row whose codes are made at once.
    """
    several = kernel.mode != "none" and not kernel.mixed
    groups = tuple(n for n in (1, 2, 4, 8) if kernel.groups % n == 0) if several else ()
    made = default(kernel)
    return Space({"rows": rows_of_task(kernel.rows), "groups": groups or (made["groups"],)}, made)


def build(kernel: QuantizeKernel, layout: Layout, decisions: dict[str, int] | None = None):
    """Return the PrimFunc; inputs as `input_shapes` and `index_shapes`, outputs as `output_shapes`."""
    decisions = decisions or default(kernel)
    K, padded = kernel.channels, k_blocks(kernel.channels, kernel.group_size) * K_BLOCK
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(kernel.name)
            T.func_attr({"global_symbol": kernel.name, "tirx.noalias": True})
            inputs = [T.arg(f"in{i}", T.buffer(shape, "float32")) for i, shape in enumerate(kernel.input_shapes())]
            indices = [
                T.arg(name, T.buffer(shape, "int32"))
                for name, shape in zip(("order", "shift"), kernel.index_shapes(), strict=False)
            ]
            names = ("y",) if kernel.mode == "none" else ("codes", "scales", "sums")
            names += ("residual",) * kernel.adds
            outputs = [
                T.arg(name, T.buffer(shape, dtype))
                for name, (shape, dtype) in zip(names, kernel.output_shapes(layout), strict=True)
            ]
            with task_loop("row", kernel.rows, [*inputs, *indices], outputs, decisions["rows"]) as m:
                if kernel.adds:
                    inputs, outputs = _add(kernel, inputs, m, outputs)
                y = _Row(inputs[0], m) if kernel.in_place else T.sblock_alloc_buffer((padded,), "float32")
                partial = T.sblock_alloc_buffer((LANES,), "float32")
                scalar = T.sblock_alloc_buffer((2,), "float32")
                counts = T.sblock_alloc_buffer((LANES,), "int32")
                total = T.sblock_alloc_buffer((1,), "int32")
                if not kernel.in_place:
                    SOURCES[kernel.source](kernel, inputs, m, y, partial, scalar)
                refine = inputs[-2 if kernel.mode == "static" else -1]
                if kernel.shifted:
                    made, y = y, T.sblock_alloc_buffer((padded,), "float32")
                    store_vector(y, K, lambda k: made[indices[0][k]] * refine[k])
                elif kernel.refined:
                    store_vector(y, K, lambda k: y[k] * refine[k])
                if padded > K:
                    with T.serial(padded - K) as k:
                        T.buffer_store(y, float32(0), [K + k])
                if kernel.mode == "none":
                    _store_row(outputs[0], m, padded, y)
                elif kernel.mixed:
                    quantize_mixed_row(kernel, inputs[-1], m, y, outputs, layout)
                else:
                    shift = indices[1] if kernel.shifted else None
                    for term in range(kernel.terms):
                        row = m + term * kernel.rows
                        more = term + 1 < kernel.terms
                        at_once = decisions["groups"]
                        _quantize_row(
                            kernel, inputs[-1], shift, row, more, y, scalar, counts, total, outputs, layout, at_once
                        )
    return builder.get()


class _Row:
    """A row of a matrix, to be read like a vector."""

    def __init__(self, matrix, m):
        self.matrix, self.m = matrix, m

    def __getitem__(self, k):
        return self.matrix[self.m, k]


def _add(kernel, inputs, m, outputs) -> tuple[list, list]:
    """Store the sum of the first two inputs; return the inputs with it instead of them, and the other outputs."""
    (a, b, *others), (*outputs, total) = inputs, outputs
    chunks, lanes = lane_chunks(kernel.channels)
    with T.serial(chunks) as c, T.vectorized(lanes) as j:
        k = c * lanes + j
        T.buffer_store(total, a[m, k] + b[m, k], [m, k])
    return [total, *others], outputs


def _plain(kernel, inputs, m, y, partial, scalar) -> None:
    store_vector(y, kernel.channels, lambda k: inputs[0][m, k])


def _rms_norm(kernel, inputs, m, y, partial, scalar) -> None:
    """y = (x / sqrt(mean x² + ε)) · gain."""
    x, gain = inputs[0], inputs[1]
    store_sum(partial, scalar, kernel.channels, lambda k: x[m, k] * x[m, k])
    mean = scalar[0] / float32(kernel.channels)
    T.buffer_store(scalar, float32(1) / tirx.sqrt(mean + float32(kernel.epsilon)), [1])
    store_vector(y, kernel.channels, lambda k: x[m, k] * scalar[1] * gain[k])


def _layer_norm(kernel, inputs, m, y, partial, scalar) -> None:
    """y = (x - mean) / sqrt(variance + ε) · gain + bias."""
    x, gain, bias = inputs[:3]
    store_moments(x, m, kernel.channels, kernel.epsilon, partial, scalar)
    store_vector(y, kernel.channels, lambda k: (x[m, k] - scalar[1]) * scalar[0] * gain[k] + bias[k])


def _silu_mul(kernel, inputs, m, y, partial, scalar) -> None:
    """y = gate / (1 + e^-gate) · up, for x = [gate, up]."""

    def value(k):
        gate, up = inputs[0][m, k], inputs[0][m, kernel.channels + k]
        return gate / (float32(1) + exp(float32(0) - gate)) * up

    store_vector(y, kernel.channels, value)


def _relu(kernel, inputs, m, y, partial, scalar) -> None:
    store_vector(y, kernel.channels, lambda k: tirx.max(inputs[0][m, k], float32(0)))


def _gelu(kernel, inputs, m, y, partial, scalar) -> None:
    """y = x · (1 + erf(x / √2)) / 2."""

    def value(k):
        x = inputs[0][m, k]
        return x * float32(0.5) * (float32(1) + erf(x * float32(math.sqrt(0.5))))

    store_vector(y, kernel.channels, value)


def _gelu_tanh(kernel, inputs, m, y, partial, scalar) -> None:
    """y = x · (1 + tanh u) / 2 = x / (1 + e^-2u), u = √(2/π) · (x + 0.044715 x³)."""

    def value(k):
        x = inputs[0][m, k]
        twice = float32(2 * math.sqrt(2 / math.pi)) * x * (float32(1) + float32(0.044715) * x * x)
        return x / (float32(1) + exp(float32(0) - twice))

    store_vector(y, kernel.channels, value)


SOURCES = {
    "plain": _plain,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "silu_mul": _silu_mul,
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
"""What can be fused with a quantization, by name."""


def _store_row(out, m, extent: int, y) -> None:
    with T.serial(extent // LANES) as c, T.vectorized(LANES) as j:
        T.buffer_store(out, y[c * LANES + j], [m, c * LANES + j])


def _quantize_row(kernel, static, shift, m, more, y, scalar, counts, total, outputs, layout, at_once) -> None:
    codes, scales, sums = outputs
    G, size = kernel.groups, kernel.group_size
    if kernel.mode == "static":
        T.buffer_store(scales, static[0], [m, 0])
    elif kernel.mode == "per-token":
        _scale_of(kernel, y, 0, G * size, counts, total, scalar)
        T.buffer_store(scales, scalar[0], [m, 0])
    with T.serial(G // at_once) as pair, T.unroll(at_once) as which:
        g = pair * at_once + which
        if kernel.mode == "per-token-group":
            _scale_of(kernel, y, g * size, size, counts, total, scalar)
            T.buffer_store(scales, scalar[0], [m, g])
        with T.vectorized(LANES) as j:
            T.buffer_store(counts, tirx.const(0, "int32"), [j])
        with T.serial(size // K_BLOCK) as b:
            if kernel.shifted:
                with T.vectorized(LANES) as j:
                    T.buffer_store(counts, T.shift_left(counts[j], shift[b]), [j])
            with T.serial(K_BLOCK // LANES) as c, T.vectorized(LANES) as j:
                k = g * size + b * K_BLOCK + c * LANES + j
                code = _code(kernel, y, static, scalar, k)
                T.buffer_store(counts, counts[j] + code, [j])
                T.buffer_store(codes, T.Cast("int8", code), [k // K_BLOCK, m, *layout.place(k % K_BLOCK)])
        if more:  # leave to the next term what this one lacks
            with T.serial(size // LANES) as c, T.vectorized(LANES) as j:
                k = g * size + c * LANES + j
                rest = y[k] - scalar[0] * T.Cast("float32", _code(kernel, y, static, scalar, k))
                T.buffer_store(y, rest, [k])
        reduce_integers(counts, "add", total)
        T.buffer_store(sums, total[0], [m, g])


def _scale_of(kernel, y, start, extent: int, peaks, peak, scalar) -> None:
    """Store s = max|y| / L and 1/s over a stretch of a row into `scalar`.

    Floats that are not negative are ordered as their bits are, so that each value takes one integer maximum, `peaks`
    int32 [LANES] and `peak` int32 [1], where floats take a comparison and a choice.
    """
    with T.vectorized(LANES) as j:
        T.buffer_store(peaks, tirx.const(0, "int32"), [j])
    with T.serial(extent // LANES) as c, T.vectorized(LANES) as j:
        magnitude = tirx.call_llvm_pure_intrin("float32", "llvm.fabs", y[start + c * LANES + j])
        T.buffer_store(peaks, tirx.max(peaks[j], tirx.reinterpret("int32", magnitude)), [j])
    reduce_integers(peaks, "smax", peak)
    largest = tirx.reinterpret("float32", peak[0])
    limit = float32(kernel.limit)
    # L / L is 1, and choosing before the division leaves LLVM nothing to branch around.
    T.buffer_store(scalar, T.Select(largest < float32(SMALLEST_MAXIMUM), limit, largest) / limit, [0])
    T.buffer_store(scalar, float32(1) / scalar[0], [1])


def _code(kernel, y, static, scalar, k):
    """Return the int32 code of channel k."""
    if kernel.mode != "static":
        return rounded(y[k] * scalar[1])
    limit = float32(kernel.limit)
    q = tirx.nearbyint(y[k] * (float32(1) / static[0])) + static[1]
    q = T.Cast("int32", tirx.max(tirx.min(q, limit), float32(0) - limit))
    if kernel.channels % kernel.group_size:
        return T.Select(k < kernel.channels, q, tirx.const(0, "int32"))
    return q
