"""Armv8.2 dot product: `sdot`, 16 signed products in one instruction.

Codes 0..15 are valid signed bytes, so 4-bit weights need no sign extension. In prefill they are unpacked into the
upper half of a byte, as 16 (q - 8), which takes one instruction for each nibble.
"""

import itertools

from agq_tvm.kernels.intrin.assembly import Assembly, Form, looped, registers, scale_loads
from agq_tvm.kernels.intrin.base import InstructionSet, Multiply
from agq_tvm.kernels.layout import Layout
from agq_tvm.tvm_seam import tirx


def sdot(total, weights, activations):
    """Add to int32x4 the products of two int8x16, four to a lane."""
    return tirx.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", total, weights, activations)


def _groups(form: Form) -> list[str]:
    """Sum a panel of groups, 4 rows by 2 vectors of 4 columns.

    v0-v7 dot products, v8-v15 float sums, v16-v19 weights, v20-v27 activations, v28-v31 their scales. Between groups
    weights and activations make room for factors.
    """
    lines = [f"ld1 {registers('4s', 8)}, [{{sums}}], #64", f"ld1 {registers('4s', 12)}, [{{sums}}]"]
    lines += [] if form.per_group else [f"movi v{i}.2d, #0" for i in range(8)]
    body = scale_loads(form, 4, 28) if form.per_group else []
    for group in range(form.unroll):
        if form.per_group:
            body += [f"ld1 {registers('4s', first)}, [{{magic}}]" for first in (0, 4)]
        for _ in range(form.blocks):
            body += _k_block()
        body += _scaled(group) if form.per_group else _scaled_by_differences()
    lines += [*looped(body), f"st1 {registers('4s', 12)}, [{{sums}}]", "sub {sums}, {sums}, #64"]
    return [*lines, f"st1 {registers('4s', 8)}, [{{sums}}]"]


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
    lines = [f"ld1 {registers('4s', 20)}, [{{factors}}]", f"ld1 {registers('4s', 24)}, [{{factors}}], #64"]
    lines.append("ldp q16, q17, [{factors}], #32")
    lines += [f"fmla v{20 + i}.4s, v{i}.4s, v{16 + i % 2}.4s" for i in range(8)]
    return lines + [f"fmla v{8 + i}.4s, v{20 + i}.4s, v{28 + i // 2}.s[{group}]" for i in range(8)]


def _scaled_by_differences() -> list[str]:
    lines = ["ldp q16, q17, [{factors}], #32", *(f"scvtf v{20 + i}.4s, v{i}.4s" for i in range(8))]
    return lines + [f"fmla v{8 + i}.4s, v{20 + i}.4s, v{16 + i % 2}.4s" for i in range(8)]


def _unpack() -> list[str]:
    """Turn nibbles into 16 (q - 8): two vectors of columns go to one call, two to the next."""
    lines = []
    for _ in range(4):
        lines.append(f"ld1 {registers('16b', 0)}, [{{packed}}], #64")
        lines += [f"eor v{v}.16b, v{v}.16b, v31.16b" for v in range(4)]
        for call, codes in enumerate(("codes", "next_codes")):
            for v in range(2):
                lines += [
                    f"shl v{4 + v}.16b, v{2 * call + v}.16b, #4",
                    f"and v{6 + v}.16b, v{2 * call + v}.16b, v30.16b",
                ]
            lines.append(f"st1 {registers('16b', 4)}, [{{{codes}}}], #64")
    return ["movi v30.16b, #0xf0", "movi v31.16b, #0x88", *looped(lines)]


def _factors(per_group: bool) -> list[tuple[str, int]]:
    return [*([("t", 0), ("t", 1)] * 2 if per_group else []), ("s", 0), ("s", 1)]


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
        code_scale=16,
        unpack=_unpack(),
        panel=2048,
        groups=(32, 64, 128),
        running=True,
        lines=_groups,
        factors=_factors,
    ),
)
