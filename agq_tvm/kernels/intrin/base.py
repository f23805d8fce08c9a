"""What the intrinsics of every instruction set share: their specification, their bounds, their names."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from agq_tvm.kernels.intrin.assembly import Assembly
from agq_tvm.kernels.layout import K_BLOCK, Layout
from agq_tvm.tvm_seam import IRBuilder, T, TensorIntrin, tirx

ACTIVATION_LIMIT = 127
"""Activation codes are -127..127: intrinsics that sum in 16 bits count on it."""
_LINE = 64
_WORDS = {2: "int16", 4: "int32", 8: "int64"}
"""Types that hold so many codes."""


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
        Takes the place of `dot_impl`, with the same arguments, where vectors of totals are not those of a row.
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
    inline_sums : int
        Vectors of sums of 4-bit products in groups that unpack codes like this: as many rows, and more than one vector
        of columns only where rows are fewer. 0 for `inline_rows` and the vectors of the layout.
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
    inline_sums: int = 0

    @property
    def product_rows(self) -> int:
        """Rows of the register tile of integer products in prefill."""
        return self.inline_rows or self.rows

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


@dataclass(frozen=True)
class Tile:
    """A register tile: some rows by some vectors of columns by one k-block.

    Attributes
    ----------
    rows : int
        R.
    layout : Layout
        Its weights, where their vectors stand side by side.
    packed : bool
        Whether two 4-bit codes share a byte; unpacked codes have one each.
    center : int
        What was subtracted from unpacked codes.
    shifted : bool
        Whether totals are shifted left before the k-block's products are added.
    stored : int
        Vectors that the packed layout has side by side, where that are more than those of the tile; else 0.
    ahead : int
        K-blocks between the one that is multiplied and the one that is fetched from memory; 0 fetches none.
    """

    rows: int
    layout: Layout
    packed: bool
    center: int = 0
    shifted: bool = False
    stored: int = 0
    ahead: int = 0

    @property
    def name(self) -> str:
        """The last words of the intrinsic's name, e.g. ``packed.m1``."""
        parts = ["packed" if self.packed else "bytes", f"m{self.rows}"]
        parts += [f"of{self.stored}"] if self.stored else []
        return ".".join([*parts, *([f"ahead{self.ahead}"] if self.ahead else [])])


def tile_signature(tile: Tile):
    """Declare the operands of a tile: R rows by one tile of columns by one k-block.

    Buffers: x int8 [R, S, 2, D]; w [S, V, L, D] nibbles, or [S, 2, V, L, D] bytes (signed where a center was
    subtracted); if `shifted` d int32 [1], else None; c int32 [R, V, L].
    Without the dimension of rows for R = 1: TVM drops loops of one round before it compares.
    """
    layout = tile.layout
    S, D, V, L = layout.steps, layout.depth, layout.vectors, layout.lanes
    lead = () if tile.rows == 1 else (tile.rows,)
    w_shape, w_dtype = (S, 2, V, L, D), stored_dtype(layout, tile.center)
    if tile.packed:
        w_shape, w_dtype = (S, V, L, D), "uint8"
    forms = {"x": ((*lead, S, 2, D), "int8"), "w": (w_shape, w_dtype)}
    forms |= {"d": ((1,), "int32")} if tile.shifted else {}
    forms |= {"c": ((*lead, V, L), "int32")}
    handles = {name: T.arg(name, T.handle()) for name in forms}
    strides = {"w": _strides(tile)} if tile.stored else {}
    buffers = {
        name: T.match_buffer(handles[name], *form, strides=strides.get(name), offset_factor=1)
        for name, form in forms.items()
    }
    return buffers["x"], buffers["w"], buffers.get("d"), buffers["c"]


def _strides(tile: Tile) -> list[int]:
    """Return the strides of weights some of whose vectors belong to other tiles."""
    step = tile.stored * tile.layout.lanes * tile.layout.depth
    inner = [tile.layout.lanes * tile.layout.depth, tile.layout.depth, 1]
    return [step, *inner] if tile.packed else [2 * step, step, *inner]


def whole(buffer):
    """Return a region of all of a buffer."""
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]


def tile_reads(x, w, d, c) -> list:
    """Return what a tile's product reads, in the order in which TVM lists it for the loops of `dot_desc`."""
    return [whole(buffer) for buffer in (c, d, x, w) if buffer is not None]


def shifted_before(total, bits, first):
    """Return what a product is added to: the total, shifted left where the first product of a k-block comes."""
    return T.Select(first, T.shift_left(total, bits), total)


def dot_desc(tile: Tile):
    """Specify the product of a tile as plain loops; `center` was subtracted from unpacked codes.

    c = c + dot or, if `shifted`, c = (c << d) + dot. There are no loops over one row or one vector: TVM drops these
    before it compares.
    """
    layout = tile.layout
    S, D, V, L = layout.steps, layout.depth, layout.vectors, layout.lanes
    lead = [extent for extent in (tile.rows, V) if extent > 1]
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("desc")
            x, w, d, c = tile_signature(tile)
            with T.sblock("root"):
                T.reads(*tile_reads(x, w, d, c))
                T.writes(whole(c))
                with T.grid(*lead, L, S, 2, D) as loops, T.sblock("dot"):
                    *outer, j, s, h, i = T.axis.remap("S" * len(lead) + "SRRR", loops)
                    r, v = outer[: tile.rows > 1], outer[-1] if V > 1 else 0
                    code = nibble(w[s, v, j, i], h, layout) if tile.packed else w[s, h, v, j, i]
                    product = T.Cast("int32", x[(*r, s, h, i)]) * T.Cast("int32", code)
                    total = c[(*r, v, j)]
                    if tile.shifted:
                        total = shifted_before(total, d[0], T.And(s == 0, T.And(h == 0, i == 0)))
                    T.buffer_store(c, total + product, [*r, v, j])
    return builder.get()


def broadcast_activations(codes, layout: Layout, offset: int = 0):
    """Repeat `depth` codes, plus `offset`, in every lane of a vector."""
    if layout.depth == 1:
        repeated = T.broadcast(codes, layout.lanes)
    else:
        word = _WORDS[layout.depth]
        words = T.broadcast(tirx.reinterpret(word, codes), layout.lanes)
        repeated = tirx.reinterpret(f"int8x{layout.lanes * layout.depth}", words)
    return repeated + T.broadcast(T.int8(offset), layout.lanes * layout.depth) if offset else repeated


def vector_nibbles(packed, half: int, layout: Layout):
    """Extract one nibble of each byte of a vector, as `nibble` does without a center."""
    lanes = layout.lanes * layout.depth
    if layout.zero == 0:
        shifted = T.shift_right(packed, T.broadcast(T.uint8(4), lanes)) if half else packed
        return T.bitwise_and(shifted, T.broadcast(T.uint8(15), lanes))
    shifted = packed if half else T.shift_left(packed, T.broadcast(T.uint8(4), lanes))
    return T.shift_right(tirx.reinterpret(f"int8x{lanes}", shifted), T.broadcast(T.int8(4), lanes))


def shift_totals(d, c, rows: int, layout: Layout) -> None:
    """Emit the shift of a tile's totals, which most k-blocks do without."""
    with T.If(d[0] != 0), T.Then():
        for r, v in itertools.product(range(rows), range(layout.vectors)):
            at = [v] if rows == 1 else [r, v]
            value = T.shift_left(c.vload([*at, 0], f"int32x{layout.lanes}"), T.broadcast(d[0], layout.lanes))
            T.buffer_store(c, value, [*at, slice(0, layout.lanes)])


def fetch_ahead(w, tile: Tile) -> None:
    """Emit the fetch of the weights of a later k-block, line by line; beyond the last one it does nothing."""
    layout = tile.layout
    block = layout.steps * (tile.stored or layout.vectors) * layout.lanes * layout.depth
    for line in range(0, block, _LINE):
        address = w.access_ptr("r", offset=tile.ahead * block + line)
        T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *map(T.int32, (0, 3, 1))))


def dot_impl(tile: Tile, multiply: Multiply):
    """Implement `dot_desc`: everything unrolled, totals in registers.

    A load of weights feeds R multiplies and a broadcast of activations feeds V; LLVM merges the repeats.
    """
    rows, layout, packed = tile.rows, tile.layout, tile.packed
    S, D, V, L = layout.steps, layout.depth, layout.vectors, layout.lanes
    lanes = multiply.total_lanes if multiply.fold else L
    total_type, byte_lanes = f"{multiply.total}x{lanes}", slice(0, L * D)

    def at(r, *rest):
        return list(rest) if rows == 1 else [r, *rest]

    def weights(w, s, h, v):
        if packed:
            return vector_nibbles(w.vload([s, v, 0, 0], f"uint8x{L * D}"), h, layout)
        return w.vload([s, h, v, 0, 0], f"{w.dtype}x{L * D}")

    def activations(x, r, s, h):
        if multiply.by_lane:
            # One load holds the words of several steps.
            words, dtype = 16 // D, _WORDS[D]
            word = 2 * s + h
            loaded = x.vload(at(r, word // words * words // 2, 0, 0), "int8x16")
            loaded = tirx.reinterpret(f"{dtype}x{words}", loaded)
            return tirx.reinterpret("int8x16", tirx.Shuffle([loaded], [word % words] * words))
        codes = x.vload(at(r, s, h, 0), f"int8x{D}" if D > 1 else "int8")
        return broadcast_activations(codes, layout, multiply.offset)

    places = list(itertools.product(range(rows), range(V)))

    def multiply_tile(x, w, totals, index):
        if multiply.unroll:
            for s in range(S):
                multiply_step(x, w, totals, index, s)
        else:
            with T.serial(S) as s:
                multiply_step(x, w, totals, index, s)

    def multiply_step(x, w, totals, index, s):
        for first, (r, v) in itertools.product(range(0, 2, multiply.halves), places):
            halves = range(first, first + multiply.halves)
            operands = [weights(w, s, h, v) for h in halves], [activations(x, r, s, h) for h in halves]
            if multiply.halves == 1:
                operands = [vectors[0] for vectors in operands]
            value = multiply.accumulate(totals.vload([*index(r, v), 0], total_type), *operands)
            T.buffer_store(totals, value, [*index(r, v), slice(0, lanes)])

    def sum_weights(w, sums):
        for v in range(V):
            total = sum((weights(w, s, h, v) for s in range(S) for h in range(2)), T.broadcast(T.uint8(0), L * D))
            T.buffer_store(sums, total, [v, byte_lanes])

    def narrow(x, w, c):
        totals = T.sblock_alloc_buffer((rows, V, lanes), multiply.total)
        sums = T.sblock_alloc_buffer((V, L * D), "uint8") if multiply.offset else None
        zero = T.broadcast(tirx.const(0, multiply.total), lanes)
        for r, v in places:
            T.buffer_store(totals, zero, [r, v, slice(0, lanes)])
        multiply_tile(x, w, totals, lambda r, v: [r, v])
        if multiply.offset:
            sum_weights(w, sums)
        for r, v in places:
            operands = [totals.vload([r, v, 0], total_type)]
            operands += [sums.vload([v, 0], f"uint8x{L * D}")] if multiply.offset else []
            value = c.vload(at(r, v, 0), f"int32x{L}") + multiply.fold(*operands)
            T.buffer_store(c, value, at(r, v, slice(0, L)))

    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("impl")
            x, w, d, c = tile_signature(tile)
            reads = tile_reads(x, w, d, c)
            with T.sblock("root"):
                T.reads(*reads)
                T.writes(whole(c))
                if tile.ahead:
                    fetch_ahead(w, tile)
                if tile.shifted:
                    shift_totals(d, c, rows, layout)
                if not multiply.fold:
                    multiply_tile(x, w, c, at)
                else:
                    # A block of its own: tensorize drops what the outer one allocates.
                    with T.sblock("narrow"):
                        T.reads(*reads)
                        T.writes(whole(c))
                        narrow(x, w, c)
    return builder.get()


def intrinsic(isa: InstructionSet, tile: Tile, activation_bits: int = 8) -> str | None:
    """Register an intrinsic if need be and return its name, or None where LLVM has the loops.

    Parameters
    ----------
    isa : InstructionSet
    tile : Tile
        Its center is that of the instruction set.
    activation_bits : int
        8 or 4. Where the instruction set has no multiply of its own for 4, the intrinsic is the one for 8.
    """
    bits = tile.layout.bits
    multiply = isa.multiply(bits, activation_bits, tile.packed, tile.rows)
    if multiply is None:
        return None
    activations = ".a4" if multiply is isa.multiply_4x4 else ""
    operation = "shift_dot" if tile.shifted else "dot"
    name = f"agq.{operation}.{isa.name}.{tile.layout.name}{activations}.{tile.name}"
    if TensorIntrin.get(name, allow_missing=True) is None:
        tile = replace(tile, center=isa.center(bits, activation_bits, tile.packed))
        TensorIntrin.register(name, dot_desc(tile), (multiply.implement or dot_impl)(tile, multiply))
    return name
