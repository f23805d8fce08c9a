"""Armv8.0 NEON (Cortex-A72): `smull` and `smlal` into 16-bit lanes, and two multiplies for 4-bit activations.

Two channels of a column stand in neighbouring lanes. 4 bit: a lane sums 16 products in a k-block,
16 * 15 * 127 = 30480 < 2^15; then neighbours are added into 32 bits. 8 bit: they are added for each product.

4 x 4 bit, `NEON`: byte lanes, sixteen products in one `mul` or `mla`, where weights are unpacked for several rows; one
row takes `smlal`, which needs no more instructions there. 4 x 4 bit, `NEON_PAPER`: Algorithm 1 of the Agile-Quant
paper, two weights in one lane. All give the same integers, from the same weights.
"""

from dataclasses import replace

from agq_tvm.kernels.intrin.base import InstructionSet, Multiply
from agq_tvm.kernels.layout import Layout
from agq_tvm.tvm_seam import T, tirx


def fenced(vector):
    """Hide from LLVM where a vector of 16 bytes comes from, as int8x16; it costs no instruction.

    LLVM would halve what it sees to be a load or a broadcast, and fetch the upper halves with instructions of their
    own, where `smull2` and `smlal2` take them from the whole.
    """
    floats = tirx.reinterpret("float32x4", vector)
    floats = tirx.call_llvm_pure_intrin("float32x4", "llvm.arithmetic.fence", floats)
    return tirx.reinterpret("int8x16", floats)


def products(weights, activations):
    """Multiply two int8x16 (or codes 0..15) into int16x16; added to something, LLVM makes it `smlal`, `smlal2`."""
    return T.Cast("int16x16", fenced(weights)) * T.Cast("int16x16", fenced(activations))


def add_neighbours(values):
    """Add neighbouring lanes of int16x16 into int32x8."""
    halves = (T.vectorlow("int16x8", values), T.vectorhigh("int16x8", values))
    sums = [tirx.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", half) for half in halves]
    return T.vectorcombine("int32x8", *sums)


def byte_lanes(total, weights, activations):
    """Add to int16x8 the products of two pairs of int8x16: `mul`, `mla`, `sadalp`.

    A byte holds two products of weights -8..7 and activations -7..7: 2 * 8 * 7 = 112 <= 127, where an activation of
    -8 would make it 128. A lane of 16 bits takes 585 products of 56, and a k-block has 32.
    """
    (first, second), (x_first, x_second) = weights, activations
    pairs = first * x_first + second * x_second
    return total + tirx.call_llvm_pure_intrin("int16x8", "llvm.aarch64.neon.saddlp.v8i16.v16i8", pairs)


def packed_pairs(total, weights, activations):
    """Add to int32x4, two 16-bit sums in each, products of codes 0..15: Algorithm 1 of the paper.

    The weights of two neighbouring columns stand side by side, P = w1 * 256 + w0, and are multiplied by the
    activation that they share. w0 * x <= 15 * 15 = 225 < 256, so nothing is carried from one product into the other;
    P * x = w1x : w0x is spread to 0 : w1x : 0 : w0x and added. A sum of 16 bits takes 65535 // 225 = 291 products,
    and a k-block has 32.
    """
    columns, words = tirx.reinterpret("int8x16", weights), tirx.reinterpret("uint32x4", activations)
    shared = (T.bitwise_and(words, _all_lanes(255)), T.shift_right(words, _all_lanes(24)))
    for channel, x in enumerate(shared):
        # Bytes of the channel, of two columns in each lane of 32 bits; a lookup beyond the table gives 0.
        lookup = [index for j in range(0, 16, 4) for index in (j + channel, j + channel + 2, -1, -1)]
        index = tirx.Shuffle([tirx.const(i, "int8") for i in lookup], list(range(16)))
        pairs = tirx.call_llvm_pure_intrin("int8x16", "llvm.aarch64.neon.tbl1.v16i8", columns, index)
        product = tirx.reinterpret("uint32x4", pairs) * x
        product = T.bitwise_or(product, T.shift_left(product, _all_lanes(8)))
        total = total + T.bitwise_and(product, _all_lanes(0x00FF00FF))
    return total


def split_pairs(total, weight_sums):
    """Turn the sums of `packed_pairs` into int32x8, and activations + 8 back into activations.

    Σ W x = Σ W (x + 8) - 8 Σ W. The sums of the weights come in bytes: 16 * 15 = 240 < 256.
    """
    sums = tirx.call_llvm_pure_intrin("int16x8", "llvm.aarch64.neon.uaddlp.v8i16.v16i8", weight_sums)
    return T.Cast("int32x8", tirx.reinterpret("int16x8", total) - sums * T.broadcast(T.int16(8), 8))


def _all_lanes(value: int):
    return T.broadcast(T.uint32(value), 4)


NEON = InstructionSet(
    name="neon",
    layout_4bit=Layout(bits=4, vectors=4, lanes=8, depth=2, zero=0),
    layout_8bit=Layout(bits=8, vectors=4, lanes=8, depth=2, zero=128),
    rows=2,
    tile_vectors=4,
    panel=2048,
    multiply_4bit=Multiply(
        "smlal",
        lambda total, weights, activations: total + products(weights, activations),
        total="int16",
        total_lanes=16,
        fold=add_neighbours,
        by_lane=True,
        center=8,
    ),
    multiply_8bit=Multiply(
        "smull", lambda total, weights, activations: total + add_neighbours(products(weights, activations))
    ),
    multiply_4x4=Multiply(
        "mla",
        byte_lanes,
        total="int16",
        total_lanes=8,
        fold=lambda total: T.Cast("int32x8", total),
        halves=2,
        center=8,
        unroll=False,
    ),
)

NEON_PAPER = replace(
    NEON,
    name="neon-paper",
    multiply_4x4=Multiply("mul", packed_pairs, total="uint32", total_lanes=4, fold=split_pairs, offset=8, unroll=False),
)
"""The same weights and kernels, but 4-bit activations are multiplied as the paper does it."""
