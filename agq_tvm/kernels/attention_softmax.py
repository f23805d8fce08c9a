"""The softmax of attention, but for its division: weights, and one over what they add up to.

Weights are powers of two, 2^((score - maximum) log2 e): rounding to the exponent and the bits of a float take fewer
instructions than those of e^x for any x, and a difference is never above 0.
"""

from agq_tvm.kernels.emit import LANES, float32
from agq_tvm.tvm_seam import T, tirx

_ROW_REGISTERS = 96
"""Floats of registers for each row of scores: its sums and maximum, and what is on the way to a weight."""
_LOG2_E = 1.4426950408889634
_ROUNDING = 1.5 * 2.0**23
"""Floats from 2^23 to 2^24 have no fraction: adding this rounds to an integer, which the lowest bits then hold."""
_SMALLEST = -127.0
"""Below the exponents of floats: the bits of 1 with this in their exponent are those of 0."""
_POWERS = (
    1.326472731307149e-3,
    9.671512991189957e-3,
    5.550733581185341e-2,
    2.4022242426872253e-1,
    6.931470036506653e-1,
)
"""Of r, r^5 first, in 2^r for |r| <= 1/2, with 1 of r^0; least largest relative error, 1e-7."""


def store_softmax(pairs: int, sums: int, blocks, scores, norm) -> None:
    """Turn scores into e^(score - maximum), and store one over their sum.

    Parameters
    ----------
    pairs : int
        Rows of `scores`.
    sums : int
        Floats of running sums that stay in registers.
    blocks
        How many vectors of keys there are.
    scores : float32 buffer [pairs, context or more]
        `attention_products.MASKED` becomes 0.
    norm : float32 buffer [pairs, 1]
    """
    # What one row waits for is done for another, and a loop whose end no processor foresees ends once for them.
    together = sums // _ROW_REGISTERS
    for first in range(0, pairs, together):
        with T.sblock("softmax"):
            T.reads()
            T.writes()
            _store_rows(range(first, min(first + together, pairs)), blocks, scores, norm)


def _store_rows(rows: range, blocks, scores, norm) -> None:
    partial = T.sblock_alloc_buffer((len(rows), LANES), "float32")
    maximum = T.sblock_alloc_buffer((len(rows),), "float32")
    for i, p in enumerate(rows):
        with T.vectorized(LANES) as j:
            T.buffer_store(partial, scores[p, j], [i, j])
    with T.serial(blocks - 1) as block:
        for i, p in enumerate(rows):
            with T.vectorized(LANES) as j:
                T.buffer_store(partial, tirx.max(partial[i, j], scores[p, (block + 1) * LANES + j]), [i, j])
    for i in range(len(rows)):
        _reduce_halves(partial, i, tirx.max)
        T.buffer_store(maximum, partial[i, 0], [i])
        with T.vectorized(LANES) as j:
            T.buffer_store(partial, float32(0), [i, j])
    with T.serial(blocks) as block:
        for i, p in enumerate(rows):
            with T.vectorized(LANES) as j:
                key = block * LANES + j
                T.buffer_store(scores, _exp(scores[p, key] - maximum[i]), [p, key])
                T.buffer_store(partial, partial[i, j] + scores[p, key], [i, j])
    for i, p in enumerate(rows):
        _reduce_halves(partial, i, lambda a, b: a + b)
        T.buffer_store(norm, float32(1) / partial[i, 0], [p, 0])


def _exp(x):
    """Return e^x for float32 x of 0 or less, within 2e-7 of its size from e^-87 on; 0 from e^-88 down."""
    power = tirx.max(x * float32(_LOG2_E), float32(_SMALLEST))
    # TVM would take the sum and what is taken off it again for nothing.
    shifted = tirx.call_llvm_pure_intrin("float32", "llvm.arithmetic.fence", power + float32(_ROUNDING))
    r = power - (shifted - float32(_ROUNDING))
    value = float32(_POWERS[0])
    for coefficient in (*_POWERS[1:], 1.0):
        value = value * r + float32(coefficient)
    exponent = T.shift_left(tirx.reinterpret("int32", shifted), 23)
    return tirx.reinterpret("float32", tirx.reinterpret("int32", value) + exponent)


def _reduce_halves(partial, i: int, combine) -> None:
    """Combine the `LANES` values of row i of `partial` into its first, halves: few steps wait for others."""
    lanes = LANES // 2
    while lanes > 1:
        halves = (partial.vload([i, start], f"float32x{lanes}") for start in (0, lanes))
        T.buffer_store(partial, combine(*halves), [i, T.ramp(0, 1, lanes)])
        lanes //= 2
    T.buffer_store(partial, combine(partial[i, 0], partial[i, 1]), [i, 0])
