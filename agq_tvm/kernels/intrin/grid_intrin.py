"""Tensor intrinsics of weights on an integer grid: 4-bit codes become bytes, which one row multiplies or memory takes.

    w = step · q + low        step 1..17, low -128..127, one of each for a group of channels of a column; w -128..127

What is stored of `low` is low + 128, so that a byte holds w + 128, which unsigned multiplies take. Two codes of one
column share a 16-bit lane. Neither product leaves its half, 17 · 15 = 255, so one `vpmullw` is a product for each byte,
which there is no instruction for.
"""

from dataclasses import dataclass

from agq_tvm.kernels.emit import whole
from agq_tvm.kernels.intrin.base import InstructionSet, Multiply, nibble
from agq_tvm.kernels.intrin.tensor_intrin import Dot, Tile, fetch_ahead, matched, vector_nibbles
from agq_tvm.kernels.layout import Layout
from agq_tvm.tvm_seam import IRBuilder, T, TensorIntrin, tirx

LARGEST_STEP = 17
"""17 · 15 = 255 fits a byte."""
ZERO = 128
"""What bytes hold beside the weight."""


def grid_code(byte, half, layout: Layout, step, low):
    """Return the byte w + 128 of a 4-bit code, uint8."""
    return nibble(byte, half, layout) * step + low


@dataclass(frozen=True)
class _Grid:
    """Steps and lows of a tile's group, as operands: uint8 [V, L] each."""

    layout: Layout
    step: object
    low: object

    @property
    def bytes(self) -> int:
        return self.layout.lanes * self.layout.depth

    def vector(self, packed, half: int, v: int):
        """Unpack one nibble of each byte of a vector of packed codes."""
        words = f"uint16x{self.bytes // 2}"
        step = T.Cast(words, self._repeated(self.step, v, self.layout.depth // 2))
        codes = tirx.reinterpret(words, vector_nibbles(packed, half, self.layout))
        bytes = tirx.reinterpret(f"uint8x{self.bytes}", codes * step)
        return bytes + self._repeated(self.low, v, self.layout.depth)

    def _repeated(self, values, v: int, times: int):
        """Load the values of a vector's columns, each so often side by side."""
        lanes = self.layout.lanes
        loaded = values.vload([v, 0], f"uint8x{lanes}")
        return tirx.Shuffle([loaded] * times, [lane for lane in range(lanes) for _ in range(times)])


@dataclass(frozen=True)
class _GridDot(Dot):
    """`Dot` of codes that are put on their grid in registers."""

    grid: _Grid

    def weights(self, w, s, h: int, v: int):
        return self.grid.vector(w.vload([s, v, 0, 0], f"uint8x{self.size}"), h, v)


def _dot_signature(tile: Tile) -> list:
    """Declare x int8 [S, 2, D], w uint8 [S, V, L, D], step and low uint8 [V, L], c int32 [V, L]."""
    S, D, V, L = tile.layout.steps, tile.layout.depth, tile.layout.vectors, tile.layout.lanes
    forms = {"x": ((S, 2, D), "int8"), "w": ((S, V, L, D), "uint8")}
    forms |= {"step": ((V, L), "uint8"), "low": ((V, L), "uint8"), "c": ((V, L), "int32")}
    return list(matched(forms, tile).values())


def grid_dot_desc(tile: Tile):
    """Specify the product of one row as plain loops: c = c + Σ x · (w + 128)."""
    S, D, V, L = tile.layout.steps, tile.layout.depth, tile.layout.vectors, tile.layout.lanes
    lead = [V] if V > 1 else []
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("desc")
            x, w, step, low, c = _dot_signature(tile)
            with T.sblock("root"):
                T.reads(*map(whole, (c, x, w, step, low)))
                T.writes(whole(c))
                with T.grid(*lead, L, S, 2, D) as loops, T.sblock("dot"):
                    *outer, j, s, h, i = T.axis.remap("S" * len(lead) + "SRRR", loops)
                    v = outer[0] if outer else 0
                    code = grid_code(w[s, v, j, i], h, tile.layout, step[v, j], low[v, j])
                    product = T.Cast("int32", x[s, h, i]) * T.Cast("int32", code)
                    T.buffer_store(c, c[v, j] + product, [v, j])
    return builder.get()


def grid_dot_impl(tile: Tile, multiply: Multiply):
    """Implement `grid_dot_desc`: codes are put on their grid in registers, where totals stay."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("impl")
            x, w, step, low, c = _dot_signature(tile)
            with T.sblock("root"):
                T.reads(*map(whole, (c, x, w, step, low)))
                T.writes(whole(c))
                dot = _GridDot(tile, multiply, _Grid(tile.layout, step, low))
                if tile.ahead:
                    fetch_ahead(w, tile)
                dot.add(x, w, c, tile.at)
    return builder.get()


def _unpack_signature(tile: Tile) -> list:
    """Declare w uint8 [S, V, L, D], step and low uint8 [V, L], codes uint8 [S, 2, V, L, D]."""
    S, D, V, L = tile.layout.steps, tile.layout.depth, tile.layout.vectors, tile.layout.lanes
    forms = {"w": ((S, V, L, D), "uint8"), "step": ((V, L), "uint8"), "low": ((V, L), "uint8")}
    forms |= {"codes": ((S, 2, V, L, D), "uint8")}
    return list(matched(forms, tile).values())


def grid_unpack_desc(tile: Tile):
    """Specify the unpacking of a k-block of a tile's vectors as plain loops."""
    S, D, V, L = tile.layout.steps, tile.layout.depth, tile.layout.vectors, tile.layout.lanes
    lead = [V] if V > 1 else []
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("desc")
            w, step, low, codes = _unpack_signature(tile)
            with T.sblock("root"):
                T.reads(*map(whole, (w, step, low)))
                T.writes(whole(codes))
                with T.grid(*lead, S, 2, L, D) as (*outer, s, h, j, i), T.sblock("unpack"):
                    s, h, *outer, j, i = T.axis.remap("S" * (4 + len(lead)), [s, h, *outer, j, i])
                    v = outer[0] if outer else 0
                    code = grid_code(w[s, v, j, i], h, tile.layout, step[v, j], low[v, j])
                    T.buffer_store(codes, code, [s, h, v, j, i])
    return builder.get()


def grid_unpack_impl(tile: Tile):
    """Implement `grid_unpack_desc` with vectors."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("impl")
            w, step, low, codes = _unpack_signature(tile)
            with T.sblock("root"):
                T.reads(*map(whole, (w, step, low)))
                T.writes(whole(codes))
                grid = _Grid(tile.layout, step, low)
                for v in range(tile.layout.vectors):
                    for s in range(tile.layout.steps):
                        packed = w.vload([s, v, 0, 0], f"uint8x{grid.bytes}")
                        for h in range(2):
                            code = grid.vector(packed, h, v)
                            T.buffer_store(codes, code, [s, h, v, 0, slice(0, grid.bytes)])
    return builder.get()


def grid_dot_intrinsic(isa: InstructionSet, tile: Tile) -> str:
    """Register the product of one row and a tile's packed codes if need be, and return its name."""
    name = f"agq.grid_dot.{isa.name}.{tile.layout.name}.{tile.name}"
    if TensorIntrin.get(name, allow_missing=True) is None:
        multiply = isa.multiply(tile.layout.bits, 8, True, 1)
        TensorIntrin.register(name, grid_dot_desc(tile), grid_dot_impl(tile, multiply))
    return name


def grid_unpack_intrinsic(isa: InstructionSet, tile: Tile) -> str:
    """Register the unpacking of a tile's weights if need be, and return its name."""
    name = f"agq.grid_unpack.{isa.name}.{tile.layout.name}.{tile.name}"
    if TensorIntrin.get(name, allow_missing=True) is None:
        TensorIntrin.register(name, grid_unpack_desc(tile), grid_unpack_impl(tile))
    return name
