"""Attention over caches that are updated in place, and the step that fills them, with or without rotation.

Caches: keys float16 [KV, context / 16, head_dim, 16], sixteen positions side by side so that a vector of scores
needs no sum across lanes; values [KV, context, head_dim], float16, or int8 where probabilities are powers of two
(`attention_log2.py`). `lengths` holds two int32: positions cached before this call, and valid rows of this call.
Rows beyond the valid ones give unused results and are never cached.
"""

import math
from dataclasses import dataclass

from agq_tvm.kernels.attention_log2 import round_probabilities, value_code
from agq_tvm.kernels.emit import LANES, exp, float32, reduce_lanes, task_loop
from agq_tvm.quantize.codebooks import CodeBook
from agq_tvm.tvm_seam import IRBuilder, T, tirx

MASKED = -1.0e30


@dataclass(frozen=True)
class AttentionKernel:
    """Shapes of one attention: M rows, heads, context; `registers` is how many vectors of sums fit.

    Attributes
    ----------
    rows, heads, kv_heads, head_dim, context : int
        M, H, KV, D and the length of the caches (a multiple of 16).
    value_lanes : int
        Channels of the values summed at a time, so that the sums of a tile of rows stay in registers.
    alibi : bool
        Whether scores get the slope of their head times the distance of the key from the row, 0 or less.
    pruned : bool
        Whether the caches lack tokens that were pruned, so that ALiBi needs the positions of rows and keys.
    importance : bool
        Whether the probability that each row and head gives to the first key is wanted, too: what tokens are pruned by.
    book : CodeBook or None
        What probabilities are rounded to; values are int8 then, with a static scale for each KV head.
    """

    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    value_lanes: int = LANES
    alibi: bool = False
    pruned: bool = False
    importance: bool = False
    book: CodeBook | None = None

    @property
    def shared(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def query_rows(self) -> int:
        """Rows of the batch that a task takes, so that about six (row, head) pairs run together."""
        limit = max(1, 6 // self.shared)
        return next(r for r in range(min(limit, self.rows), 0, -1) if self.rows % r == 0)

    @property
    def name(self) -> str:
        """E.g. ``attention_m128_h9_kv3_d64_c2048``."""
        alibi = ("pruned_alibi_" if self.pruned else "alibi_") if self.alibi else ""
        kind = f"{alibi}{'log2_' if self.book else ''}"
        return f"{kind}attention_{'importance_' if self.importance else ''}{self.suffix}"

    @property
    def rope_name(self) -> str:
        """E.g. ``rope_append_m128_h9_kv3_d64_c2048``."""
        return f"rope_append_{self.suffix}"

    @property
    def append_name(self) -> str:
        """E.g. ``append_m128_h9_kv3_d64_c2048``."""
        return f"append_{self.suffix}"

    @property
    def suffix(self) -> str:
        """The shapes, as in names."""
        return f"m{self.rows}_h{self.heads}_kv{self.kv_heads}_d{self.head_dim}_c{self.context}"

    @property
    def key_cache(self) -> tuple[int, ...]:
        """Shape of the key cache."""
        return (self.kv_heads, self.context // LANES, self.head_dim, LANES)

    @property
    def value_cache(self) -> tuple[int, ...]:
        """Shape of the value cache."""
        return (self.kv_heads, self.context, self.head_dim)

    @property
    def value_dtype(self) -> str:
        """Type of the value cache."""
        return "int8" if self.book else "float16"

    def arg_value_scale(self) -> list:
        """Declare the next argument, the scales of int8 values, float32 [KV]; nothing for float16 ones."""
        return [T.arg("value_scale", T.buffer((self.kv_heads,), "float32"))] if self.book else []


def build_rope_append(kernel: AttentionKernel):
    """Return the kernel that rotates q and k, scales q by 1/sqrt(D), and appends k and v to the caches.

    Buffers, in order: qkv float32 [M, (H + 2 KV) D]; cos, sin float32 [context, D / 2]; positions int32 [M];
    lengths int32 [2]; value_scale float32 [KV] if `kernel.book`; keys and values (updated); q float32 [M, H, D]
    (output).
    """
    M, H, KV, D = kernel.rows, kernel.heads, kernel.kv_heads, kernel.head_dim
    half = D // 2
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(kernel.rope_name)
            T.func_attr({"global_symbol": kernel.rope_name, "tirx.noalias": True})
            qkv = T.arg("qkv", T.buffer((M, (H + 2 * KV) * D), "float32"))
            cos = T.arg("cos", T.buffer((kernel.context, half), "float32"))
            sin = T.arg("sin", T.buffer((kernel.context, half), "float32"))
            positions = T.arg("positions", T.buffer((M,), "int32"))
            lengths = T.arg("lengths", T.buffer((2,), "int32"))
            value_scale = kernel.arg_value_scale()
            keys = T.arg("keys", T.buffer(kernel.key_cache, "float16"))
            values = T.arg("values", T.buffer(kernel.value_cache, kernel.value_dtype))
            q = T.arg("q", T.buffer((M, H, D), "float32"))
            reads = [qkv, cos, sin, positions, lengths, *value_scale]
            with task_loop("row", M, reads, [keys, values, q]) as m:

                def rotated(start, d, high):
                    """Channel d (or d + D/2 when `high`) of a rotated head that begins at `start`."""
                    a, b = qkv[m, start + d], qkv[m, start + half + d]
                    c, s = cos[positions[m], d], sin[positions[m], d]
                    return b * c + a * s if high else a * c - b * s

                scale = float32(D**-0.5)
                with T.serial(H) as h, T.vectorized(half) as d:
                    T.buffer_store(q, rotated(h * D, d, False) * scale, [m, h, d])
                    T.buffer_store(q, rotated(h * D, d, True) * scale, [m, h, half + d])
                with T.If(m < lengths[1]), T.Then():
                    place = lengths[0] + m
                    with T.serial(KV) as g:
                        with T.serial(half) as d:
                            for high in (False, True):
                                _store_key(keys, g, place, d + half * high, rotated(H * D + g * D, d, high))
                        _store_value(kernel, qkv, m, g, place, values, value_scale)
    return builder.get()


def build_append(kernel: AttentionKernel):
    """Return the kernel that scales q by 1/sqrt(D) and appends k and v to the caches, without rotation.

    Buffers, in order: qkv float32 [M, (H + 2 KV) D]; lengths int32 [2]; value_scale float32 [KV] if
    `kernel.book`; keys and values (updated); q float32 [M, H, D] (output).
    """
    M, H, KV, D = kernel.rows, kernel.heads, kernel.kv_heads, kernel.head_dim
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(kernel.append_name)
            T.func_attr({"global_symbol": kernel.append_name, "tirx.noalias": True})
            qkv = T.arg("qkv", T.buffer((M, (H + 2 * KV) * D), "float32"))
            lengths = T.arg("lengths", T.buffer((2,), "int32"))
            value_scale = kernel.arg_value_scale()
            keys = T.arg("keys", T.buffer(kernel.key_cache, "float16"))
            values = T.arg("values", T.buffer(kernel.value_cache, kernel.value_dtype))
            q = T.arg("q", T.buffer((M, H, D), "float32"))
            with task_loop("row", M, [qkv, lengths, *value_scale], [keys, values, q]) as m:
                with T.serial(H) as h, T.vectorized(D) as d:
                    T.buffer_store(q, qkv[m, h * D + d] * float32(D**-0.5), [m, h, d])
                with T.If(m < lengths[1]), T.Then():
                    place = lengths[0] + m
                    with T.serial(KV) as g:
                        with T.serial(D) as d:
                            _store_key(keys, g, place, d, qkv[m, (H + g) * D + d])
                        _store_value(kernel, qkv, m, g, place, values, value_scale)
    return builder.get()


def _store_key(keys, g, place, d, value) -> None:
    T.buffer_store(keys, T.Cast("float16", value), [g, place // LANES, d, place % LANES])


def _store_value(kernel: AttentionKernel, qkv, m, g, place, values, value_scale) -> None:
    start = (kernel.heads + kernel.kv_heads) * kernel.head_dim
    with T.vectorized(kernel.head_dim) as d:
        value = qkv[m, start + g * kernel.head_dim + d]
        stored = value_code(value, value_scale[0][g]) if kernel.book else T.Cast("float16", value)
        T.buffer_store(values, stored, [g, place, d])


def build_attention(kernel: AttentionKernel):
    """Return causal attention of M rows over the caches, softmax in two passes.

    Buffers, in order: q float32 [M, H, D], already scaled; keys, values; lengths int32 [2]; value_scale float32
    [KV] if `kernel.book`; slopes float32 [H] if `kernel.alibi`, and if it is `kernel.pruned`, too: positions int32
    [M] and key_positions int32 [context]; out float32 [M, H D]; importance float32 [M, H] if `kernel.importance`.
    A task is one KV head and a few rows with all query heads that share it, so a key or value is loaded and
    converted once for them.
    """
    M, H, D, R = kernel.rows, kernel.heads, kernel.head_dim, kernel.query_rows
    pairs = R * kernel.shared
    tiles = M // R
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(kernel.name)
            T.func_attr({"global_symbol": kernel.name, "tirx.noalias": True})
            q = T.arg("q", T.buffer((M, H, D), "float32"))
            keys = T.arg("keys", T.buffer(kernel.key_cache, "float16"))
            values = T.arg("values", T.buffer(kernel.value_cache, kernel.value_dtype))
            lengths = T.arg("lengths", T.buffer((2,), "int32"))
            value_scale = kernel.arg_value_scale()
            alibi = _alibi_arguments(kernel)
            outputs = [T.arg("out", T.buffer((M, H * D), "float32"))]
            if kernel.importance:
                outputs.append(T.arg("importance", T.buffer((M, H), "float32")))
            reads = [q, keys, values, lengths, *value_scale, *alibi]
            with task_loop("tile", kernel.kv_heads * tiles, reads, outputs) as task:
                scores = T.sblock_alloc_buffer((pairs, kernel.context), "float32")
                norm = T.sblock_alloc_buffer((pairs, 1), "float32")
                kv, row = task // tiles, task % tiles * R
                at = [(row + p // kernel.shared, kv * kernel.shared + p % kernel.shared) for p in range(pairs)]
                end = tirx.min(lengths[0] + row + R, tirx.const(kernel.context, "int32"))
                blocks = (end + (LANES - 1)) // LANES
                _scores(kernel, at, kv, blocks, q, keys, lengths, alibi, scores)
                _softmax(at, blocks, scores, norm)
                for importance in outputs[1:]:
                    for p, (m, h) in enumerate(at):
                        T.buffer_store(importance, scores[p, 0] * norm[p, 0], [m, h])
                if kernel.book:
                    round_probabilities(kernel.book, pairs, kv, blocks, scores, norm, *value_scale)
                _weighted_values(kernel, at, kv, end, scores, norm, values, outputs[0])
    return builder.get()


def _alibi_arguments(kernel: AttentionKernel) -> list:
    """Declare what ALiBi reads: slopes, and the positions of rows and keys where they are not those of the cache."""
    if not kernel.alibi:
        return []
    arguments = [T.arg("slopes", T.buffer((kernel.heads,), "float32"))]
    if kernel.pruned:
        arguments.append(T.arg("positions", T.buffer((kernel.rows,), "int32")))
        arguments.append(T.arg("key_positions", T.buffer((kernel.context,), "int32")))
    return arguments


def _scores(kernel, at, kv, blocks, q, keys, lengths, alibi, scores) -> None:
    """scores[p, j] = q_p · k_j, masked beyond the row's own position; all pairs share a load of keys."""
    pairs = len(at)
    with T.serial(blocks) as block, T.sblock("scores"):
        T.reads()
        T.writes()
        sums = T.sblock_alloc_buffer((pairs, LANES), "float32")
        for p in range(pairs):
            with T.vectorized(LANES) as j:
                T.buffer_store(sums, float32(0), [p, j])
        with T.serial(kernel.head_dim) as d:
            for p, (m, h) in enumerate(at):
                with T.vectorized(LANES) as j:
                    key = T.Cast("float32", keys[kv, block, d, j])
                    T.buffer_store(sums, sums[p, j] + q[m, h, d] * key, [p, j])
        for p, (m, h) in enumerate(at):
            with T.vectorized(LANES) as j:
                key, row, score = block * LANES + j, lengths[0] + m, sums[p, j]
                if kernel.alibi:
                    slopes, *positions = alibi
                    distance = positions[1][key] - positions[0][m] if positions else key - row
                    score = score + slopes[h] * T.Cast("float32", distance)
                T.buffer_store(scores, T.Select(key <= row, score, float32(MASKED)), [p, key])


def _softmax(at, blocks, scores, norm) -> None:
    """Turn scores into e^(score - maximum), and store one over their sum."""
    for p in range(len(at)):
        with T.sblock("softmax"):
            T.reads()
            T.writes()
            partial = T.sblock_alloc_buffer((LANES,), "float32")
            result = T.sblock_alloc_buffer((1,), "float32")
            with T.vectorized(LANES) as j:
                T.buffer_store(partial, float32(MASKED), [j])
            with T.serial(blocks) as block, T.vectorized(LANES) as j:
                T.buffer_store(partial, tirx.max(partial[j], scores[p, block * LANES + j]), [j])
            reduce_lanes(partial, tirx.max, result)
            with T.vectorized(LANES) as j:
                T.buffer_store(partial, float32(0), [j])
            with T.serial(blocks) as block, T.vectorized(LANES) as j:
                where = [p, block * LANES + j]
                # Masked scores give e^-87: taken out by hand, since p · v must not see them.
                score = scores[p, block * LANES + j]
                weight = T.Select(score > float32(MASKED), exp(score - result[0]), float32(0))
                T.buffer_store(scores, weight, where)
            with T.serial(blocks) as block, T.vectorized(LANES) as j:
                T.buffer_store(partial, partial[j] + scores[p, block * LANES + j], [j])
            reduce_lanes(partial, lambda a, b: a + b, result)
            T.buffer_store(norm, float32(1) / result[0], [p, 0])


def _weighted_values(kernel, at, kv, end, scores, norm, values, out) -> None:
    """out[m, h] = Σ_j weight_j · v_j / Σ weights, a few channels at a time so that sums stay in registers."""
    pairs, lanes = len(at), math.gcd(kernel.value_lanes, kernel.head_dim)
    with T.serial(kernel.head_dim // lanes) as chunk, T.sblock("values"):
        T.reads()
        T.writes()
        sums = T.sblock_alloc_buffer((pairs, lanes), "float32")
        for p in range(pairs):
            with T.vectorized(lanes) as d:
                T.buffer_store(sums, float32(0), [p, d])
        with T.serial(end) as j:
            for p in range(pairs):
                with T.vectorized(lanes) as d:
                    value = T.Cast("float32", values[kv, j, chunk * lanes + d])
                    T.buffer_store(sums, sums[p, d] + scores[p, j] * value, [p, d])
        for p, (m, h) in enumerate(at):
            with T.vectorized(lanes) as d:
                where = [m, h * kernel.head_dim + chunk * lanes + d]
                T.buffer_store(out, sums[p, d] * norm[p, 0], where)
