"""The two products of attention, for the (row, head) pairs of a task: queries by keys, and weights by values."""

from math import gcd

from agq_tvm.kernels.attention_form import AttentionKernel
from agq_tvm.kernels.attention_int8 import store_byte_sums, store_code_sums, store_int8_values
from agq_tvm.kernels.emit import LANES, float32
from agq_tvm.tvm_seam import T

MASKED = -1.0e30
_UNROLLED = 4
"""Channels of a key in one step of the loop over them."""


class Pairs:
    """The pairs of a task: rows from `row` on by some of the heads that share a KV head.

    Attributes
    ----------
    kernel : AttentionKernel
    decisions : dict
        See `agq_tvm.kernels.attention_space`.
    kv, row
        The KV head and the first row.
    at : list
        (m, h) of each pair.
    offsets : int32 buffer [P, 1] or None
        What int8 products take off their sums, see `store_query_offsets`.
    """

    def __init__(self, kernel: AttentionKernel, decisions: dict[str, int], group, row):
        """Take the pairs of `group`, of all groups of heads that go together."""
        self.kernel, self.decisions, self.row = kernel, decisions, row
        heads = decisions["heads"]
        self.kv = group if heads == kernel.shared else group // (kernel.shared // heads)
        self.at = [(row + p // heads, group * heads + p % heads) for p in range(decisions["rows"] * heads)]
        self.offsets = None

    @property
    def row_length(self) -> int:
        """Floats of a row of scores: an odd number of vectors, since rows that a power of two lies between share a
        cache's few places for it.
        """
        return (self.kernel.context // LANES | 1) * LANES


def store_scores(pairs: Pairs, blocks, queries: list, caches: dict, cached, alibi: list, scores) -> None:
    """scores[p, j] = q_p · k_j, masked beyond the row's own position; all pairs share a load of keys."""
    product = _float16_sums
    if pairs.kernel.int8:
        product = store_byte_sums if pairs.kernel.form.dot else store_code_sums
    with T.serial(blocks) as block, T.sblock("scores"):
        T.reads()
        T.writes()
        score_of = product(pairs, block, queries, caches)
        for p, (m, h) in enumerate(pairs.at):
            with T.vectorized(LANES) as j:
                key, row, score = block * LANES + j, cached + m, score_of(p, j)
                if alibi:
                    slopes, *positions = alibi
                    distance = positions[1][key] - positions[0][m] if positions else key - row
                    score = score + slopes[h] * T.Cast("float32", distance)
                T.buffer_store(scores, T.Select(key <= row, score, float32(MASKED)), [p, key])


def _float16_sums(pairs: Pairs, block, queries: list, caches: dict):
    """Emit q · k of a block of keys; return what gives the score of pair p and lane j."""
    kernel, keys, (q,) = pairs.kernel, caches["keys"], queries
    chains = pairs.decisions["chains"]
    sums = T.sblock_alloc_buffer((len(pairs.at), chains, LANES), "float32")
    each = [(p, m, h) for p, (m, h) in enumerate(pairs.at)]
    for p, _, _ in each:
        for c in range(chains):
            with T.vectorized(LANES) as j:
                T.buffer_store(sums, float32(0), [p, c, j])
    # Too many short steps for a processor to foresee the last one: it would start each block of keys anew.
    steps = gcd(kernel.head_dim, _UNROLLED)
    with T.serial(kernel.head_dim // steps) as step:
        for i in range(steps):
            d, c = step * steps + i, i % chains
            for p, m, h in each:
                with T.vectorized(LANES) as j:
                    key = T.Cast("float32", keys[pairs.kv, block, d, j])
                    T.buffer_store(sums, sums[p, c, j] + q[m, h, d] * key, [p, c, j])

    def score_of(p: int, j):
        total = sums[p, 0, j]
        for c in range(1, chains):
            total = total + sums[p, c, j]
        return total

    return score_of


def store_weighted_values(pairs: Pairs, end, values, scores, digits, norm, out) -> None:
    """out[m, h] = Σ_j weight_j · v_j · norm, a few channels at a time so that sums stay in registers."""
    if pairs.kernel.int8_values:
        store_int8_values(pairs, end, values, scores, digits, norm, out)
        return
    kernel, count = pairs.kernel, len(pairs.at)
    lanes = pairs.decisions["lanes"]
    with T.serial(kernel.head_dim // lanes) as chunk, T.sblock("values"):
        T.reads()
        T.writes()
        sums = T.sblock_alloc_buffer((count, lanes), "float32")
        for p in range(count):
            with T.vectorized(lanes) as d:
                T.buffer_store(sums, float32(0), [p, d])
        with T.serial(end) as j:
            for p in range(count):
                with T.vectorized(lanes) as d:
                    value = T.Cast("float32", values[pairs.kv, j, chunk * lanes + d])
                    T.buffer_store(sums, sums[p, d] + scores[p, j] * value, [p, d])
        for p, (m, h) in enumerate(pairs.at):
            with T.vectorized(lanes) as d:
                where = [m, h * kernel.head_dim + chunk * lanes + d]
                T.buffer_store(out, sums[p, d] * norm[p, 0], where)
