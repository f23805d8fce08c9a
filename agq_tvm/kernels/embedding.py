"""Reading rows: the embedding of tokens from the packed 8-bit table, and the last valid row of a chunk."""

from agq_tvm.kernels.emit import task_loop
from agq_tvm.kernels.layout import K_BLOCK, Layout, k_blocks
from agq_tvm.kernels.linear import ZERO
from agq_tvm.tvm_seam import IRBuilder, T


def build_embedding(rows: int, vocab: int, hidden: int, layout: Layout):
    """Return the kernel that looks tokens up in the table that lm_head multiplies with.

    Buffers, in order: tokens int32 [M]; w, the table packed by `layout` (8 bit, groups of 32); ws float16
    [tiles, G, V, L]; out float32 [M, hidden].
    """
    name = f"embedding_m{rows}_n{vocab}_k{hidden}"
    blocks, tiles = k_blocks(hidden, K_BLOCK), layout.tiles(vocab)
    dtype = "int8" if layout.zero else "uint8"
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            tokens = T.arg("tokens", T.buffer((rows,), "int32"))
            w = T.arg("w", T.buffer(layout.packed_shape(vocab, hidden), dtype))
            ws = T.arg("ws", T.buffer((tiles, blocks, layout.vectors, layout.lanes), "float16"))
            out = T.arg("out", T.buffer((rows, hidden), "float32"))
            with task_loop("row", rows, [tokens, w, ws], [out]) as m, T.serial(hidden) as k:
                column, D = tokens[m], layout.depth
                t, v, j = (
                    column // layout.width,
                    column % layout.width // layout.lanes,
                    column % layout.lanes,
                )
                c = k % K_BLOCK
                code = T.Cast("int32", w[t, k // K_BLOCK, c // (2 * D), c // D % 2, v, j, c % D])
                centered = T.Cast("float32", code + (layout.zero - ZERO[8]))
                scale = T.Cast("float32", ws[t, k // K_BLOCK, v, j])
                T.buffer_store(out, centered * scale, [m, k])
    return builder.get()


def build_last_row(rows: int, hidden: int):
    """Return the kernel that copies the last valid row: x float32 [M, hidden], lengths int32 [2], out [1, hidden]."""
    name = f"last_row_m{rows}_k{hidden}"
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            x = T.arg("x", T.buffer((rows, hidden), "float32"))
            lengths = T.arg("lengths", T.buffer((2,), "int32"))
            out = T.arg("out", T.buffer((1, hidden), "float32"))
            with task_loop("row", 1, [x, lengths], [out]):
                _copy_row(x, lengths, out, hidden)
    return builder.get()


def _copy_row(x, lengths, out, hidden: int) -> None:
    with T.serial(hidden) as k:
        T.buffer_store(out, x[lengths[1] - 1, k], [0, k])
