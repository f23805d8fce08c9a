"""Armv8.2 dot product: `sdot`, 16 signed products in one instruction.

Codes 0..15 are valid signed bytes, so 4-bit weights need no sign extension. In prefill they are unpacked into the
upper half of a byte, as 16 (q - 8), which takes one instruction for each nibble. Where sums run on from group to
group they are of q - 8, so that 2048 channels stay within 22 bits: 2048 * 8 * 127 = 2080768 < 2^22.
"""

import itertools

from agq_tvm.kernels.intrin import grid_assembly
from agq_tvm.kernels.intrin.assembly import Assembly, Form, looped, registers, sums_in_registers
from agq_tvm.kernels.intrin.base import InstructionSet, Multiply
from agq_tvm.kernels.layout import Layout
from agq_tvm.tvm_seam import tirx


def sdot(total, weights, activations):
    """Add to int32x4 the products of two int8x16, four to a lane."""
    return tirx.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", total, weights, activations)


def _groups(form: Form) -> list[str]:
    """Sum a panel of groups, 4 rows by 2 vectors of 4 columns.

    v0-v7 dot products, v8-v15 float sums, v16-v19 weights, v20-v27 activations, v28-v31 their scales, or v31 `MAGIC`.
    Between groups weights and activations make room for factors. Dot products start at `MAGIC`: anew for every group,
    or once where they run on.
    """
    return sums_in_registers(form, _k_block, _scaled, _scaled_by_differences)


def _k_block() -> list[str]:
    lines = [f"ld1 {registers('16b', 20)}, [{{x}}], #64", f"ld1 {registers('16b', 24)}, [{{x}}], {{stride}}"]
    for word in range(8):
        if word % 2 == 0:
            lines.append(f"ld1 {registers('16b', 16)}, [{{codes}}], #64")
        for r, v in itertools.product(range(4), range(2)):
            weights, activations = 16 + word % 2 * 2 + v, 20 + 2 * r + word // 4
            lines.append(f"sdot v{2 * r + v}.4s, v{weights}.16b, v{activations}.4b[{word % 4}]")
    return lines


def _scaled(group: int) -> list[str]:
    """Scale dot products, add them up and start the next ones; loads stand apart, as they take several slots."""
    dots = [f"fmla v{20 + i}.4s, v{i}.4s, v{16 + i % 2}.4s" for i in range(8)]
    sums = [f"fmla v{8 + i}.4s, v{20 + i}.4s, v{28 + i // 2}.s[{group}]" for i in range(8)]
    lines = ["ldp q16, q17, [{factors}], #32", f"ld1 {registers('4s', 20)}, [{{factors}}]", *dots[:4], sums[0]]
    lines += [f"ld1 {registers('4s', 24)}, [{{factors}}], #64", dots[4], f"ld1 {registers('4s', 0)}, [{{magic}}]"]
    return [*lines, *dots[5:], *sums[1:3], f"ld1 {registers('4s', 4)}, [{{magic}}]", *sums[3:]]


def _scaled_by_differences() -> list[str]:
    lines = ["ldp q16, q17, [{factors}], #32", *(f"fsub v{20 + i}.4s, v{i}.4s, v31.4s" for i in range(8))]
    return lines + [f"fmla v{8 + i}.4s, v{20 + i}.4s, v{16 + i % 2}.4s" for i in range(8)]


def _unpack(per_group: bool) -> list[str]:
    """Turn nibbles into 16 (q - 8), or q - 8: two vectors of columns go to one call, two to the next."""
    lines = []
    for _ in range(4):
        lines.append(f"ld1 {registers('16b', 0)}, [{{packed}}], #64")
        lines += [f"eor v{v}.16b, v{v}.16b, v31.16b" for v in range(4)]
        for call, codes in enumerate(("codes", "next_codes")):
            pairs = [(4 + v, 2 * call + v) for v in range(2)]
            lines += [f"shl v{low}.16b, v{v}.16b, #4" for low, v in pairs]
            if per_group:
                lines += [f"and v{low + 2}.16b, v{v}.16b, v30.16b" for low, v in pairs]
            else:
                lines += [f"sshr v{low}.16b, v{low}.16b, #4" for low, v in pairs]
                lines += [f"sshr v{low + 2}.16b, v{v}.16b, #4" for low, v in pairs]
            lines.append(f"st1 {registers('16b', 4)}, [{{{codes}}}], #64")
    return ["movi v30.16b, #0xf0", "movi v31.16b, #0x88", *looped(lines)]


def _factors(per_group: bool) -> list[tuple[str, int]]:
    return [("s", 0), ("s", 1), *([("t", 0), ("t", 1)] * 2 if per_group else [])]


DOTPROD = InstructionSet(
    name="dotprod",
    layout_4bit=Layout(bits=4, vectors=4, lanes=4, depth=4, zero=0),
    layout_8bit=Layout(bits=8, vectors=4, lanes=4, depth=4, zero=128),
    rows=4,
    tile_vectors=2,
    panel=2048,
    multiply_4bit=Multiply("sdot", sdot, by_lane=True, center=8),
    multiply_8bit=Multiply("sdot", sdot, by_lane=True),
    assembly=Assembly(
        rows=4,
        columns=8,
        chunk=8,
        code_scale=lambda per_group: 16 if per_group else 1,
        unpack=_unpack,
        panel=2048,
        groups=(32, 64, 128),
        running=True,
        lines=_groups,
        factors=_factors,
        grid=lambda unroll: grid_assembly.summed(unroll, _k_block),
        unpack_grid=lambda blocks: grid_assembly.unpacked(blocks, depth=4),
    ),
    grids=True,
)
