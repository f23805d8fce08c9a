"""AVX2: `vpmaddubsw`, 32 products of unsigned and signed bytes, summed in pairs into 16 bits.

4 bit: eight pairs stay in a 16-bit lane, 8 * 2 * 15 * 127 = 30480 < 2^15, one k-block of 32 channels; then
`vpmaddwd` with ones widens them. 8 bit: |w| * ±x keeps a pair within 2 * 128 * 127 = 32512, widened at once.
"""

from agq_tvm.kernels.intrin.base import InstructionSet, Multiply
from agq_tvm.kernels.layout import Layout
from agq_tvm.tvm_seam import T, tirx


def vpmaddubsw(unsigned, signed):
    """Multiply uint8x32 by int8x32 and add neighbours into int16x16."""
    return tirx.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", unsigned, signed)


def widen(pairs):
    """Add neighbours of int16x16 into int32x8."""
    ones = T.broadcast(T.int16(1), 16)
    return tirx.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", pairs, ones)


def multiply_8bit(total, weights, activations):
    """Add to int32x8 the products of two int8x32, four to a lane."""
    magnitude = tirx.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.psign.b", weights, weights)
    signed = tirx.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.psign.b", activations, weights)
    return total + widen(vpmaddubsw(magnitude, signed))


AVX2 = InstructionSet(
    name="avx2",
    layout_4bit=Layout(bits=4, vectors=4, lanes=8, depth=4, zero=0),
    layout_8bit=Layout(bits=8, vectors=4, lanes=8, depth=4, zero=128),
    rows=2,
    multiply_4bit=Multiply(
        "vpmaddubsw",
        lambda total, weights, activations: total + vpmaddubsw(weights, activations),
        total="int16",
        total_lanes=16,
        fold=widen,
    ),
    multiply_8bit=Multiply("vpmaddubsw", multiply_8bit),
    ahead=8,
)
