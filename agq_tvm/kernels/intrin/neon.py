"""Armv8.0 NEON (Cortex-A72): `smull` and `smlal` into 16-bit lanes, and two multiplies for 4-bit activations.

Two channels of a column stand in neighbouring lanes. 4 bit: a lane sums 16 products in a k-block,
16 * 15 * 127 = 30480 < 2^15; then neighbours are added into 32 bits. 8 bit: they are added for each product.

4 x 4 bit, `NEON`: byte lanes, sixteen products in one `mul` or `mla`, where weights are unpacked for several rows; one
row takes `smlal`, which needs no more instructions there. 4 x 4 bit, `NEON_PAPER`: Algorithm 1 of the Agile-Quant
paper, two weights in one lane. All give the same integers, from the same weights.
"""

import itertools
from dataclasses import replace

from agq_tvm.kernels.intrin.assembly import Assembly, Form, looped, registers, scale_loads
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


def _groups(form: Form) -> list[str]:
    """Sum a panel of groups of 32 channels, 2 rows by 4 vectors of 8 columns; float sums stay in memory.

    v0-v15 sums of 16 bits, two registers for each row and vector; v16-v19 weights, v20 and v21 repeated activations,
    v24-v27 activations, v28 and v29 their scales. After a group v16-v27 take factors and sums.
    """
    lines = scale_loads(form, 2, 28) if form.per_group else []
    for group in range(form.unroll):
        lines += _k_block()
        for half in range(2):
            lines += _scaled(half, group) if form.per_group else _converted(half)
        lines.append("sub {sums}, {sums}, #256")
    return looped(lines)


def _k_block() -> list[str]:
    lines = [f"ld1 {registers('16b', 24)}, [{{x}}], {{stride}}"]
    for word in range(16):
        operation = "smlal" if word else "smull"
        lines.append(f"ld1 {registers('16b', 16)}, [{{codes}}], #64")
        lines += [f"dup v{20 + r}.8h, v{24 + 2 * r + word // 8}.h[{word % 8}]" for r in range(2)]
        for r, v in itertools.product(range(2), range(4)):
            total, weights = 8 * r + 2 * v, 16 + v
            lines.append(f"{operation} v{total}.8h, v{weights}.8b, v{20 + r}.8b")
            lines.append(f"{operation}2 v{total + 1}.8h, v{weights}.16b, v{20 + r}.16b")
    return lines


def _scaled(half: int, group: int) -> list[str]:
    """Scale the sums of 16 columns, of both rows; those of 16 bits make room for the second factors."""
    lines = [f"ld1 {registers('4s', 20)}, [{{factors}}], #64"]
    for r in range(2):
        first, step = 8 * r + 4 * half, ", #64" if r else ""
        lines.append(f"ld1 {registers('4s', 16)}, [{{magic}}]")
        lines += [f"sadalp v{16 + i}.4s, v{first + i}.8h" for i in range(4)]
        lines += [f"ld1 {registers('4s', first)}, [{{factors}}]{step}", f"ld1 {registers('4s', 24)}, [{{sums}}]"]
        lines += [f"fmla v{first + i}.4s, v{16 + i}.4s, v{20 + i}.4s" for i in range(4)]
        lines += [f"fmla v{24 + i}.4s, v{first + i}.4s, v{28 + r}.s[{group}]" for i in range(4)]
        lines.append(f"st1 {registers('4s', 24)}, [{{sums}}], #64")
    return lines


def _converted(half: int) -> list[str]:
    lines = [f"ld1 {registers('4s', 20)}, [{{factors}}], #64"]
    for r in range(2):
        first = 8 * r + 4 * half
        lines += [f"saddlp v{16 + i}.4s, v{first + i}.8h" for i in range(4)]
        lines += [f"scvtf v{16 + i}.4s, v{16 + i}.4s" for i in range(4)]
        lines.append(f"ld1 {registers('4s', 24)}, [{{sums}}]")
        lines += [f"fmla v{24 + i}.4s, v{16 + i}.4s, v{20 + i}.4s" for i in range(4)]
        lines.append(f"st1 {registers('4s', 24)}, [{{sums}}], #64")
    return lines


def _groups_4x4(form: Form) -> list[str]:
    """Sum a panel of groups of 32 channels for 4-bit activations, in byte lanes as `byte_lanes` does.

    v0-v7 sums of 16 bits, v8-v11 products, v12 `MAGIC`, v14 and v15 scales of activations, v16-v23 weights, v24-v27
    repeated activations, v28-v31 activations.
    """
    lines = scale_loads(form, 2, 14) if form.per_group else []
    for group in range(form.unroll):
        lines += _k_block_4x4()
        for half in range(2):
            lines += _scaled_4x4(form, half, group)
        lines.append("sub {sums}, {sums}, #256")
    return ["ldr q12, [{magic}]", *looped(lines)]


def _k_block_4x4() -> list[str]:
    lines = [f"ld1 {registers('16b', 28)}, [{{x}}], {{stride}}"]
    for step in range(8):
        lines += [f"ld1 {registers('16b', first)}, [{{codes}}], #64" for first in (16, 20)]
        for r, half in itertools.product(range(2), range(2)):
            word = 2 * step + half
            lines.append(f"dup v{24 + 2 * r + half}.8h, v{28 + 2 * r + word // 8}.h[{word % 8}]")
        for r in range(2):
            first, second, add = 24 + 2 * r, 25 + 2 * r, "sadalp" if step else "saddlp"
            lines += [f"mul v{8 + v}.16b, v{16 + v}.16b, v{first}.16b" for v in range(4)]
            lines += [f"mla v{8 + v}.16b, v{20 + v}.16b, v{second}.16b" for v in range(4)]
            lines += [f"{add} v{4 * r + v}.8h, v{8 + v}.16b" for v in range(4)]
    return lines


def _scaled_4x4(form: Form, half: int, group: int) -> list[str]:
    """Scale the sums of 16 columns, of both rows."""
    lines = [f"ld1 {registers('4s', 20)}, [{{factors}}], #64"]
    for r in range(2):
        total = 4 * r + 2 * half
        for v in range(2):
            lines.append(f"saddw v{16 + 2 * v}.4s, v12.4s, v{total + v}.4h")
            lines.append(f"saddw2 v{17 + 2 * v}.4s, v12.4s, v{total + v}.8h")
        lines.append(f"ld1 {registers('4s', 28)}, [{{sums}}]")
        if form.per_group:
            lines.append(f"ld1 {registers('4s', 24)}, [{{factors}}]{', #64' if r else ''}")
            lines += [f"fmla v{24 + i}.4s, v{16 + i}.4s, v{20 + i}.4s" for i in range(4)]
            lines += [f"fmla v{28 + i}.4s, v{24 + i}.4s, v{14 + r}.s[{group}]" for i in range(4)]
        else:
            lines += [f"fsub v{16 + i}.4s, v{16 + i}.4s, v12.4s" for i in range(4)]
            lines += [f"fmla v{28 + i}.4s, v{16 + i}.4s, v{20 + i}.4s" for i in range(4)]
        lines.append(f"st1 {registers('4s', 28)}, [{{sums}}], #64")
    return lines


def _unpack(_per_group: bool) -> list[str]:
    """Turn nibbles into q - 8."""
    lines = []
    for _ in range(8):
        lines.append(f"ld1 {registers('16b', 0)}, [{{packed}}], #64")
        lines += [f"eor v{v}.16b, v{v}.16b, v31.16b" for v in range(4)]
        lines += [f"shl v{4 + v}.16b, v{v}.16b, #4" for v in range(4)]
        lines += [f"sshr v{4 + v}.16b, v{4 + v}.16b, #4" for v in range(4)]
        lines += [f"sshr v{8 + v}.16b, v{v}.16b, #4" for v in range(4)]
        lines += [f"st1 {registers('16b', first)}, [{{codes}}], #64" for first in (4, 8)]
    return ["movi v31.16b, #0x88", *looped(lines)]


def _factors(per_group: bool) -> list[tuple[str, int]]:
    halves = (range(4), range(4, 8))
    return [(kind, i) for half in halves for kind in ("st" if per_group else "s") for i in half]


_ASSEMBLY = Assembly(
    rows=2,
    columns=32,
    chunk=16,
    code_scale=lambda per_group: 1,
    unpack=_unpack,
    panel=512,
    groups=(32,),
    running=False,
    lines=_groups,
    factors=_factors,
)

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
    assembly=_ASSEMBLY,
    assembly_4x4=replace(_ASSEMBLY, lines=_groups_4x4),
)

NEON_PAPER = replace(
    NEON,
    name="neon-paper",
    assembly_4x4=None,
    multiply_4x4=Multiply("mul", packed_pairs, total="uint32", total_lanes=4, fold=split_pairs, offset=8, unroll=False),
)
"""The same weights and kernels, but 4-bit activations are multiplied as the paper does it."""
