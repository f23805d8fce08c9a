"""Tensor intrinsics of register tiles: what one computes, how an instruction set does it, and its name."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from agq_tvm.kernels.emit import whole
from agq_tvm.kernels.intrin.base import InstructionSet, Multiply, nibble, shifted_before, stored_dtype
from agq_tvm.kernels.layout import Layout
from agq_tvm.tvm_seam import IRBuilder, T, TensorIntrin, tirx

_LINE = 64
_WORDS = {2: "int16", 4: "int32", 8: "int64"}
"""Types that hold so many codes."""


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

    @property
    def places(self) -> list[tuple[int, int]]:
        """Every row with every vector."""
        return list(itertools.product(range(self.rows), range(self.layout.vectors)))

    def at(self, row: int, *rest) -> list:
        """Index x or c, whose dimension of rows is missing for one row."""
        return list(rest) if self.rows == 1 else [row, *rest]


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
    buffers = matched(forms, tile)
    return buffers["x"], buffers["w"], buffers.get("d"), buffers["c"]


def matched(forms: dict, tile: Tile) -> dict:
    """Declare operands by their shapes and types; weights may have others between them."""
    handles = {name: T.arg(name, T.handle()) for name in forms}
    strides = {"w": strides_of(tile)} if tile.stored else {}
    return {
        name: T.match_buffer(handles[name], *form, strides=strides.get(name), offset_factor=1)
        for name, form in forms.items()
    }


def strides_of(tile: Tile) -> list[int]:
    """Return the strides of weights some of whose vectors belong to other tiles."""
    step = tile.stored * tile.layout.lanes * tile.layout.depth
    inner = [tile.layout.lanes * tile.layout.depth, tile.layout.depth, 1]
    return [step, *inner] if tile.packed else [2 * step, step, *inner]


def tile_reads(x, w, d, c) -> list:
    """Return what a tile's product reads, in the order in which TVM lists it for the loops of `dot_desc`."""
    return [whole(buffer) for buffer in (c, d, x, w) if buffer is not None]


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


def shift_totals(d, c, tile: Tile) -> None:
    """Emit the shift of a tile's totals, which most k-blocks do without."""
    lanes = tile.layout.lanes
    with T.If(d[0] != 0), T.Then():
        for r, v in tile.places:
            value = T.shift_left(c.vload(tile.at(r, v, 0), f"int32x{lanes}"), T.broadcast(d[0], lanes))
            T.buffer_store(c, value, tile.at(r, v, slice(0, lanes)))


def prefetch(buffer, offset, locality: int = 3) -> None:
    """Emit the fetch of a line of memory for reading: into the first cache (locality 3), or the second (2)."""
    address = buffer.access_ptr("r", offset=offset)
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *map(T.int32, (0, locality, 1))))


def fetch_ahead(w, tile: Tile) -> None:
    """Emit the fetch of the tile's weights of a later k-block, line by line; beyond the last one it does nothing."""
    layout = tile.layout
    vector = layout.lanes * layout.depth
    step = (tile.stored or layout.vectors) * vector
    for s in range(layout.steps):
        for line in range(0, layout.vectors * vector, _LINE):
            prefetch(w, (tile.ahead * layout.steps + s) * step + line)


def implementation(tile: Tile, products: Callable, own_totals: bool = False):
    """Build an implementation of `dot_desc`.

    Parameters
    ----------
    tile : Tile
        Says what comes before the products: the fetch of later weights, the shift of the totals.
    products : callable
        ``f(x, w, c)`` emits what adds the products of x and w to c, see `tile_signature`.
    own_totals : bool
        Whether `products` allocates totals of its own.
    """
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
                    shift_totals(d, c, tile)
                if not own_totals:
                    products(x, w, c)
                else:
                    # A block of its own: tensorize drops what the outer one allocates.
                    with T.sblock("products"):
                        T.reads(*reads)
                        T.writes(whole(c))
                        products(x, w, c)
    return builder.get()


def dot_impl(tile: Tile, multiply: Multiply):
    """Implement `dot_desc`: everything unrolled, totals in registers.

    A load of weights feeds R multiplies and a broadcast of activations feeds V; LLVM merges the repeats.
    """
    dot = Dot(tile, multiply)
    if multiply.fold:
        return implementation(tile, dot.add_folded, own_totals=True)
    return implementation(tile, lambda x, w, c: dot.add(x, w, c, tile.at))


@dataclass(frozen=True)
class Dot:
    """What `dot_impl` emits."""

    tile: Tile
    multiply: Multiply

    @property
    def size(self) -> int:
        """Bytes of a vector of codes."""
        return self.tile.layout.lanes * self.tile.layout.depth

    @property
    def lanes(self) -> int:
        """Totals in a vector."""
        return self.multiply.total_lanes if self.multiply.fold else self.tile.layout.lanes

    @property
    def total_type(self) -> str:
        return f"{self.multiply.total}x{self.lanes}"

    def weights(self, w, s, h: int, v: int):
        if self.tile.packed:
            return vector_nibbles(w.vload([s, v, 0, 0], f"uint8x{self.size}"), h, self.tile.layout)
        return w.vload([s, h, v, 0, 0], f"{w.dtype}x{self.size}")

    def activations(self, x, r: int, s, h: int):
        depth = self.tile.layout.depth
        if self.multiply.by_lane:
            # One load holds the words of several steps.
            words, dtype = 16 // depth, _WORDS[depth]
            word = 2 * s + h
            loaded = x.vload(self.tile.at(r, word // words * words // 2, 0, 0), "int8x16")
            loaded = tirx.reinterpret(f"{dtype}x{words}", loaded)
            return tirx.reinterpret("int8x16", tirx.Shuffle([loaded], [word % words] * words))
        codes = x.vload(self.tile.at(r, s, h, 0), f"int8x{depth}" if depth > 1 else "int8")
        return broadcast_activations(codes, self.tile.layout, self.multiply.offset)

    def add(self, x, w, totals, index: Callable) -> None:
        """Add the products of a k-block to ``totals[index(row, vector)]``."""
        steps = self.tile.layout.steps
        if self.multiply.unroll:
            for s in range(steps):
                self._add_step(x, w, totals, index, s)
        else:
            with T.serial(steps) as s:
                self._add_step(x, w, totals, index, s)

    def _add_step(self, x, w, totals, index: Callable, s) -> None:
        for first, (r, v) in itertools.product(range(0, 2, self.multiply.halves), self.tile.places):
            halves = range(first, first + self.multiply.halves)
            operands = [self.weights(w, s, h, v) for h in halves], [self.activations(x, r, s, h) for h in halves]
            if self.multiply.halves == 1:
                operands = [vectors[0] for vectors in operands]
            value = self.multiply.accumulate(totals.vload([*index(r, v), 0], self.total_type), *operands)
            T.buffer_store(totals, value, [*index(r, v), slice(0, self.lanes)])

    def add_folded(self, x, w, c) -> None:
        """Sum the products of a k-block in totals of the multiply's own, then add these to c."""
        layout, multiply = self.tile.layout, self.multiply
        totals = T.sblock_alloc_buffer((self.tile.rows, layout.vectors, self.lanes), multiply.total)
        sums = T.sblock_alloc_buffer((layout.vectors, self.size), "uint8") if multiply.offset else None
        zero = T.broadcast(tirx.const(0, multiply.total), self.lanes)
        for r, v in self.tile.places:
            T.buffer_store(totals, zero, [r, v, slice(0, self.lanes)])
        self.add(x, w, totals, lambda r, v: [r, v])
        if multiply.offset:
            self._sum_weights(w, sums)
        for r, v in self.tile.places:
            operands = [totals.vload([r, v, 0], self.total_type)]
            operands += [sums.vload([v, 0], f"uint8x{self.size}")] if multiply.offset else []
            value = c.vload(self.tile.at(r, v, 0), f"int32x{layout.lanes}") + multiply.fold(*operands)
            T.buffer_store(c, value, self.tile.at(r, v, slice(0, layout.lanes)))

    def _sum_weights(self, w, sums) -> None:
        steps, zero = range(self.tile.layout.steps), T.broadcast(T.uint8(0), self.size)
        for v in range(self.tile.layout.vectors):
            total = sum((self.weights(w, s, h, v) for s in steps for h in range(2)), zero)
            T.buffer_store(sums, total, [v, slice(0, self.size)])


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
