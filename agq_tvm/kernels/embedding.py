"""Reading rows: the embedding of tokens from the packed table, and the last valid row of a chunk."""

from agq_tvm.kernels.emit import task_loop
from agq_tvm.kernels.intrin.base import nibble, stored_dtype
from agq_tvm.kernels.layout import K_BLOCK, Layout, k_blocks
from agq_tvm.kernels.linear import ZERO
from agq_tvm.tvm_seam import IRBuilder, T


def build_embedding(rows: int, vocab: int, hidden: int, layout: Layout, offsets: bool = False):
    """Return the kernel that looks tokens up in the table that lm_head multiplies with.

    Buffers, in order: tokens int32 [M]; w, the table packed by `layout` (groups of 32); ws float16 [tiles, G, V, L];
    wo the same, if there are offsets; out float32 [M, hidden].
    """
    per_group = (layout.tiles(vocab), k_blocks(hidden, K_BLOCK), layout.vectors, layout.lanes)
    codes = stored_dtype(layout) if layout.bits == 8 else "uint8"
    shapes = [("w", layout.packed_shape(vocab, hidden), codes), ("ws", per_group, "float16")]
    shapes += [("wo", per_group, "float16")] if offsets else []
    # What is to be added to a code: without offsets it stands for itself less the code of 0.
    center = layout.zero - (0 if offsets else ZERO[layout.bits])

    def value(w, ws, wo, column, k):
        t, v, j = _place(column, layout.vectors, layout.lanes)
        step, half, i = layout.place(k % K_BLOCK)
        if layout.bits == 4:
            code = nibble(w[t, k // K_BLOCK, step, v, j, i], half, layout)
        else:
            code = w[t, k // K_BLOCK, step, half, v, j, i]
        scaled = T.Cast("float32", T.Cast("int32", code) + center) * T.Cast("float32", ws[t, k // K_BLOCK, v, j])
        return scaled if wo is None else scaled + T.Cast("float32", wo[t, k // K_BLOCK, v, j])

    def read(buffers, column, k):
        return value(*buffers, *(() if offsets else (None,)), column, k)

    return _look_up(f"embedding_w{layout.bits}_m{rows}_n{vocab}_k{hidden}", rows, hidden, shapes, read)


def build_float_embedding(rows: int, vocab: int, hidden: int, shape: tuple[int, int, int, int], storage: str):
    """Return the kernel that looks tokens up in the table of floats that `linear_dense` multiplies with.

    Buffers, in order: tokens int32 [M]; w `storage` of `shape`, [tiles, K, V, L]; out float32 [M, hidden].
    """

    def read(buffers, column, k):
        t, v, j = _place(column, *shape[2:])
        return T.Cast("float32", buffers[0][t, k, v, j])

    return _look_up(f"embedding_{storage}_m{rows}_n{vocab}_k{hidden}", rows, hidden, [("w", shape, storage)], read)


def _place(column, vectors: int, lanes: int) -> tuple:
    """Indices of a column: its tile, and the vector and the lane there."""
    return column // (vectors * lanes), column % (vectors * lanes) // lanes, column % lanes


def _look_up(name: str, rows: int, hidden: int, shapes: list, read):
    """Return the kernel that writes ``read(buffers, token, channel)`` for the tokens of all rows."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            tokens = T.arg("tokens", T.buffer((rows,), "int32"))
            buffers = [T.arg(part, T.buffer(shape, dtype)) for part, shape, dtype in shapes]
            out = T.arg("out", T.buffer((rows, hidden), "float32"))
            with task_loop("row", rows, [tokens, *buffers], [out]) as m, T.serial(hidden) as k:
                T.buffer_store(out, read(buffers, tokens[m], k), [m, k])
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
