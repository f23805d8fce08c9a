"""What attention with log2 probabilities adds to `attention.py`: probabilities as powers of two, values as int8.

A code c of the checkpoint's book stands for 2^-c, and the sum of values is Σ_k v_k · 2^-c_k, which is the paper's
Σ_k v_k << (15 - c_k) in units of 2^-15. Those integers stay below 2^24 (`quantize.log2.weighted_sums` proves it), so
float32 adds them exactly, in any order, and one multiply-add does what a shift, a mask for zero and an add would:
the sums are the integer ones bit for bit. Only the scale of the values, at the end, rounds.
"""

from agq_tvm.kernels.emit import LANES, float32, reduce_lanes
from agq_tvm.quantize.codebooks import FRACTION_BITS, VALUE_LIMIT, CodeBook
from agq_tvm.tvm_seam import T, tirx

_EXPONENT_MASK = 0x7F800000
# Added to the bits of a float it carries into the exponent where the fraction is above √2: rounds log2 to nearest.
_ABOVE_SQRT2 = 0x00800000 - 0x003504F4


def value_code(value, scale):
    """Quantize a float32 value to int8: round half to even of value / scale, clipped to -127..127."""
    code = tirx.nearbyint(value * (float32(1) / scale))
    limit = float32(VALUE_LIMIT)
    return T.Cast("int8", tirx.max(tirx.min(code, limit), float32(0) - limit))


def round_probabilities(book: CodeBook, pairs: int, kv, blocks, scores, norm, value_scale) -> None:
    """Turn e^(score - maximum) into powers of two or 0, and the norm into what makes outputs of their sums.

    Parameters
    ----------
    book : CodeBook
    pairs : int
        Rows of `scores`.
    kv, blocks
        The KV head, and how many vectors of keys there are.
    scores : float32 buffer [pairs, context]
        0 where masked.
    norm : float32 buffer [pairs, 1]
        One over the sum of `scores`.
    value_scale : float32 buffer [KV]
    """
    smallest = float32(2.0**-book.largest)
    for p in range(pairs):
        with T.sblock("round_probabilities"):
            T.reads()
            T.writes()
            partial = T.sblock_alloc_buffer((LANES,), "float32")
            result = T.sblock_alloc_buffer((1,), "float32")
            if book.relative:
                T.buffer_store(norm, _power_above(norm[p, 0]), [p, 0])
            with T.vectorized(LANES) as j:
                T.buffer_store(partial, float32(0), [j])
            with T.serial(blocks) as block, T.vectorized(LANES) as j:
                where = [p, block * LANES + j]
                power = _nearest_power(scores[p, block * LANES + j] * norm[p, 0])
                T.buffer_store(scores, T.Select(power >= smallest, power, float32(0)), where)
                T.buffer_store(partial, partial[j] + scores[p, block * LANES + j], [j])
            scale = value_scale[kv]
            if book.relative:
                reduce_lanes(partial, lambda a, b: a + b, result)
                # Of all zeros, where every probability is small, comes 0.
                scale = scale / tirx.max(result[0], float32(2.0**-FRACTION_BITS))
            T.buffer_store(norm, scale, [p, 0])


def _nearest_power(x):
    """Return the power of two whose logarithm is nearest to that of x, a float32 of 0 or more; 0 for small ones."""
    bits = tirx.reinterpret("int32", x) + _ABOVE_SQRT2
    return tirx.reinterpret("float32", T.bitwise_and(bits, _EXPONENT_MASK))


def _power_above(x):
    """Return the smallest power of two that is x or more, for 0 < x <= 1: 2^-floor(log2 1/x)."""
    bits = tirx.reinterpret("int32", x) + 0x007FFFFF
    return tirx.reinterpret("float32", T.bitwise_and(bits, _EXPONENT_MASK))
