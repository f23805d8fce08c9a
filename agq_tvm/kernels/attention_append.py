"""The step before attention: rotate queries and keys if need be, and append keys and values to the caches.

Codes of int8 caches are those of `quantize.activations.dynamic_codes`: the scale is the largest magnitude of a head's
channels over 127, and what is rounded, half to even, is x times one over the scale. Queries are rounded alike.
"""

from agq_tvm.kernels.activation import SMALLEST_MAXIMUM
from agq_tvm.kernels.attention_form import DEPTH, AttentionKernel
from agq_tvm.kernels.attention_log2 import value_code
from agq_tvm.kernels.emit import LANES, float32, lane_chunks, reduce_lanes, store_vector, task_loop
from agq_tvm.quantize.codebooks import VALUE_LIMIT
from agq_tvm.tvm_seam import IRBuilder, T, tirx


def build_append(kernel: AttentionKernel, rotary: bool):
    """Return the kernel that makes the queries of attention and appends the valid rows to the caches.

    Buffers, in order: qkv float32 [M, (H + 2 KV) D]; if `rotary` cos, sin float32 [context, D / 2] and positions
    int32 [M]; lengths int32 [2]; value_scale float32 [KV] if there is a book; `kernel.caches` (updated); q (output),
    times 1/sqrt(D), or codes and their scales float32 [M, H], which have that factor.
    """
    M, D = kernel.rows, kernel.head_dim
    name = kernel.append_name(rotary)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            qkv = T.arg("qkv", T.buffer((M, (kernel.heads + 2 * kernel.kv_heads) * D), "float32"))
            tables = _declare_tables(kernel) if rotary else []
            lengths = T.arg("lengths", T.buffer((2,), "int32"))
            value_scale = kernel.declare_value_scale()
            caches = kernel.declare_caches()
            queries = kernel.declare_query()
            reads = [qkv, *tables, lengths, *value_scale]
            with task_loop("row", M, reads, [*caches.values(), *queries]) as m:
                row = _Row(kernel, qkv, tables, m)
                with T.serial(kernel.heads) as h:
                    row.store_query(queries, h)
                with T.If(m < lengths[1]), T.Then():
                    with T.serial(kernel.kv_heads) as g:
                        row.append(caches, value_scale, g, lengths[0] + m)
    return builder.get()


def _declare_tables(kernel: AttentionKernel) -> list:
    tables = [T.arg(name, T.buffer((kernel.context, kernel.head_dim // 2), "float32")) for name in ("cos", "sin")]
    return [*tables, T.arg("positions", T.buffer((kernel.rows,), "int32"))]


class _Row:
    """Emits what is done with one row; `head` and `scale` hold one of its heads, and s and 1/s of its codes."""

    def __init__(self, kernel: AttentionKernel, qkv, tables: list, m):
        self.kernel, self.qkv, self.tables, self.m = kernel, qkv, tables, m
        self.head = T.sblock_alloc_buffer((kernel.channels,), "float32")
        self.partial = T.sblock_alloc_buffer((LANES,), "float32")
        self.scale = T.sblock_alloc_buffer((2,), "float32")
        if kernel.channels > kernel.head_dim:
            with T.serial(kernel.channels - kernel.head_dim) as d:
                T.buffer_store(self.head, float32(0), [kernel.head_dim + d])

    def store_query(self, queries: list, h) -> None:
        kernel, m = self.kernel, self.m
        factor = float32(kernel.head_dim**-0.5)
        self._load(h, rotated=True)
        if not kernel.int8:
            chunks, lanes = lane_chunks(kernel.head_dim)
            with T.serial(chunks) as c, T.vectorized(lanes) as j:
                d = c * lanes + j
                T.buffer_store(queries[0], self.head[d] * factor, [m, h, d])
            return
        self._find_scale()
        T.buffer_store(queries[1], self.scale[0] * factor, [m, h])
        with T.serial(kernel.channels // LANES) as c, T.vectorized(LANES) as j:
            d = c * LANES + j
            T.buffer_store(queries[0], T.Cast(kernel.queries[0][1], self._code(d)), [m, h, d])

    def append(self, caches: dict, value_scale: list, g, place) -> None:
        kernel, H, KV = self.kernel, self.kernel.heads, self.kernel.kv_heads
        keys, values = caches["keys"], caches["values"]
        self._load(H + g, rotated=True)
        block, lane = place // LANES, place % LANES
        if kernel.int8:
            self._store_scale(caches["key_scales"], g, place)
            with T.serial(kernel.channels) as d:
                code = T.Cast("int8", self._code(d))
                T.buffer_store(keys, code, [g, block, d // DEPTH, lane, d % DEPTH])
        else:
            with T.serial(kernel.head_dim) as d:
                T.buffer_store(keys, T.Cast("float16", self.head[d]), [g, block, d, lane])
        self._load(H + KV + g, rotated=False)
        if kernel.int8_values:
            self._store_scale(caches["value_scales"], g, place)
            with T.serial(kernel.channels) as d:
                code = T.Cast("int8", self._code(d))
                T.buffer_store(values, code, [g, place // DEPTH, d, place % DEPTH])
            return
        chunks, lanes = lane_chunks(kernel.head_dim)
        with T.serial(chunks) as c, T.vectorized(lanes) as j:
            value = self.head[c * lanes + j]
            stored = value_code(value, value_scale[0][g]) if kernel.form.book else T.Cast("float16", value)
            T.buffer_store(values, stored, [g, place, c * lanes + j])

    def _load(self, head, rotated: bool) -> None:
        """Copy a head, q's first, then k's and v's, rotated if there are tables."""
        D, m, qkv = self.kernel.head_dim, self.m, self.qkv
        half, start = D // 2, head * D
        if not (rotated and self.tables):
            store_vector(self.head, D, lambda d: qkv[m, start + d])
            return
        cos, sin, positions = self.tables
        chunks, lanes = lane_chunks(half)
        with T.serial(chunks) as c, T.vectorized(lanes) as j:
            d = c * lanes + j
            first, second = qkv[m, start + d], qkv[m, start + half + d]
            turn = cos[positions[m], d], sin[positions[m], d]
            T.buffer_store(self.head, first * turn[0] - second * turn[1], [d])
            T.buffer_store(self.head, second * turn[0] + first * turn[1], [half + d])

    def _find_scale(self) -> None:
        with T.vectorized(LANES) as j:
            T.buffer_store(self.partial, float32(0), [j])
        with T.serial(self.kernel.channels // LANES) as c, T.vectorized(LANES) as j:
            value = self.head[c * LANES + j]
            T.buffer_store(self.partial, tirx.max(self.partial[j], tirx.max(value, float32(0) - value)), [j])
        reduce_lanes(self.partial, tirx.max, self.scale)
        largest = self.scale[0]
        scale = T.Select(largest < float32(SMALLEST_MAXIMUM), float32(1), largest / float32(VALUE_LIMIT))
        T.buffer_store(self.scale, scale, [0])
        T.buffer_store(self.scale, float32(1) / self.scale[0], [1])

    def _store_scale(self, scales, g, place) -> None:
        self._find_scale()
        T.buffer_store(scales, self.scale[0], [g, place])

    def _code(self, d):
        return tirx.nearbyint(self.head[d] * self.scale[1])
