"""What attention does with int8 caches, where it multiplies bytes or, where it cannot, the same integers as floats.

A score is (Σ q k) · s_q · s_k, with the sum over codes an integer below 2^24: multiply-adds of floats hold it exactly,
so it is the same on every instruction set. The scale of a token's values goes into its weight. Where bytes are
multiplied, a weight has 14 bits, of the largest one of its row, in two digits of 7; elsewhere it stays float.
"""

from agq_tvm.kernels.attention_form import DEPTH, ByteDot
from agq_tvm.kernels.emit import LANES, float32, lane_chunks, reduce_lanes
from agq_tvm.tvm_seam import T, tirx

_DIGIT = 128
_LARGEST = _DIGIT * _DIGIT - 1
_SMALLEST_PEAK = 1e-30


def _codes(dot: ByteDot, cache, where: list):
    """Load a register of codes as `dot` wants them."""
    width = dot.lanes * DEPTH
    codes = cache.vload(where, f"int8x{width}")
    if not dot.unsigned:
        return codes
    return T.bitwise_xor(tirx.reinterpret(f"uint8x{width}", codes), T.broadcast(T.uint8(128), width))


def _repeated(dot: ByteDot, buffer, where: list):
    """Load four bytes and repeat them in every lane."""
    word = tirx.reinterpret("int32", buffer.vload(where, f"int8x{DEPTH}"))
    return tirx.reinterpret(f"int8x{dot.lanes * DEPTH}", T.broadcast(word, dot.lanes))


def _as_floats(cache, where: list, byte: int):
    """Load sixteen words of int8 codes and return one code of each, float32x16."""
    words = tirx.reinterpret(f"int32x{LANES}", cache.vload(where, f"int8x{LANES * DEPTH}"))
    shifted = T.shift_left(words, T.broadcast(T.int32(24 - 8 * byte), LANES)) if byte < DEPTH - 1 else words
    return T.Cast(f"float32x{LANES}", T.shift_right(shifted, T.broadcast(T.int32(24), LANES)))


def store_byte_sums(pairs, block, queries: list, caches: dict):
    """Emit q · k of a block of keys by bytes; return what gives the score of pair p and lane j."""
    kernel, dot, (q, q_scales) = pairs.kernel, pairs.kernel.form.dot, queries
    sums = T.sblock_alloc_buffer((len(pairs.at), LANES), "int32")
    for p in range(len(pairs.at)):
        with T.vectorized(LANES) as j:
            T.buffer_store(sums, T.int32(0) if pairs.offsets is None else 0 - pairs.offsets[p, 0], [p, j])
    with T.serial(kernel.channels // DEPTH) as c:
        for first in range(0, LANES, dot.lanes):
            codes = _codes(dot, caches["keys"], [pairs.kv, block, c, first, 0])
            for p, (m, h) in enumerate(pairs.at):
                total = sums.vload([p, first], f"int32x{dot.lanes}")
                total = dot.accumulate(total, codes, _repeated(dot, q, [m, h, c * DEPTH]))
                T.buffer_store(sums, total, [p, T.ramp(first, 1, dot.lanes)])
    return _scaled(pairs, block, q_scales, caches, lambda p, j: T.Cast("float32", sums[p, j]))


def store_code_sums(pairs, block, queries: list, caches: dict):
    """Emit what `store_byte_sums` does with codes as floats."""
    kernel, (q, q_scales) = pairs.kernel, queries
    sums = T.sblock_alloc_buffer((len(pairs.at), LANES), "float32")
    for p in range(len(pairs.at)):
        with T.vectorized(LANES) as j:
            T.buffer_store(sums, float32(0), [p, j])
    with T.serial(kernel.channels // DEPTH) as c:
        for byte in range(DEPTH):
            codes = _as_floats(caches["keys"], [pairs.kv, block, c, 0, 0], byte)
            for p, (m, h) in enumerate(pairs.at):
                total = sums.vload([p, 0], f"float32x{LANES}")
                total = total + T.broadcast(q[m, h, c * DEPTH + byte], LANES) * codes
                T.buffer_store(sums, total, [p, T.ramp(0, 1, LANES)])
    return _scaled(pairs, block, q_scales, caches, lambda p, j: sums[p, j])


def _scaled(pairs, block, q_scales, caches: dict, sum_of):
    def score_of(p: int, j):
        m, h = pairs.at[p]
        return sum_of(p, j) * q_scales[m, h] * caches["key_scales"][pairs.kv, block * LANES + j]

    return score_of


def store_query_offsets(pairs, q):
    """Return 128 Σ q of each pair, int32 [P, 1], or None where codes are multiplied as they are."""
    dot = pairs.kernel.form.dot
    if not (dot and dot.unsigned):
        return None
    offsets = T.sblock_alloc_buffer((len(pairs.at), 1), "int32")
    total = T.sblock_alloc_buffer((dot.lanes,), "int32")
    every = T.ramp(0, 1, dot.lanes)
    for p, (m, h) in enumerate(pairs.at):
        T.buffer_store(total, T.broadcast(T.int32(0), dot.lanes), [every])
        with T.serial(pairs.kernel.channels // DEPTH) as c:
            zeros = T.broadcast(T.uint8(128), dot.lanes * DEPTH)
            value = dot.accumulate(total.vload([0], f"int32x{dot.lanes}"), zeros, _repeated(dot, q, [m, h, c * DEPTH]))
            T.buffer_store(total, value, [every])
        T.buffer_store(offsets, total[0], [p, 0])
    return offsets


def scale_weights(pairs, blocks, value_scales, scores, norm):
    """Multiply weights by the scales of their values; where bytes are multiplied, make digits of them.

    Returns
    -------
    tuple or None
        digits int8 [2, P, context], high ones first, and their sums int32 [2, P]; `norm` is in units of them then.
    """
    count, dot = len(pairs.at), pairs.kernel.form.dot
    if dot:
        digits = T.sblock_alloc_buffer((2, count, pairs.kernel.context), "int8")
        totals = T.sblock_alloc_buffer((2, count), "int32")
    for p in range(count):
        with T.sblock("scale_weights"):
            T.reads()
            T.writes()
            partial = T.sblock_alloc_buffer((LANES,), "float32")
            peak = T.sblock_alloc_buffer((1,), "float32")
            with T.vectorized(LANES) as j:
                T.buffer_store(partial, float32(_SMALLEST_PEAK), [j])
            with T.serial(blocks) as block, T.vectorized(LANES) as j:
                key = block * LANES + j
                T.buffer_store(scores, scores[p, key] * value_scales[pairs.kv, key], [p, key])
                if dot:
                    T.buffer_store(partial, tirx.max(partial[j], scores[p, key]), [j])
            if dot:
                reduce_lanes(partial, tirx.max, peak)
                _store_digits(p, blocks, scores, peak, digits, totals)
                T.buffer_store(norm, norm[p, 0] * (peak[0] / float32(_LARGEST)), [p, 0])
    return (digits, totals) if dot else None


def _store_digits(p: int, blocks, scores, peak, digits, totals) -> None:
    partial = T.sblock_alloc_buffer((2, LANES), "int32")
    total = T.sblock_alloc_buffer((1,), "int32")
    inverse = T.sblock_alloc_buffer((1,), "float32")
    T.buffer_store(inverse, float32(_LARGEST) / peak[0], [0])
    for digit in range(2):
        with T.vectorized(LANES) as j:
            T.buffer_store(partial, T.int32(0), [digit, j])
    with T.serial(blocks) as block:
        # Vectors by hand: of a vectorized loop with this body TVM makes scalars.
        weights = scores.vload([p, block * LANES], f"float32x{LANES}") * T.broadcast(inverse[0], LANES)
        code = T.Cast(f"int32x{LANES}", tirx.nearbyint(weights))
        high = T.shift_right(code, T.broadcast(T.int32(7), LANES))
        low = T.bitwise_and(code, T.broadcast(T.int32(_DIGIT - 1), LANES))
        for digit, value in enumerate((high, low)):
            where = [digit, p, T.ramp(block * LANES, 1, LANES)]
            T.buffer_store(digits, T.Cast(f"int8x{LANES}", value), where)
            total_so_far = partial.vload([digit, 0], f"int32x{LANES}")
            T.buffer_store(partial, total_so_far + value, [digit, T.ramp(0, 1, LANES)])
    for digit in range(2):
        T.buffer_store(total, partial[digit, 0], [0])
        for lane in range(1, LANES):
            T.buffer_store(total, total[0] + partial[digit, lane], [0])
        T.buffer_store(totals, total[0], [digit, p])


def store_int8_values(pairs, end, values, scores, digits, norm, out) -> None:
    """out[m, h] = Σ_j weight_j · v_j · norm for int8 values."""
    if pairs.kernel.form.dot:
        _byte_values(pairs, end, values, *digits, norm, out)
    else:
        _code_values(pairs, end, values, scores, norm, out)


def _byte_values(pairs, end, values, digits, totals, norm, out) -> None:
    kernel, dot, count = pairs.kernel, pairs.kernel.form.dot, len(pairs.at)
    vectors, width = kernel.channels // dot.lanes, pairs.decisions["lanes"] // dot.lanes
    with T.serial(vectors // width) as chunk, T.sblock("values"):
        T.reads()
        T.writes()
        sums = T.sblock_alloc_buffer((2, count, width * dot.lanes), "int32")
        each = [(digit, p, v * dot.lanes) for p in range(count) for digit in range(2) for v in range(width)]
        for digit, p, first in each:
            T.buffer_store(sums, T.broadcast(T.int32(0), dot.lanes), [digit, p, T.ramp(first, 1, dot.lanes)])
        with T.serial((end + (DEPTH - 1)) // DEPTH) as word:
            start = chunk * (width * dot.lanes)
            for digit, p, first in each:
                codes = _codes(dot, values, [pairs.kv, word, start + first, 0])
                total = sums.vload([digit, p, first], f"int32x{dot.lanes}")
                total = dot.accumulate(total, codes, _repeated(dot, digits, [digit, p, word * DEPTH]))
                T.buffer_store(sums, total, [digit, p, T.ramp(first, 1, dot.lanes)])

        def value(p: int, d):
            high, low = (
                T.Cast("float32", sums[digit, p, d] - (totals[digit, p] * 128 if dot.unsigned else 0))
                for digit in range(2)
            )
            return (high * float32(_DIGIT) + low) * norm[p, 0]

        _store_out(pairs, chunk * (width * dot.lanes), width * dot.lanes, value, out)


def _code_values(pairs, end, values, scores, norm, out) -> None:
    kernel, count = pairs.kernel, len(pairs.at)
    with T.serial(kernel.channels // LANES) as chunk, T.sblock("values"):
        T.reads()
        T.writes()
        sums = T.sblock_alloc_buffer((count, LANES), "float32")
        every = T.ramp(0, 1, LANES)
        for p in range(count):
            T.buffer_store(sums, T.broadcast(float32(0), LANES), [p, every])
        with T.serial((end + (DEPTH - 1)) // DEPTH) as word:
            for byte in range(DEPTH):
                codes = _as_floats(values, [pairs.kv, word, chunk * LANES, 0], byte)
                for p in range(count):
                    weight = T.broadcast(scores[p, word * DEPTH + byte], LANES)
                    T.buffer_store(sums, sums.vload([p, 0], f"float32x{LANES}") + weight * codes, [p, every])
        _store_out(pairs, chunk * LANES, LANES, lambda p, d: sums[p, d] * norm[p, 0], out)


def _store_out(pairs, first, width: int, value, out) -> None:
    """Store channels first..first + width of every pair, but for those that only fill up a vector."""
    D, (chunks, lanes) = pairs.kernel.head_dim, lane_chunks(width)
    for p, (m, h) in enumerate(pairs.at):
        if D % LANES == 0:
            with T.serial(chunks) as c, T.vectorized(lanes) as j:
                T.buffer_store(out, value(p, c * lanes + j), [m, h * D + first + c * lanes + j])
        else:
            with T.serial(width) as d, T.If(first + d < D), T.Then():
                T.buffer_store(out, value(p, d), [m, h * D + first + d])
