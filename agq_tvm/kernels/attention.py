"""Causal attention over caches that are updated in place.

`lengths` holds two int32: positions cached before this call, and valid rows of this call. Rows beyond the valid ones
give unused results and are never cached.
"""

from agq_tvm.kernels.attention_form import AttentionKernel
from agq_tvm.kernels.attention_int8 import scale_weights, store_query_offsets
from agq_tvm.kernels.attention_log2 import round_probabilities
from agq_tvm.kernels.attention_products import Pairs, store_scores, store_weighted_values
from agq_tvm.kernels.attention_softmax import store_softmax
from agq_tvm.kernels.attention_space import default
from agq_tvm.kernels.emit import LANES, task_loop
from agq_tvm.tvm_seam import IRBuilder, T, tirx


def build_attention(kernel: AttentionKernel, decisions: dict[str, int] | None = None):
    """Return causal attention of M rows over the caches, softmax in two passes.

    Buffers, in order: the queries, as `build_append` makes them; `kernel.caches`; lengths int32 [2]; value_scale
    float32 [KV] if there is a book; slopes float32 [H] if `kernel.alibi`, and if it is `kernel.pruned`, too: positions
    int32 [M] and key_positions int32 [context]; out float32 [M, H D]; importance float32 [M, H] if
    `kernel.importance`. A task is one KV head and a few rows with some query heads that share it, so a key or value is
    loaded and converted once for them; `attention_space.py` has the decisions.
    """
    decisions = decisions or default(kernel)
    M, H, R = kernel.rows, kernel.heads, decisions["rows"]
    tiles, parts = M // R, kernel.shared // decisions["heads"]
    tasks = kernel.kv_heads * parts * tiles
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(kernel.name)
            T.func_attr({"global_symbol": kernel.name, "tirx.noalias": True})
            queries = kernel.declare_query()
            caches = kernel.declare_caches()
            lengths = T.arg("lengths", T.buffer((2,), "int32"))
            value_scale = kernel.declare_value_scale()
            alibi = _alibi_arguments(kernel)
            outputs = [T.arg("out", T.buffer((M, H * kernel.head_dim), "float32"))]
            if kernel.importance:
                outputs.append(T.arg("importance", T.buffer((M, H), "float32")))
            reads = [*queries, *caches.values(), lengths, *value_scale, *alibi]
            with task_loop("tile", tasks, reads, outputs, 1 if decisions["parallel"] else tasks) as task:
                pairs = Pairs(kernel, decisions, task // tiles, _spread(task % tiles, tiles) * R)
                cached = tirx.const(kernel.context - M, "int32") if kernel.fixed else lengths[0]
                scores = T.sblock_alloc_buffer((len(pairs.at), pairs.row_length), "float32")
                norm = T.sblock_alloc_buffer((len(pairs.at), 1), "float32")
                end = tirx.min(cached + pairs.row + R, tirx.const(kernel.context, "int32"))
                blocks = (end + (LANES - 1)) // LANES
                pairs.offsets = store_query_offsets(pairs, queries[0])
                store_scores(pairs, blocks, queries, caches, cached, alibi, scores)
                store_softmax(len(pairs.at), kernel.form.sums, blocks, scores, norm)
                for importance in outputs[1:]:
                    for p, (m, h) in enumerate(pairs.at):
                        T.buffer_store(importance, scores[p, 0] * norm[p, 0], [m, h])
                digits = None
                if kernel.form.book:
                    round_probabilities(kernel.form.book, len(pairs.at), pairs.kv, blocks, scores, norm, *value_scale)
                elif kernel.int8:
                    digits = scale_weights(pairs, blocks, caches["value_scales"], scores, norm)
                store_weighted_values(pairs, end, caches["values"], scores, digits, norm, outputs[0])
    return builder.get()


def _spread(i, tiles: int):
    """Return the i-th tile of rows, first and last ones in turn: later rows take longer, and threads get stretches."""
    return T.Select(i % 2 == 0, i // 2, tiles - 1 - i // 2) if tiles > 1 else i


def _alibi_arguments(kernel: AttentionKernel) -> list:
    """Declare what ALiBi reads: slopes, and the positions of rows and keys where they are not those of the cache."""
    if not kernel.alibi:
        return []
    arguments = [T.arg("slopes", T.buffer((kernel.heads,), "float32"))]
    if kernel.pruned:
        arguments.append(T.arg("positions", T.buffer((kernel.rows,), "int32")))
        arguments.append(T.arg("key_positions", T.buffer((kernel.context,), "int32")))
    return arguments
