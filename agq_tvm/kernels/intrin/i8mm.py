"""Armv8.6 matrix multiply: `smmla`, two rows by two columns of 8 channels each, 32 signed products in one instruction.

A vector of the layout is two registers: four columns of 8 channels. Two rows of activations share a register as well,
and so do their sums with two columns. One row would leave half of an `smmla` unused; it takes `sdot`, which leaves two
sums for a column, added at the end of a k-block.
"""

import itertools
from dataclasses import replace

from agq_tvm.kernels.intrin import grid_assembly
from agq_tvm.kernels.intrin.assembly import Form, looped, registers, sums_in_registers
from agq_tvm.kernels.intrin.base import InstructionSet, Multiply
from agq_tvm.kernels.intrin.dotprod import DOTPROD, sdot
from agq_tvm.kernels.intrin.tensor_intrin import Tile, implementation
from agq_tvm.kernels.layout import Layout
from agq_tvm.tvm_seam import T, tirx


def sdot_pairs(total, weights, activations):
    """Add to int32x8, two sums for each of four columns, products of 32 codes and of 8 activations, repeated."""
    codes = tirx.reinterpret("int8x32", weights)
    halves = [sdot(half("int32x4", total), half("int8x16", codes), activations) for half in (T.vectorlow, T.vectorhigh)]
    return T.vectorcombine("int32x8", *halves)


def add_pairs(totals):
    """Add neighbouring lanes of int32x8 into int32x4."""
    halves = (T.vectorlow("int32x4", totals), T.vectorhigh("int32x4", totals))
    return tirx.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.addp.v4i32", *halves)


def smmla(total, weights, activations):
    """Add to int32x4, rows before columns, the products of two columns and two rows, int8x16 each."""
    return tirx.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.smmla.v4i32.v16i8", total, activations, weights)


def low_and_high(first, second, half: int):
    """Return the low (0) or high (1) halves of two registers, given as int64x2: `zip1` or `zip2`."""
    return tirx.Shuffle([first, second], [half, 2 + half])


def matrix_impl(tile: Tile, multiply: Multiply):
    """Implement `dot_desc` for pairs of rows of unpacked codes: totals of two rows by two columns in a register.

    They are c's in another order, both ways with one instruction for a register, and LLVM leaves out those that
    undo each other.
    """
    S, V = tile.layout.steps, tile.layout.vectors
    places = list(itertools.product(range(0, tile.rows, 2), range(V)))

    def as_halves(values):
        return tirx.reinterpret("int64x2", values)

    def load(c, totals):
        for r, v in places:
            both = [as_halves(c.vload([row, v, 0], "int32x4")) for row in (r, r + 1)]
            for p in range(2):
                value = tirx.reinterpret("int32x4", low_and_high(*both, p))
                T.buffer_store(totals, value, [r, v, p, slice(0, 4)])

    def multiply_step(x, w, totals, s, h):
        for r, v in places:
            both = [as_halves(x.vload([row, s, 0, 0], "int8x16")) for row in (r, r + 1)]
            activations = tirx.reinterpret("int8x16", low_and_high(*both, h))
            for p in range(2):
                weights = w.vload([s, h, v, 2 * p, 0], "int8x16")
                value = multiply.accumulate(totals.vload([r, v, p, 0], "int32x4"), weights, activations)
                T.buffer_store(totals, value, [r, v, p, slice(0, 4)])

    def store(c, totals):
        for r, v in places:
            both = [as_halves(totals.vload([r, v, p, 0], "int32x4")) for p in range(2)]
            for row in range(2):
                value = tirx.reinterpret("int32x4", low_and_high(*both, row))
                T.buffer_store(c, value, [r + row, v, slice(0, 4)])

    def products(x, w, c):
        totals = T.sblock_alloc_buffer((tile.rows, V, 2, 4), "int32")
        load(c, totals)
        for s, h in itertools.product(range(S), range(2)):
            multiply_step(x, w, totals, s, h)
        store(c, totals)

    return implementation(tile, products, own_totals=True)


def _groups(form: Form) -> list[str]:
    """Sum a panel of groups, 4 rows by 2 vectors of 4 columns.

    v0-v7 dot products of two rows by two columns, v8-v15 float sums of rows, v16-v19 and v24-v27 pairs of rows of
    activations, v20-v23 weights, v28-v31 activation scales, or v31 `MAGIC`. Between groups v16-v27 take factors.
    """
    return sums_in_registers(form, _k_block, _scaled, _scaled_by_differences)


def _k_block() -> list[str]:
    lines = []
    for first, step in ((24, "#64"), (16, "{stride}")):
        lines.append(f"ld1 {registers('16b', 20)}, [{{x}}], {step}")
        for s, h in itertools.product(range(2), range(2)):
            lines.append(f"zip{h + 1} v{first + 2 * s + h}.2d, v{20 + s}.2d, v{22 + s}.2d")
    for word in range(4):
        lines.append(f"ld1 {registers('16b', 20)}, [{{codes}}], #64")
        for pair, i in itertools.product(range(2), range(4)):
            activations = (24, 16)[pair] + word
            lines.append(f"smmla v{4 * pair + i}.4s, v{activations}.16b, v{20 + i}.16b")
    return lines


def _scaled(group: int) -> list[str]:
    """Put dot products in the order of rows, scale them, add them up and start the next ones."""
    lines = ["ldp q16, q17, [{factors}], #32", f"ld1 {registers('4s', 20)}, [{{factors}}]"]
    lines.append(f"ld1 {registers('4s', 24)}, [{{factors}}], #64")
    for pair, v in itertools.product(range(2), range(2)):
        first, even, odd = 4 * pair + 2 * v, 4 * pair + v, 4 * pair + 2 + v
        lines += [f"zip{half} v{to}.2d, v{first}.2d, v{first + 1}.2d" for half, to in ((1, 18 + v), (2, first + 1))]
        lines += [f"fmla v{20 + even}.4s, v{18 + v}.4s, v{16 + v}.4s"]
        lines += [f"fmla v{20 + odd}.4s, v{first + 1}.4s, v{16 + v}.4s"]
    sums = [f"fmla v{8 + i}.4s, v{20 + i}.4s, v{28 + i // 2}.s[{group}]" for i in range(8)]
    starts = [f"ld1 {registers('4s', first)}, [{{magic}}]" for first in (0, 4)]
    return [*lines, starts[0], *sums[:4], starts[1], *sums[4:]]


def _scaled_by_differences() -> list[str]:
    lines = ["ldp q16, q17, [{factors}], #32"]
    for pair, v, odd in itertools.product(range(2), range(2), range(2)):
        first, i = 4 * pair + 2 * v, 4 * pair + 2 * odd + v
        lines.append(f"zip{odd + 1} v{20 + i}.2d, v{first}.2d, v{first + 1}.2d")
    lines += [f"fsub v{20 + i}.4s, v{20 + i}.4s, v31.4s" for i in range(8)]
    return lines + [f"fmla v{8 + i}.4s, v{20 + i}.4s, v{16 + i % 2}.4s" for i in range(8)]


def _grid(unroll: int) -> list[str]:
    """Sum a panel of bytes; totals come in rows of 4 columns, and go as such."""
    before, after = [], []
    for pair, v, p in itertools.product(range(2), range(2), range(2)):
        even, odd, first = 8 + 4 * pair + v, 10 + 4 * pair + v, 4 * pair + 2 * v
        before.append(f"zip{p + 1} v{first + p}.2d, v{even}.2d, v{odd}.2d")
        after.append(f"zip{p + 1} v{(even, odd)[p]}.2d, v{first}.2d, v{first + 1}.2d")
    return grid_assembly.summed(unroll, _k_block, 8, before, after)


def _unpack(per_group: bool) -> list[str]:
    """Turn nibbles into 16 (q - 8), or q - 8: two vectors of columns go to one call, two to the next."""
    lines = []
    for codes in ("codes", "next_codes") * 2:
        lines.append(f"ld1 {registers('16b', 0)}, [{{packed}}], #64")
        lines += [f"eor v{v}.16b, v{v}.16b, v31.16b" for v in range(4)]
        lines += [f"shl v{4 + v}.16b, v{v}.16b, #4" for v in range(4)]
        if per_group:
            lines += [f"and v{v}.16b, v{v}.16b, v30.16b" for v in range(4)]
        else:
            lines += [f"sshr v{v}.16b, v{v}.16b, #4" for v in range(8)]
        lines += [f"st1 {registers('16b', first)}, [{{{codes}}}], #64" for first in (4, 0)]
    return ["movi v30.16b, #0xf0", "movi v31.16b, #0x88", *looped(lines)]


SDOT = Multiply("sdot", sdot_pairs, total="int32", total_lanes=8, fold=add_pairs, by_lane=True, center=8)

I8MM = InstructionSet(
    name="i8mm",
    layout_4bit=Layout(bits=4, vectors=4, lanes=4, depth=8, zero=0),
    layout_8bit=Layout(bits=8, vectors=4, lanes=4, depth=8, zero=128),
    rows=4,
    tile_vectors=2,
    panel=2048,
    multiply_4bit=SDOT,
    multiply_8bit=SDOT,
    multiply_pairs=Multiply("smmla", smmla, center=8, implement=matrix_impl),
    assembly=replace(
        DOTPROD.assembly,
        unpack=_unpack,
        lines=_groups,
        grid=_grid,
        unpack_grid=lambda blocks: grid_assembly.unpacked(blocks, depth=8),
    ),
    grids=True,
)
