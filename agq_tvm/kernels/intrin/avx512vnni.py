"""AVX-512 VNNI: `vpdpbusd`, 64 products of unsigned weights and signed activations in one instruction.

Sums are int32 from the start: nothing overflows before 2^31 / (255 * 127) channels. Codes are unpacked in registers for
several rows, too: a shift and two masks take units that multiplies leave free, and nothing is stored. Their tiles have
8 sums, which stay in registers with as many in float32 when a group ends; 16 would not.

That is for Zen 4. A Xeon multiplies on two units, which shift, mask and convert, too, and each of them waits 5 cycles
for a sum: it wants 16 sums, codes that many rows share unpacked once, and weights fetched before they are asked for.
"""

from dataclasses import replace

from agq_tvm.kernels.intrin.base import InstructionSet, Multiply
from agq_tvm.kernels.layout import Layout
from agq_tvm.tvm_seam import tirx


def vpdpbusd(total, weights, activations):
    """Add to int32x16 (or x8) the products of uint8x64 and int8x64 (x32), four to a lane."""
    dtype = total.ty.dtype
    # LLVM 22 wants the byte operands as byte vectors, older ones as int32 lanes.
    name = f"llvm.x86.avx512.vpdpbusd.{32 * dtype.lanes}"
    return tirx.call_llvm_pure_intrin(dtype, name, total, weights, activations)


AVX512VNNI = InstructionSet(
    name="avx512vnni",
    layout_4bit=Layout(bits=4, vectors=4, lanes=16, depth=4, zero=0),
    layout_8bit=Layout(bits=8, vectors=4, lanes=16, depth=4, zero=0),
    rows=2,
    inline_rows=4,
    inline_tile=(8, 1),
    multiply_4bit=Multiply("vpdpbusd", vpdpbusd),
    multiply_8bit=Multiply("vpdpbusd", vpdpbusd),
    grids=True,
)

XEON = replace(
    AVX512VNNI, name="avx512vnni-xeon", inline_most=8, inline_tile=(8, 2), panel=256, ahead=8, seed_sums=True
)
"""The same weights and instructions in other tiles."""
