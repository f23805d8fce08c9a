"""AVX-VNNI: `vpdpbusd` in its VEX encoding, 32 products of unsigned weights and signed activations.

What AVX-512 VNNI does, in half as wide vectors and sixteen registers: Intel from Alder Lake on, AMD from Zen 5 on.
LLVM has one intrinsic for both encodings; it takes VEX where AVX-512 is not to be used.
"""

from agq_tvm.kernels.intrin.avx512vnni import vpdpbusd
from agq_tvm.kernels.intrin.base import InstructionSet, Multiply
from agq_tvm.kernels.layout import Layout

AVXVNNI = InstructionSet(
    name="avxvnni",
    layout_4bit=Layout(bits=4, vectors=4, lanes=8, depth=4, zero=0),
    layout_8bit=Layout(bits=8, vectors=4, lanes=8, depth=4, zero=0),
    rows=2,
    multiply_4bit=Multiply("vpdpbusd", vpdpbusd),
    multiply_8bit=Multiply("vpdpbusd", vpdpbusd),
    ahead=8,
    grids=True,
)
