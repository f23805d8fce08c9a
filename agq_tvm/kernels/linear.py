"""The quantized matrix product: definition in plain TIR, and its schedules for decode and prefill.

`linear_panels.py` has what takes a schedule's place where prefill's inner loop is written in assembly.

    out[m, n] = Σ_g s_x[m, g] · (s_w[g, n] · dot[m, g, n] + o_w[g, n] · xsum[m, g]) + bias[n]
    dot[m, g, n] = Σ_{k in group g} q_x[m, k] · q_w[n, k]                            (integers)

Activations of two terms, x = s q + s' q', stand in twice as many rows, second terms after all first ones; the results
of both are added.

Weights and their scales come in the tiles of `layout.py`; activation codes come by k-block, then row, as
`quantize.py` writes them.
"""

from dataclasses import dataclass

from tvm import te

from agq_tvm.errors import AgqError
from agq_tvm.kernels import linear_panels
from agq_tvm.kernels.intrin.base import ACTIVATION_LIMIT, InstructionSet, nibble, stored_dtype
from agq_tvm.kernels.layout import K_BLOCK, Layout, k_blocks
from agq_tvm.kernels.linear_schedule import Plan, schedule
from agq_tvm.kernels.linear_space import default
from agq_tvm.tvm_seam import T

ZERO = {4: 8, 8: 128}
"""The code that stands for 0 in symmetric weights."""
OPERANDS = ("w", "ws", "wo", "bias")
"""Packed parameters of a linear that are operands of `define`, in order."""
_INT32_LIMIT = (1 << 31) - 1


@dataclass(frozen=True)
class LinearKernel:
    """Everything that distinguishes one compiled matrix product from another.

    Attributes
    ----------
    rows, columns, channels : int
        M, N and K.
    bits, group_size : int
        Of the weights; K is padded to whole groups.
    per_group : bool
        Whether activations have a scale for each group, or one for the row.
    offsets : str or None
        Type of the group offsets, ``"float16"`` or ``"float32"``; None for symmetric weights.
    bias : bool
        Whether a float32 vector is added to the result.
    activation_bits : int
        8 for activation codes -127..127, 4 for -7..7.
    terms : int
        1 or 2, of the activations.
    """

    rows: int
    columns: int
    channels: int
    bits: int
    group_size: int
    per_group: bool
    offsets: str | None
    bias: bool
    activation_bits: int = 8
    terms: int = 1

    def __post_init__(self) -> None:
        largest = ((1 << self.bits) - 1) * (ACTIVATION_LIMIT if self.activation_bits == 8 else 7)
        if self.group_size * largest > _INT32_LIMIT:
            raise AgqError(
                f"{self.group_size} products of {self.bits}-bit weights and {self.activation_bits}-bit activations may "
                f"leave 32 bits: take groups of {_INT32_LIMIT // largest} or fewer"
            )

    @property
    def code_rows(self) -> int:
        """Rows of activation codes."""
        return self.terms * self.rows

    @property
    def groups(self) -> int:
        """G, the number of groups along K."""
        return -(-self.channels // self.group_size)

    @property
    def packed(self) -> bool:
        """Whether 4-bit codes are multiplied as they are stored: unpacking them first pays for several rows."""
        return self.bits == 4 and self.code_rows == 1

    @property
    def name(self) -> str:
        """E.g. ``linear_w4a8g32_asym_m128_n4096_k4096``."""
        scales = "group" if self.per_group else "token"
        kind = {None: "sym", "float16": "asym", "float32": "asym32"}[self.offsets]
        bias = ("_bias" if self.bias else "") + ("_two_terms" if self.terms == 2 else "")
        return (
            f"linear_w{self.bits}a{self.activation_bits}g{self.group_size}_{scales}_{kind}{bias}"
            f"_m{self.rows}_n{self.columns}_k{self.channels}"
        )


def center_of(layout: Layout, less: int, bits: int, offsets: str | None) -> int:
    """Return what the sum of the activations is multiplied by and added to a dot product.

    It brings multiplied codes, which lack `layout.zero` and `less`, back to q (offsets), or to q - zero (symmetric).
    """
    return layout.zero + less - (0 if offsets else ZERO[bits])


def define(kernel: LinearKernel, isa: InstructionSet, plan: Plan | None = None):
    """Return the matrix product as unscheduled TIR.

    A plan tells whether codes are unpacked, and for how many vectors at a time; by default as by hand.

    Buffers, in order (rows of codes R, M or 2 M; tiles NT, groups G, k-blocks KB; S, V, L, D from the layout):

    - x int8 [KB, R, S, 2, D], activation codes
    - sx float32 [R, G or 1], activation scales
    - xsum int32 [R, G], sums of the codes of a group
    - w uint8 [NT, KB, S, V, L, D] or of 8 bit [NT, KB, S, 2, V, L, D]
    - ws float16 [NT, G, V, L]; wo the same shape, if any; bias float32 [NT, V, L], if any
    - out float32 [M, NT * V * L]
    """
    layout = isa.layout(kernel.bits)
    plan = plan or Plan(**default(kernel, isa))
    less = isa.center(kernel.bits, kernel.activation_bits, plan.inline)
    M, R, G, GB = kernel.rows, kernel.code_rows, kernel.groups, kernel.group_size // K_BLOCK
    KB, NT = k_blocks(kernel.channels, kernel.group_size), layout.tiles(kernel.columns)
    S, V, L, D = layout.steps, layout.vectors, layout.lanes, layout.depth
    x = te.placeholder((KB, R, S, 2, D), "int8", name="x")
    sx = te.placeholder((R, G if kernel.per_group else 1), "float32", name="sx")
    xsum = te.placeholder((R, G), "int32", name="xsum")
    w_dtype = "uint8" if kernel.bits == 4 else stored_dtype(layout)
    w = te.placeholder(layout.packed_shape(kernel.columns, KB * K_BLOCK), w_dtype, name="w")
    ws = te.placeholder((NT, G, V, L), "float16", name="ws")
    wo = te.placeholder((NT, G, V, L), kernel.offsets, name="wo") if kernel.offsets else None
    bias = te.placeholder((NT, V, L), "float32", name="bias") if kernel.bias else None

    TV = layout.vectors if plan.inline else plan.vectors

    def code(t, kb, s, h, v, j, i):
        if kernel.bits == 4:
            return codes[t, v // TV, kb, s, h, v % TV, j, i]
        return w[t, kb, s, h, v, j, i]

    if kernel.bits == 4:
        codes = te.compute(
            (NT, V // TV, KB, S, 2, TV, L, D),
            lambda t, p, kb, s, h, v, j, i: nibble(w[t, kb, s, p * TV + v, j, i], h, layout, less),
            name="unpack",
        )
    axes = [te.reduce_axis((0, extent), name) for extent, name in ((GB, "kb"), (S, "s"), (2, "h"), (D, "i"))]
    kb, s, h, i = axes
    dot = te.compute(
        (NT, G, R, V, L),
        lambda t, g, m, v, j: te.sum(
            T.Cast("int32", x[g * GB + kb, m, s, h, i]) * T.Cast("int32", code(t, g * GB + kb, s, h, v, j, i)),
            axis=axes,
        ),
        name="dot",
    )

    def widened(values, name):
        return te.compute(values.shape, lambda *at: T.Cast("float32", values(*at)), name=name)

    scales = widened(ws, "scales")
    center = center_of(layout, less, kernel.bits, kernel.offsets)
    if kernel.offsets:  # which take the center along, once for all rows: s (q - c) + (o + s c)

        def offset(*at):
            value = T.Cast("float32", wo(*at))
            return value + T.Cast("float32", ws(*at)) * T.float32(center) if center else value

        offsets = te.compute(wo.shape, offset, name="offsets")

    def term(t, m, v, j, g):
        plain = center == 0 or kernel.offsets
        total = dot[t, g, m, v, j] if plain else dot[t, g, m, v, j] + xsum[m, g] * center
        y = T.Cast("float32", total) * scales[t, g, v, j]
        if kernel.offsets:
            y = y + T.Cast("float32", xsum[m, g]) * offsets[t, g, v, j]
        return y * sx[m, g] if kernel.per_group else y

    g = te.reduce_axis((0, G), "g")
    scaled = te.compute((NT, R, V, L), lambda t, m, v, j: te.sum(term(t, m, v, j, g), axis=[g]), name="scaled")

    def finish(m, n):
        t, v, j = n // layout.width, n % layout.width // L, n % L
        rows = [m + term * M for term in range(kernel.terms)]
        y = sum(scaled[t, r, v, j] if kernel.per_group else scaled[t, r, v, j] * sx[r, 0] for r in rows)
        return y + bias[t, v, j] if kernel.bias else y

    out = te.compute((M, NT * layout.width), finish, name="out")
    operands = [x, sx, xsum, w, ws, wo, bias, out]
    func = te.create_prim_func([operand for operand in operands if operand is not None])
    return func.with_attr({"global_symbol": kernel.name, "tirx.noalias": True})


def build(kernel: LinearKernel, isa: InstructionSet, decisions: dict[str, int] | None = None):
    """Return the scheduled PrimFunc of a matrix product, or the one around a loop in assembly where there is one."""
    if linear_panels.loop_for(kernel, isa):
        return linear_panels.build(kernel, isa, decisions)
    plan = Plan(**(decisions or default(kernel, isa)))
    conversions = ["unpack"] if kernel.bits == 4 else []
    conversions += ["scales", "offsets"] if kernel.offsets else ["scales"]
    scheduled = schedule(define(kernel, isa, plan), kernel, isa, plan, "scaled", conversions)
    return scheduled.mod["main"].with_attr("global_symbol", kernel.name)
