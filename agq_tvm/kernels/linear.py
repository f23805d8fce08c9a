"""The quantized matrix product: definition in plain TIR, and its schedules for decode and prefill.

`linear_panels.py` has what takes a schedule's place where prefill's inner loop is written in assembly.

    out[m, n] = Σ_g s_x[m, g] · (s_w[g, n] · dot[m, g, n] + o_w[g, n] · xsum[m, g]) + bias[n]
    dot[m, g, n] = Σ_{k in group g} q_x[m, k] · q_w[n, k]                            (integers)

Activations of two terms, x = s q + s' q', stand in twice as many rows, second terms after all first ones; the results
of both are added.

On an integer grid s_w = unit[n] · step and o_w = unit[n] · low; there a few rows take this product, see
`linear_grid.choose`. Where conversions cost more than they save, groups are summed as integers and unit comes last.

Weights and their scales come in the tiles of `layout.py`; activation codes come by k-block, then row, as
`quantize.py` writes them.
"""

from dataclasses import dataclass

from agq_tvm.errors import AgqError
from agq_tvm.kernels import linear_panels
from agq_tvm.kernels.emit import fma
from agq_tvm.kernels.intrin.assembly import MAGIC
from agq_tvm.kernels.intrin.base import ACTIVATION_LIMIT, InstructionSet, nibble, stored_dtype
from agq_tvm.kernels.intrin.grid_intrin import ZERO as GRID_ZERO
from agq_tvm.kernels.layout import K_BLOCK, Layout, k_blocks
from agq_tvm.kernels.linear_fetch import emit_fetch
from agq_tvm.kernels.linear_operands import declare_operands
from agq_tvm.kernels.linear_schedule import Plan, schedule
from agq_tvm.kernels.linear_space import default
from agq_tvm.tvm_seam import IRBuilder, T, tirx

ZERO = {4: 8, 8: 128}
"""The code that stands for 0 in symmetric weights."""
OPERANDS = ("w", "step", "low", "ws", "wo", "bias")
"""Packed parameters of a linear that are operands of `define`, in order."""
_INT32_LIMIT = (1 << 31) - 1
_MAGIC_BITS = 0x4B400000
"""Of the float `MAGIC`."""
_MAGIC_LIMIT = 1 << 22
"""What sums that start there have to stay below."""


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
        Type of the group offsets, ``"float16"`` or ``"float32"``; ``"grid"`` for weights on an integer grid; None for
        symmetric weights.
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
    def code_sums(self) -> int:
        """Sums of the codes of a row: one for each group."""
        return self.groups

    @property
    def packed(self) -> bool:
        """Whether 4-bit codes are multiplied as they are stored: unpacking them first pays for several rows."""
        return self.bits == 4 and self.code_rows == 1

    @property
    def name(self) -> str:
        """E.g. ``linear_w4a8g32_asym_m128_n4096_k4096``."""
        scales = "group" if self.per_group else "token"
        kind = {None: "sym", "float16": "asym", "float32": "asym32", "grid": "grid"}[self.offsets]
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


def _seeds_sums(isa: InstructionSet, plan: Plan) -> bool:
    """Whether sums of products start at what they end with besides.

    Where codes are unpacked in registers they start at 0: LLVM then leaves activations, which several tiles of columns
    read, in the loop over these, and does not keep all of them on the stack.
    """
    return isa.seed_sums and not plan.inline


def _sums_become_floats(kernel: LinearKernel, isa: InstructionSet, plan: Plan) -> bool:
    """Whether sums of products start at the bits of `MAGIC` besides, and are within what that allows."""
    largest = kernel.group_size * ACTIVATION_LIMIT * ((1 << kernel.bits) - 1)
    return _seeds_sums(isa, plan) and kernel.per_group and largest < _MAGIC_LIMIT


def _sums_integers(kernel: LinearKernel, isa: InstructionSet) -> bool:
    """Whether groups on an integer grid are scaled and summed as integers.

    Arm multiplies and adds words in one instruction, as it does floats; x86 has none for words.
    """
    return kernel.offsets == "grid" and isa.assembly is not None


def define(kernel: LinearKernel, isa: InstructionSet, plan: Plan | None = None):
    """Return the matrix product as unscheduled TIR.

    A plan tells whether codes are unpacked, and for how many vectors at a time; by default as by hand. The buffers are
    those of `declare_operands`.
    """
    plan = plan or Plan(**default(kernel, isa))
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(kernel.name)
            T.func_attr({"global_symbol": kernel.name, "tirx.noalias": True})
            product = _Product(kernel, isa, plan)
            codes = product.unpack() if kernel.bits == 4 else product.w
            product.finish(product.total(product.dot(codes)))
    return builder.get()


class _Product:
    """The parts of one product, as they are emitted."""

    def __init__(self, kernel: LinearKernel, isa: InstructionSet, plan: Plan):
        self.kernel, self.layout, self.plan = kernel, isa.layout(kernel.bits), plan
        self.less = isa.center(kernel.bits, kernel.activation_bits, plan.inline)
        self.center = center_of(self.layout, self.less, kernel.bits, kernel.offsets)
        self.side_by_side = self.layout.vectors if plan.inline else plan.vectors
        self.sum_type = "int32" if _sums_integers(kernel, isa) else "float32"
        """Type of what groups are multiplied by, and of their sums."""
        self.seeded, self.floats = _seeds_sums(isa, plan), _sums_become_floats(kernel, isa, plan)
        self.blocks, self.tiles = k_blocks(kernel.channels, kernel.group_size), self.layout.tiles(kernel.columns)
        args = declare_operands(kernel, self.layout)
        self.x, self.sx, self.xsum, self.w, self.ws = (args[name] for name in ("x", "sx", "xsum", "w", "ws"))
        self.wo, self.bias, self.out = args.get("wo"), args.get("bias"), args["out"]
        self.step, self.low = args.get("step"), args.get("low")

    def unpack(self):
        """Give every 4-bit code a byte, [NT, V // TV, KB, S, 2, TV, L, D] for the TV vectors of a register tile."""
        layout, TV = self.layout, self.side_by_side
        shape = (self.tiles, layout.vectors // TV, self.blocks, layout.steps, 2, TV, layout.lanes, layout.depth)
        codes = T.sblock_alloc_buffer(shape, stored_dtype(layout, self.less))
        with T.grid(*shape) as loops, T.sblock("unpack"):
            t, p, kb, s, h, v, j, i = at = T.axis.remap("S" * len(shape), loops)
            T.buffer_store(codes, nibble(self.w[t, kb, s, p * TV + v, j, i], h, layout, self.less), list(at))
        return codes

    def dot(self, codes):
        """Sum the products of every group, int32 [NT, G, R, V, L]."""
        kernel, layout = self.kernel, self.layout
        shape = (self.tiles, kernel.groups, kernel.code_rows, layout.vectors, layout.lanes)
        dot, GB, TV = T.sblock_alloc_buffer(shape, "int32"), kernel.group_size // K_BLOCK, self.side_by_side
        with T.grid(*shape, GB, layout.steps, 2, layout.depth) as loops, T.sblock("dot"):
            t, g, m, v, j, kb, s, h, i = T.axis.remap("SSSSSRRRR", loops)
            block = g * GB + kb
            code = codes[t, v // TV, block, s, h, v % TV, j, i] if kernel.bits == 4 else codes[t, block, s, h, v, j, i]
            # Tensor intrinsics know what they add to a sum; what it starts at is not theirs.
            T.reads(self.x[block, m, s, h, i], code)
            T.writes(dot[t, g, m, v, j])
            with T.init():
                T.buffer_store(dot, self._start(m, g), [t, g, m, v, j])
            product = T.Cast("int32", self.x[block, m, s, h, i]) * T.Cast("int32", code)
            T.buffer_store(dot, dot[t, g, m, v, j] + product, [t, g, m, v, j])
        return dot

    def _start(self, m, g):
        """Return what a sum of products starts at: 0, or what it has to end with besides."""
        start = T.int32(0)
        if self.seeded and self.center and not self.kernel.offsets:
            start = self.xsum[m, g] * self.center
        return start + _MAGIC_BITS if self.floats else start

    def _parameter(self, name: str, value):
        """Compute a parameter of every group and column, [NT, G, V, L]."""
        shape = (self.tiles, self.kernel.groups, self.layout.vectors, self.layout.lanes)
        buffer = T.sblock_alloc_buffer(shape, self.sum_type)
        with T.grid(*shape) as loops, T.sblock(name):
            at = list(T.axis.remap("SSSS", loops))
            T.buffer_store(buffer, value(at), at)
        return buffer

    def _scale(self, at):
        if self.step is None:
            return T.Cast("float32", self.ws[at])
        return self._times_unit(T.Cast(self.sum_type, self.step[at]), at)

    def _times_unit(self, value, at):
        """Multiply with the unit of a column, unless that comes last."""
        t, _, v, j = at
        return value if self.sum_type == "int32" else value * T.Cast("float32", self.ws[t, 0, v, j])

    def _offset(self, at):
        """Take the center along, once for all rows: s (q - c) + (o + s c)."""
        if self.low is None:
            value = T.Cast("float32", self.wo[at])
        else:
            value = self._times_unit(T.Cast(self.sum_type, T.Cast("int32", self.low[at]) - GRID_ZERO), at)
        return value + self._scale(at) * tirx.const(self.center, self.sum_type) if self.center else value

    def total(self, dot):
        """Sum the groups' products with their scales, float32 or int32 [NT, R, V, L]."""
        kernel, layout = self.kernel, self.layout
        scales = self._parameter("scales", self._scale)
        magic = offsets = None
        if self.floats:
            magic = self._parameter("magic", lambda at: self._scale(at) * T.float32(-MAGIC))
        if kernel.offsets:
            offsets = self._parameter("offsets", self._offset)
        fetched, plan = None, self.plan
        if plan.fetches:
            fetched = emit_fetch(self.w, kernel.groups // plan.panel, kernel.code_rows // plan.rows)
        shape = (self.tiles, kernel.code_rows, layout.vectors, layout.lanes)
        scaled = T.sblock_alloc_buffer(shape, self.sum_type)
        with T.grid(*shape, kernel.groups) as loops, T.sblock("scaled"):
            t, m, v, j, g = T.axis.remap("SSSSR", loops)
            read = [each[t, g, v, j] for each in (scales, magic, offsets) if each is not None]
            read += [self.sx[m, g]] if kernel.per_group else []
            read += [] if fetched is None else [fetched[t, g // plan.panel, m // plan.rows]]
            T.reads(dot[t, g, m, v, j], self.xsum[m, g], *read)
            T.writes(scaled[t, m, v, j])
            with T.init():
                T.buffer_store(scaled, tirx.const(0, self.sum_type), [t, m, v, j])
            total, scale = dot[t, g, m, v, j], scales[t, g, v, j]
            if magic is not None:
                # s (MAGIC + dot) - s MAGIC: exact before it is rounded once, see `intrin/assembly.py`.
                y = fma(tirx.reinterpret("float32", total), scale, magic[t, g, v, j])
            else:
                plain = self.center == 0 or kernel.offsets or self.seeded
                y = T.Cast(self.sum_type, total if plain else total + self.xsum[m, g] * self.center) * scale
            if offsets is not None:
                y = y + T.Cast(self.sum_type, self.xsum[m, g]) * offsets[t, g, v, j]
            y = y * self.sx[m, g] if kernel.per_group else y
            T.buffer_store(scaled, scaled[t, m, v, j] + y, [t, m, v, j])
        return scaled

    def finish(self, scaled) -> None:
        """Add the terms, with the scales of rows and the bias."""
        kernel, layout = self.kernel, self.layout
        with T.grid(*self.out.shape) as loops, T.sblock("out"):
            m, n = T.axis.remap("SS", loops)
            t, v, j = n // layout.width, n % layout.width // layout.lanes, n % layout.lanes
            rows = [m + term * kernel.rows for term in range(kernel.terms)]
            y = sum(self._scaled_row(scaled[t, r, v, j], r, [t, 0, v, j]) for r in rows)
            T.buffer_store(self.out, y + self.bias[t, v, j] if kernel.bias else y, [m, n])

    def _scaled_row(self, total, row, at):
        """Return a total as a float, with the scale of its row, if that has one."""
        if self.sum_type == "int32":
            total = T.Cast("float32", total) * T.Cast("float32", self.ws[at])
        return total if self.kernel.per_group else total * self.sx[row, 0]


def build(kernel: LinearKernel, isa: InstructionSet, decisions: dict[str, int] | None = None):
    """Return the scheduled PrimFunc of a matrix product, or the one around a loop in assembly where there is one."""
    if linear_panels.loop_for(kernel, isa):
        return linear_panels.build(kernel, isa, decisions)
    plan = Plan(**(decisions or default(kernel, isa)))
    conversions = ["unpack"] if kernel.bits == 4 else []
    conversions += ["scales", "magic"] if _sums_become_floats(kernel, isa, plan) else ["scales"]
    conversions += ["offsets"] if kernel.offsets else []
    scheduled = schedule(define(kernel, isa, plan), kernel, isa, plan, "scaled", conversions)
    return scheduled.mod["main"].with_attr("global_symbol", kernel.name)
