"""AVX-VNNI: `vpdpbusd` in its VEX encoding, 32 products of unsigned weights and signed activations.

What AVX-512 VNNI does, in half as wide vectors and sixteen registers: Intel from Alder Lake on, AMD from Zen 5 on.
"""

from agq_tvm.kernels.intrin.base import InstructionSet, Multiply
from agq_tvm.kernels.layout import Layout
from agq_tvm.tvm_seam import tirx


def vpdpbusd(total, weights, activations):
    """Add to int32x8 the products of uint8x32 and int8x32, four to a lane."""
    # LLVM has one intrinsic for both encodings; it takes VEX where AVX-512 is not to be used.
    return tirx.call_llvm_pure_intrin("int32x8", "llvm.x86.avx512.vpdpbusd.256", total, weights, activations)


AVXVNNI = InstructionSet(
    name="avxvnni",
    layout_4bit=Layout(bits=4, vectors=4, lanes=8, depth=4, zero=0),
    layout_8bit=Layout(bits=8, vectors=4, lanes=8, depth=4, zero=0),
    rows=2,
    multiply_4bit=Multiply("vpdpbusd", vpdpbusd),
    multiply_8bit=Multiply("vpdpbusd", vpdpbusd),
)
