"""Armv8.0 NEON (Cortex-A72): `smull` and `smlal` into 16-bit lanes.

Two channels of a column stand in neighbouring lanes. 4 bit: a lane sums 16 products in a k-block,
16 * 15 * 127 = 30480 < 2^15; then neighbours are added into 32 bits. 8 bit: they are added for each product.
"""

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


NEON = InstructionSet(
    name="neon",
    layout_4bit=Layout(bits=4, vectors=4, lanes=8, depth=2, zero=0),
    layout_8bit=Layout(bits=8, vectors=4, lanes=8, depth=2, zero=128),
    rows=2,
    multiply_4bit=Multiply(
        "smlal",
        lambda total, weights, activations: total + products(weights, activations),
        total="int16",
        total_lanes=16,
        fold=add_neighbours,
    ),
    multiply_8bit=Multiply(
        "smull", lambda total, weights, activations: total + add_neighbours(products(weights, activations))
    ),
)
