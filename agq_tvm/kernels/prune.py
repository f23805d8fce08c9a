"""Token pruning: which rows of a chunk stay, their hidden states, and the positions of what is cached after it.

A model that prunes in m layers has m + 1 segments: the layers between two of them see the same rows. Its `lengths` is
int32 [2 (m + 1) + 1]: for each segment the positions cached before this call and the valid rows of this call, then
whether this call ends the prompt.
"""

from dataclasses import dataclass

from agq_tvm.kernels.emit import float32, lane_chunks, task_loop
from agq_tvm.tvm_seam import IRBuilder, T, tirx

ABOVE_ALL = 3.0e38
"""Stands for the importance of a row that always stays."""


@dataclass(frozen=True)
class SelectKernel:
    """One choice of rows.

    Attributes
    ----------
    rows, kept_rows : int
        M before and M' after, both static; how many of them are valid is in `lengths`.
    heads : int
    segment, segments : int
        The segment that ends here, and how many there are.
    """

    rows: int
    kept_rows: int
    heads: int
    segment: int
    segments: int

    @property
    def name(self) -> str:
        """E.g. ``select_m128_to_104_h9_segment0``."""
        return f"select_m{self.rows}_to_{self.kept_rows}_h{self.heads}_segment{self.segment}"


def build_select(kernel: SelectKernel):
    """Return the kernel that chooses the rows of the largest importance, of equal ones the earlier.

    Position 0 and the prompt's last row always stay. Buffers, in order: importance float32 [M, H], summed over heads
    here; positions int32 [M]; lengths int32 [2 segments + 1]; chosen int32 [M'], the rows that stay, rising, then
    -1; kept_positions int32 [M'], theirs, then 0.
    """
    M, K, H, at = kernel.rows, kernel.kept_rows, kernel.heads, 2 * kernel.segment
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(kernel.name)
            T.func_attr({"global_symbol": kernel.name, "tirx.noalias": True})
            importance = T.arg("importance", T.buffer((M, H), "float32"))
            positions = T.arg("positions", T.buffer((M,), "int32"))
            lengths = T.arg("lengths", T.buffer((2 * kernel.segments + 1,), "int32"))
            chosen = T.arg("chosen", T.buffer((K,), "int32"))
            kept = T.arg("kept_positions", T.buffer((K,), "int32"))
            with task_loop("select", 1, [importance, positions, lengths], [chosen, kept]):
                scores = T.sblock_alloc_buffer((M,), "float32")
                # The rows chosen so far, and how many rows are better than the one looked at.
                counts = T.sblock_alloc_buffer((2,), "int32")
                _store_scores(importance, positions, lengths[at + 1], lengths[2 * kernel.segments], scores)
                with T.serial(K) as i:
                    T.buffer_store(chosen, tirx.const(-1, "int32"), [i])
                    T.buffer_store(kept, tirx.const(0, "int32"), [i])
                _choose(scores, lengths[at + 1], lengths[at + 3], positions, counts, chosen, kept)
    return builder.get()


def _store_scores(importance, positions, valid, ends_prompt, scores) -> None:
    """scores[m] = Σ_h importance[m, h], or more than any such sum."""
    M, H = (int(extent) for extent in importance.shape)
    with T.serial(M) as m, T.sblock("sum"):
        T.reads()
        T.writes()
        T.buffer_store(scores, importance[m, 0], [m])
        for h in range(1, H):
            T.buffer_store(scores, scores[m] + importance[m, h], [m])
        is_last = tirx.all(m == valid - 1, ends_prompt != 0)
        stays = tirx.any(positions[m] == 0, is_last)
        T.buffer_store(scores, T.Select(stays, float32(ABOVE_ALL), scores[m]), [m])


def _choose(scores, valid, keep, positions, counts, chosen, kept) -> None:
    """Keep every valid row that fewer than `keep` others are better than."""
    T.buffer_store(counts, tirx.const(0, "int32"), [0])
    with T.serial(valid) as m, T.sblock("choose"):
        T.reads()
        T.writes()
        T.buffer_store(counts, tirx.const(0, "int32"), [1])
        with T.serial(valid) as j:
            better = tirx.any(scores[j] > scores[m], tirx.all(scores[j] == scores[m], j < m))
            T.buffer_store(counts, counts[1] + T.Cast("int32", better), [1])
        with T.If(tirx.all(counts[1] < keep, counts[0] < int(chosen.shape[0]))), T.Then():
            T.buffer_store(chosen, m, [counts[0]])
            T.buffer_store(kept, positions[m], [counts[0]])
            T.buffer_store(counts, counts[0] + 1, [0])


def build_gather(rows: int, kept_rows: int, channels: int):
    """Return the kernel that copies chosen rows.

    Buffers, in order: x float32 [M, channels]; chosen int32 [M'], -1 for a row of zeros; out float32 [M', channels].
    """
    name = f"gather_m{rows}_to_{kept_rows}_k{channels}"
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            x = T.arg("x", T.buffer((rows, channels), "float32"))
            chosen = T.arg("chosen", T.buffer((kept_rows,), "int32"))
            out = T.arg("out", T.buffer((kept_rows, channels), "float32"))
            with task_loop("row", kept_rows, [x, chosen], [out]) as m:
                chunks, lanes = lane_chunks(channels)
                with T.serial(chunks) as c, T.vectorized(lanes) as j:
                    row = tirx.max(chosen[m], tirx.const(0, "int32"))
                    value = T.Select(chosen[m] >= 0, x[row, c * lanes + j], float32(0))
                    T.buffer_store(out, value, [m, c * lanes + j])
    return builder.get()


def build_places(rows: int, context: int):
    """Return the kernel that gives the rows of a call their places in the cache as positions.

    Buffers, in order: lengths int32 [2], of the segment; places int32 [M], below `context` for padding, too.
    """
    name = f"places_m{rows}_c{context}"
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            lengths = T.arg("lengths", T.buffer((2,), "int32"))
            places = T.arg("places", T.buffer((rows,), "int32"))
            with task_loop("places", 1, [lengths], [places]), T.serial(rows) as m:
                T.buffer_store(places, tirx.min(lengths[0] + m, tirx.const(context - 1, "int32")), [m])
    return builder.get()


def build_append_positions(rows: int, context: int):
    """Return the kernel that appends the positions of valid rows to those of the rows cached before.

    Buffers, in order: positions int32 [M]; lengths int32 [2], of the segment; key_positions int32 [context] (updated).
    """
    name = f"append_positions_m{rows}_c{context}"
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tirx.noalias": True})
            positions = T.arg("positions", T.buffer((rows,), "int32"))
            lengths = T.arg("lengths", T.buffer((2,), "int32"))
            key_positions = T.arg("key_positions", T.buffer((context,), "int32"))
            with task_loop("append", 1, [positions, lengths], [key_positions]), T.serial(lengths[1]) as m:
                T.buffer_store(key_positions, positions[m], [lengths[0] + m])
    return builder.get()
