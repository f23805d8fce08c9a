"""How an instruction set is described: its layouts, its multiplies, and codes and totals as every kernel sees them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from agq_tvm.kernels.intrin.assembly import Assembly
from agq_tvm.kernels.layout import K_BLOCK, Layout
from agq_tvm.tvm_seam import T

ACTIVATION_LIMIT = 127
"""Activation codes are -127..127: intrinsics that sum in 16 bits count on it."""


@dataclass(frozen=True)
class Multiply:
    """How an instruction set multiplies a vector of codes with broadcast activations and sums.

    Attributes
    ----------
    instruction : str
        The multiply that must be found in the disassembly.
    accumulate : callable
        ``f(total, weights, activations) -> total``, all vector expressions: weights and activations have
        ``lanes * depth`` bytes, totals one value for each lane.
    total, total_lanes : str, int
        Type of the running totals inside a k-block, where it is not ``int32`` x `lanes`: ``"int16"`` if the
        products of 32 channels fit.
    fold : callable or None
        Turns the totals of a k-block into ``int32x{lanes}``; needed where they are not that already.
    halves : int
        2 if `accumulate` takes both halves of a step at once: its weights and activations are then pairs.
    center : int
        What `accumulate` wants subtracted from 4-bit codes 0..15 when they are unpacked: with 8 it gets int8 -8..7.
        The sums of the activations make up for it outside, where the product's definition has them anyway.
    offset : int
        What `accumulate` wants added to activations, to have them unsigned. `fold` then takes a second operand,
        the sums of the weights, ``uint8x{lanes * depth}``, and subtracts `offset` times them.
    unroll : bool
        Whether the steps of a k-block are unrolled. LLVM moves many small instructions of an unrolled block apart
        until it runs out of registers; a loop keeps them together.
    by_lane : bool
        Whether activations are read 16 bytes at a time and repeated from a lane: `sdot` does that itself, and
        a broadcast from memory would need an address for each step. Otherwise they are broadcast from memory.
    implement : callable or None
        Takes the place of `tensor_intrin.dot_impl`, with its arguments, where vectors of totals are not those of a row.
    """

    instruction: str
    accumulate: Callable[[Any, Any, Any], Any]
    total: str = "int32"
    total_lanes: int = 0
    fold: Callable[..., Any] | None = None
    halves: int = 1
    center: int = 0
    offset: int = 0
    unroll: bool = True
    by_lane: bool = False
    implement: Callable[..., Any] | None = None


@dataclass(frozen=True)
class InstructionSet:
    """The dot products of one instruction set.

    Attributes
    ----------
    name : str
        As device files write it.
    layout_4bit, layout_8bit : Layout
        How weights and tables are packed for it: the same for every kernel and schedule.
    rows : int
        Rows of the register tile in prefill.
    inline_rows : int
        The same for integer products, if these unpack codes in registers wherever they are multiplied, for several
        rows, too; 0 where codes are unpacked once for all rows.
    inline_most : int
        Rows up to which 4-bit codes are unpacked like this, and 8-bit ones never, where that is not for any number: 0.
    inline_tile : tuple of int or None
        Rows and vectors of columns of the register tile of 4-bit products in groups that unpack codes like this; where
        rows are fewer, vectors are more. None for `inline_rows` and the vectors of the layout.
    multiply_4bit, multiply_8bit : Multiply or None
        For weights of 4 and 8 bits and activations -127..127. None leaves the loops to LLVM.
    multiply_4x4 : Multiply or None
        For 4-bit weights and activations -7..7. Where it is None they take `multiply_4bit`, whose range holds them;
        so do packed codes if it has a `center`, which would have to be subtracted whenever they are read.
    multiply_pairs : Multiply or None
        For an even number of rows of a register tile, weights of 4 and 8 bits one to a byte. The `center` is that of
        `multiply_4bit`.
    tile_vectors : int
        Vectors of the register tile in prefill; 0 for those of the layout.
    panel : int
        Channels that a register tile goes through with its sums in registers; their codes are unpacked together.
    assembly : Assembly or None
        Prefill's inner loop for 4-bit weights and activations -127..127, where it is written in assembly.
    assembly_4x4 : Assembly or None
        That for activations -7..7, where `multiply_4x4` is not None; else they take `assembly`.
    seed_sums : bool
        Whether integer sums of a group of codes that are unpacked once start at what the `center` adds to them and, if
        activations have a scale for each group, at the bits of `assembly.MAGIC`: that saves the additions and
        conversions of its end, where these take the units of multiplies.
    ahead : int
        K-blocks between the one that is multiplied and the one that is fetched from memory, by default, where codes are
        unpacked in registers; 0 leaves that to the processor.
    grids : bool
        Whether bytes are multiplied as fast as 4-bit codes, so that weights on an integer grid have kernels of their
        own (`linear_grid.py`).
    """

    name: str
    layout_4bit: Layout
    layout_8bit: Layout
    rows: int
    multiply_4bit: Multiply | None = None
    multiply_8bit: Multiply | None = None
    multiply_4x4: Multiply | None = None
    multiply_pairs: Multiply | None = None
    tile_vectors: int = 0
    panel: int = K_BLOCK
    assembly: Assembly | None = None
    assembly_4x4: Assembly | None = None
    inline_rows: int = 0
    inline_most: int = 0
    inline_tile: tuple[int, int] | None = None
    seed_sums: bool = False
    ahead: int = 0
    grids: bool = False

    @property
    def family(self) -> str:
        """Name without what follows a dash: sets of a family have the same registers and layouts."""
        return self.name.partition("-")[0]

    @property
    def product_rows(self) -> int:
        """Rows of the register tile of integer products in prefill."""
        return self.inline_rows or self.rows

    def inlines(self, rows: int) -> bool:
        """Whether so many rows of codes have 4-bit weights unpacked in registers, wherever these are multiplied."""
        return self.inline_rows > 0 and (not self.inline_most or rows <= self.inline_most)

    def layout(self, bits: int) -> Layout:
        """Return the packed layout for 4 or 8 bits."""
        return self.layout_4bit if bits == 4 else self.layout_8bit

    def multiply(self, bits: int, activation_bits: int, packed: bool, rows: int = 1) -> Multiply | None:
        """Return the multiply for weights and activations of 4 or 8 bits, weights two to a byte or unpacked."""
        if self.multiply_pairs and not packed and rows % 2 == 0:
            return self.multiply_pairs
        if bits == 8:
            return self.multiply_8bit
        narrow = self.multiply_4x4 if activation_bits == 4 else None
        return self.multiply_4bit if narrow is None or (packed and narrow.center) else narrow

    def tile(self, bits: int, packed: bool) -> Layout:
        """Return the weights of a register tile: unpacked codes may have fewer vectors than a tile of columns."""
        layout = self.layout(bits)
        return layout if packed or bits == 8 or not self.tile_vectors else replace(layout, vectors=self.tile_vectors)

    def center(self, bits: int, activation_bits: int, packed: bool) -> int:
        """Return what is subtracted from codes when they are unpacked; those multiplied as they are stored keep it."""
        multiply = self.multiply(bits, activation_bits, packed)
        return multiply.center if multiply and bits == 4 and not packed else 0


def stored_dtype(layout: Layout, center: int = 0) -> str:
    """Type of one stored code, less `center`, when it has a byte of its own."""
    return "int8" if layout.zero or center else "uint8"


def nibble(byte, half, layout: Layout, center: int = 0):
    """Extract a 4-bit code from a byte: half 0 is the low nibble, 1 the high one.

    Unsigned layouts give 0..15 as uint8 or, less a `center`, as int8; signed ones give -8..7 as int8.
    """
    shift = T.Cast("uint8", half * 4)
    if layout.zero == 0:
        code = T.bitwise_and(T.shift_right(byte, shift), T.uint8(15))
        return T.Cast("int8", code) - T.int8(center) if center else code
    return T.shift_right(T.Cast("int8", T.shift_left(byte, T.uint8(4) - shift)), T.int8(4))


def shifted_before(total, bits, first):
    """Return what a product is added to: the total, shifted left where the first product of a k-block comes."""
    return T.Select(first, T.shift_left(total, bits), total)
