"""Armv8.2 dot product: `sdot`, 16 signed products in one instruction.

Codes 0..15 are valid signed bytes, so 4-bit weights need no sign extension.
"""

from agq_tvm.kernels.intrin.base import InstructionSet, Multiply
from agq_tvm.kernels.layout import Layout
from agq_tvm.tvm_seam import tirx


def sdot(total, weights, activations):
    """Add to int32x4 the products of two int8x16, four to a lane."""
    return tirx.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", total, weights, activations)


DOTPROD = InstructionSet(
    name="dotprod",
    layout_4bit=Layout(bits=4, vectors=4, lanes=4, depth=4, zero=0),
    layout_8bit=Layout(bits=8, vectors=4, lanes=4, depth=4, zero=128),
    rows=4,
    tile_vectors=2,
    panel=2048,
    multiply_4bit=Multiply("sdot", sdot, by_lane=True, center=8),
    multiply_8bit=Multiply("sdot", sdot, by_lane=True),
)
