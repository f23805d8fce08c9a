"""The matrix product of quantized weights and float activations: weights are dequantized, then multiplied in float32.

    out[m, n] = Σ_k x[m, k] · (s_w[g, n] · q_w[n, k] + o_w[g, n]) + bias[n]

Lanes are columns, so a multiply-add takes one activation and a vector of weights. That wants the channels of a column
apart, where integer products want them side by side: `float_form` gives the layouts for it.
"""

from dataclasses import dataclass, replace
from functools import partial

from agq_tvm.kernels.emit import float32, task_loop
from agq_tvm.kernels.intrin.base import InstructionSet, nibble, stored_dtype
from agq_tvm.kernels.layout import K_BLOCK, Layout, k_blocks
from agq_tvm.kernels.linear import ZERO
from agq_tvm.kernels.linear_schedule import row_tile
from agq_tvm.kernels.linear_space import most_sums
from agq_tvm.kernels.space import Space, divisors
from agq_tvm.tvm_seam import IRBuilder, T


def float_form(isa: InstructionSet) -> InstructionSet:
    """Return an instruction set with the layouts of float products, and no multiplies."""
    narrow, wide = (replace(isa.layout(bits), depth=1) for bits in (4, 8))
    return InstructionSet(isa.name, narrow, wide, isa.rows)


@dataclass(frozen=True)
class FloatLinearKernel:
    """One product with float activations.

    Attributes
    ----------
    rows, columns, channels : int
        M, N and K.
    bits, group_size : int
        Of the weights; K is padded to whole groups.
    offsets : str or None
        Type of the group offsets, ``"float16"`` or ``"float32"``; None for symmetric weights.
    bias : bool
        Whether a float32 vector is added to the result.
    """

    rows: int
    columns: int
    channels: int
    bits: int
    group_size: int
    offsets: str | None
    bias: bool

    @property
    def padded(self) -> int:
        """K of whole groups."""
        return k_blocks(self.channels, self.group_size) * K_BLOCK

    @property
    def name(self) -> str:
        """E.g. ``linear_w4a16g32_asym_m128_n4096_k4096``."""
        kind = {None: "sym", "float16": "asym", "float32": "asym32"}[self.offsets]
        shape = f"m{self.rows}_n{self.columns}_k{self.channels}"
        return f"linear_w{self.bits}a16g{self.group_size}_{kind}{'_bias' if self.bias else ''}_{shape}"


def default(kernel: FloatLinearKernel, isa: InstructionSet) -> dict[str, int]:
    """Return the decisions made by hand."""
    return {"rows": row_tile(kernel.rows, isa.rows), "parallel": 1}


def space(kernel: FloatLinearKernel, isa: InstructionSet, threads: int = 1) -> Space:
    """Return the decisions of a product with float activations.

    rows
        Of the register tile.
    parallel
        Whether threads share the tiles of columns.
    """
    made, most = default(kernel, isa), most_sums(isa) // isa.layout(kernel.bits).vectors
    rows = tuple(sorted({made["rows"], *divisors(kernel.rows, most)}))
    return Space({"rows": rows, "parallel": (0, 1) if threads > 1 else (1,)}, made)


def build(kernel: FloatLinearKernel, isa: InstructionSet, decisions: dict[str, int] | None = None):
    """Return the PrimFunc; `isa` comes from `float_form`.

    Buffers, in order (tiles NT, groups G; V, L from the layout):

    - x float32 [M, padded], 0 beyond K
    - w, packed by the layout
    - ws float16 [NT, G, V, L]; wo the same shape, if any; bias float32 [NT, V, L], if any
    - out float32 [M, NT * V * L]
    """
    decisions, layout = decisions or default(kernel, isa), isa.layout(kernel.bits)
    tiles, groups = layout.tiles(kernel.columns), kernel.padded // kernel.group_size
    per_group = (tiles, groups, layout.vectors, layout.lanes)
    codes = "uint8" if kernel.bits == 4 else stored_dtype(layout)
    shapes = {"x": ((kernel.rows, kernel.padded), "float32")}
    shapes |= {"w": (layout.packed_shape(kernel.columns, kernel.padded), codes), "ws": (per_group, "float16")}
    shapes |= {"wo": (per_group, kernel.offsets)} if kernel.offsets else {}
    shapes |= {"bias": ((tiles, *per_group[2:]), "float32")} if kernel.bias else {}
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(kernel.name)
            T.func_attr({"global_symbol": kernel.name, "tirx.noalias": True})
            buffers = {name: T.arg(name, T.buffer(shape, dtype)) for name, (shape, dtype) in shapes.items()}
            out = T.arg("out", T.buffer((kernel.rows, tiles * layout.width), "float32"))
            each = 1 if decisions["parallel"] else tiles
            with task_loop("tile", tiles, list(buffers.values()), [out], each) as tile:
                _Tile(kernel, layout, buffers, out, tile).emit(decisions["rows"])
    return builder.get()


class _Tile:
    """Emits the product of all rows and one tile of columns."""

    def __init__(self, kernel: FloatLinearKernel, layout: Layout, buffers: dict, out, tile):
        self.kernel, self.layout, self.buffers, self.out, self.tile = kernel, layout, buffers, out, tile
        self.groups = kernel.padded // kernel.group_size

    def emit(self, rows: int) -> None:
        """Multiply `rows` rows at a time, their sums in registers."""
        sums = T.sblock_alloc_buffer((rows, self.layout.vectors, self.layout.lanes), "float32")
        if self.kernel.rows == 1:
            self._one_row(sums)
        else:
            self._many_rows(sums, rows)

    def _one_row(self, sums) -> None:
        """Dequantize weights where they are multiplied."""
        x, size = self.buffers["x"], self.kernel.group_size
        self._store(sums, 1, lambda r, v, j: self._start(v, j))
        with T.serial(self.groups) as g, T.serial(size // K_BLOCK) as kb, T.serial(self.layout.steps) as step:
            for half in range(2):
                block = g * (size // K_BLOCK) + kb
                at = (g, block, step, half)
                factor = x[0, block * K_BLOCK + 2 * step + half]
                self._store(sums, 1, lambda r, v, j, f=factor, at=at: sums[r, v, j] + f * self._weight(*at, v, j))
        self._store(self.out, 1, lambda r, v, j: sums[r, v, j], self._of_row)

    def _many_rows(self, sums, rows: int) -> None:
        """Dequantize the weights of a group once for all rows."""
        x, size = self.buffers["x"], self.kernel.group_size
        weights = T.sblock_alloc_buffer((1, size, self.layout.vectors, self.layout.lanes), "float32")
        with T.serial(self.kernel.rows) as m:
            self._store(self.out, 1, lambda r, v, j: self._start(v, j), lambda r, v, j: self._of_row(m, v, j))
        with T.serial(self.groups) as g:
            with T.serial(size // K_BLOCK) as kb, T.serial(self.layout.steps) as step:
                for half in range(2):
                    at = (g, g * (size // K_BLOCK) + kb, step, half)
                    k = kb * K_BLOCK + 2 * step + half
                    value, where = partial(self._weight, *at), partial(_of_channel, k)
                    self._store(weights, 1, lambda r, v, j, value=value: value(v, j), where)
            with T.serial(self.kernel.rows // rows) as block:
                first = block * rows
                self._store(sums, rows, lambda r, v, j: self.out[first + r, self._column(v, j)])
                with T.serial(size) as k:
                    self._store(
                        sums, rows, lambda r, v, j: sums[r, v, j] + x[first + r, g * size + k] * weights[0, k, v, j]
                    )
                self._store(
                    self.out, rows, lambda r, v, j: sums[r, v, j], lambda r, v, j: self._of_row(first + r, v, j)
                )

    def _store(self, buffer, rows: int, value, where=lambda r, v, j: [r, v, j]) -> None:
        """Store ``value(r, v, j)`` at ``where(r, v, j)`` for rows r, vectors v and lanes j."""
        for r in range(rows):
            for v in range(self.layout.vectors):
                with T.vectorized(self.layout.lanes) as j:
                    T.buffer_store(buffer, value(r, v, j), where(r, v, j))

    def _column(self, v, j):
        return self.tile * self.layout.width + v * self.layout.lanes + j

    def _of_row(self, m, v, j):
        return [m, self._column(v, j)]

    def _start(self, v, j):
        return self.buffers["bias"][self.tile, v, j] if self.kernel.bias else float32(0)

    def _weight(self, g, block, step, half: int, v, j):
        """Return one weight in float32."""
        w, zero = self.buffers["w"], ZERO[self.kernel.bits]
        scale = T.Cast("float32", self.buffers["ws"][self.tile, g, v, j])
        if self.kernel.bits == 8:
            code = T.Cast("float32", w[self.tile, block, step, half, v, j, 0])
            return (code + float32(self.layout.zero - zero)) * scale
        code = T.Cast("float32", nibble(w[self.tile, block, step, v, j, 0], half, self.layout))
        if self.kernel.offsets:
            return code * scale + T.Cast("float32", self.buffers["wo"][self.tile, g, v, j])
        return (code + float32(self.layout.zero - zero)) * scale


def _of_channel(k, r, v, j):
    return [r, k, v, j]
