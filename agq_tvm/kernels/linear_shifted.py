"""The integer-only matrix product of TRIP: definition in plain TIR; its schedule is that of `linear_schedule.py`.

    total = 0;  for each k-block b:  total[m, n] = (total[m, n] << d[b]) + Σ_{k in b} q_x[m, k] · q_w[n, k]
    out[m, n] = s_x · (s_w[n] · total[m, n] + o_w[n] · xsum[m]) + bias[n]

Channels stand in an order of falling exponents, 32 of one exponent in a k-block; d[b] is what the exponent falls by
from the block before, 0 for most. So the inner loop has no scales, and one float scale is left for an output column.
xsum is the sum of the codes, shifted alike.
"""

from dataclasses import dataclass

from agq_tvm.kernels.intrin.base import InstructionSet, nibble, shifted_before
from agq_tvm.kernels.layout import K_BLOCK, k_blocks
from agq_tvm.kernels.linear import center_of
from agq_tvm.kernels.linear_fetch import emit_fetch
from agq_tvm.kernels.linear_schedule import Plan, row_tile, schedule
from agq_tvm.kernels.linear_space import fetches, most_sums
from agq_tvm.kernels.space import Space, divisors
from agq_tvm.quantize.shifts import check_sum
from agq_tvm.tvm_seam import IRBuilder, T

OPERANDS = ("w", "shift", "ws", "wo", "bias")
"""Packed parameters of a linear that are operands of `define`, in order."""
_CHUNK = 8
"""k-blocks whose codes are unpacked together, at most: 16 KiB for the widest tile."""


@dataclass(frozen=True)
class ShiftedKernel:
    """Everything that distinguishes one compiled integer-only product from another.

    Attributes
    ----------
    rows, columns, channels : int
        M, N and K; K is padded to whole k-blocks.
    offsets : str or None
        Type of the columns' offsets, ``"float16"`` or ``"float32"``; None for symmetric weights.
    activation_bits : int
        8 for activation codes -127..127, 4 for -7..7.

    Raises
    ------
    AgqError
        If sums of so many channels may overflow without any shift. Whether they may with those of a model depends on
        its codes and exponents: see `agq_tvm.quantize.shifts.check_totals`.
    """

    rows: int
    columns: int
    channels: int
    offsets: str | None
    activation_bits: int = 8

    def __post_init__(self) -> None:
        check_sum(self.name, self.channels, self.activation_bits)

    @property
    def bits(self) -> int:
        """Bits of the weights."""
        return 4

    @property
    def code_rows(self) -> int:
        """Rows of activation codes."""
        return self.rows

    @property
    def blocks(self) -> int:
        """KB, the number of k-blocks."""
        return k_blocks(self.channels, K_BLOCK)

    @property
    def packed(self) -> bool:
        """Whether codes are multiplied as they are stored, as in `LinearKernel`."""
        return self.rows == 1

    @property
    def name(self) -> str:
        """E.g. ``linear_w4a8column_shift_sym_bias_m128_n4096_k4096``."""
        kind = {None: "sym", "float16": "asym", "float32": "asym32"}[self.offsets]
        return f"linear_w4a{self.activation_bits}column_shift_{kind}_bias_m{self.rows}_n{self.columns}_k{self.channels}"


def define(kernel: ShiftedKernel, isa: InstructionSet, plan: Plan | None = None):
    """Return the matrix product as unscheduled TIR.

    A plan tells whether codes are unpacked, and the next ones fetched meanwhile; by default as by hand. Buffers, in
    order (names of extents as in `declare_operands`):

    - x int8 [KB, M, S, 2, D], activation codes in their order
    - sx float32 [M, 1], activation scale of the last block
    - xsum int32 [M, 1], sums of the codes, each shifted left by the exponent of its block
    - w uint8 [NT, KB, S, V, L, D]; shift int32 [KB], d
    - ws float16 [NT, 1, V, L]; wo the same shape, if any; bias float32 [NT, V, L]
    - out float32 [M, NT * V * L]

    Blocks are taken in chunks, which start at 0 and are put together in the same way: that leaves a loop over rows
    between a chunk's codes, unpacked once, and its products.
    """
    layout, plan = isa.layout_4bit, plan or _plan(kernel, isa, default(kernel, isa))
    less = isa.center(4, kernel.activation_bits, plan.inline)
    M, KB, NT = kernel.rows, kernel.blocks, layout.tiles(kernel.columns)
    S, V, L, D = layout.steps, layout.vectors, layout.lanes, layout.depth
    GB = row_tile(KB, min(_CHUNK, M // plan.rows) if plan.fetches else _CHUNK)
    G = KB // GB
    code_type = "int8" if layout.zero or less else "uint8"
    center = center_of(layout, less, 4, kernel.offsets)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(kernel.name)
            T.func_attr({"global_symbol": kernel.name, "tirx.noalias": True})
            x = T.arg("x", T.buffer((KB, M, S, 2, D), "int8"))
            sx = T.arg("sx", T.buffer((M, 1), "float32"))
            xsum = T.arg("xsum", T.buffer((M, 1), "int32"))
            w = T.arg("w", T.buffer(layout.packed_shape(kernel.columns, KB * K_BLOCK), "uint8"))
            shift = T.arg("shift", T.buffer((KB,), "int32"))
            ws = T.arg("ws", T.buffer((NT, 1, V, L), "float16"))
            wo = T.arg("wo", T.buffer((NT, 1, V, L), kernel.offsets)) if kernel.offsets else None
            bias = T.arg("bias", T.buffer((NT, V, L), "float32"))
            out = T.arg("out", T.buffer((M, NT * layout.width), "float32"))
            codes = T.sblock_alloc_buffer((NT, KB, S, 2, V, L, D), code_type)
            dot = T.sblock_alloc_buffer((NT, G, M, V, L), "int32")
            total = T.sblock_alloc_buffer((NT, M, V, L), "int32")
            with T.grid(NT, KB, S, 2, V, L, D) as loops, T.sblock("unpack"):
                t, kb, s, h, v, j, i = T.axis.remap("SSSSSSS", loops)
                T.buffer_store(codes, nibble(w[t, kb, s, v, j, i], h, layout, less), [t, kb, s, h, v, j, i])
            with T.grid(NT, G, M, V, L, GB, S, 2, D) as loops, T.sblock("dot"):
                t, g, m, v, j, kb, s, h, i = T.axis.remap("SSSSSRRRR", loops)
                with T.init():
                    T.buffer_store(dot, T.int32(0), [t, g, m, v, j])
                block, first = g * GB + kb, T.And(s == 0, T.And(h == 0, i == 0))
                before = shifted_before(dot[t, g, m, v, j], shift[block], first)
                product = T.Cast("int32", x[block, m, s, h, i]) * T.Cast("int32", codes[t, block, s, h, v, j, i])
                T.buffer_store(dot, before + product, [t, g, m, v, j])
            fetched = emit_fetch(w, G, M // plan.rows) if plan.fetches else None
            with T.grid(NT, M, V, L, G) as loops, T.sblock("total"):
                t, m, v, j, g = T.axis.remap("SSSSR", loops)
                waits = [] if fetched is None else [fetched[t, g, m // plan.rows]]
                T.reads(dot[t, g, m, v, j], shift[g * GB : (g + 1) * GB], *waits)
                T.writes(total[t, m, v, j])
                with T.init():
                    T.buffer_store(total, T.int32(0), [t, m, v, j])
                fallen = sum((shift[g * GB + kb] for kb in range(1, GB)), shift[g * GB])
                value = T.shift_left(total[t, m, v, j], fallen) + dot[t, g, m, v, j]
                T.buffer_store(total, value, [t, m, v, j])
            with T.grid(M, NT * layout.width) as loops, T.sblock("out"):
                m, n = T.axis.remap("SS", loops)
                t, v, j = n // layout.width, n % layout.width // L, n % L
                value = total[t, m, v, j] if center == 0 else total[t, m, v, j] + xsum[m, 0] * center
                y = T.Cast("float32", value) * T.Cast("float32", ws[t, 0, v, j])
                if kernel.offsets:
                    y = y + T.Cast("float32", xsum[m, 0]) * T.Cast("float32", wo[t, 0, v, j])
                T.buffer_store(out, y * sx[m, 0] + bias[t, v, j], [m, n])
    return builder.get()


def _plan(kernel: ShiftedKernel, isa: InstructionSet, decisions: dict[str, int]) -> Plan:
    inline = kernel.packed or isa.inlines(kernel.rows)
    ahead = isa.ahead if inline or fetches(kernel, isa) else 0
    return Plan(vectors=isa.layout_4bit.vectors, inline=inline, ahead=ahead, **decisions)


def default(kernel: ShiftedKernel, isa: InstructionSet) -> dict[str, int]:
    """Return the decisions made by hand."""
    return {"rows": row_tile(kernel.rows, isa.product_rows), "parallel": 1}


def space(kernel: ShiftedKernel, isa: InstructionSet, threads: int = 1) -> Space:
    """Return the decisions of an integer-only product, with the meaning that they have for `linear_schedule.Plan`."""
    made, most = default(kernel, isa), most_sums(isa) // isa.layout_4bit.vectors
    rows = tuple(sorted({made["rows"], *divisors(kernel.rows, most)}))
    return Space({"rows": rows, "parallel": (0, 1) if threads > 1 else (1,)}, made)


def build(kernel: ShiftedKernel, isa: InstructionSet, decisions: dict[str, int] | None = None):
    """Return the scheduled PrimFunc of a matrix product: a chunk of k-blocks takes the place of a group."""
    plan = _plan(kernel, isa, decisions or default(kernel, isa))
    scheduled = schedule(define(kernel, isa, plan), kernel, isa, plan, "total", ["unpack"], shifted=True)
    return scheduled.mod["main"].with_attr("global_symbol", kernel.name)
