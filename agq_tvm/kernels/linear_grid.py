"""The matrix product of weights on an integer grid: one integer for each result, one scale for a column.

    w[n, k] = unit[n] · (step[g, n] · q[n, k] + low[g, n])             q 0..15, in brackets -128..127
    total[m, n] = Σ_k q_x[m, k] · (step · q + low)                     (integers)
    out[m, n] = s_x[m] · unit[n] · total[m, n] + bias[n]

Groups keep steps and offsets of their own, and cost nothing where they end: 4-bit codes become bytes of their column,
once for many rows or in registers for one, and bytes are summed over all channels (two levels of scales, as in QServe
by Lin et al., 2024). Where the inner loop is written in assembly, `linear_grid_panels.py` has what takes a schedule's
place. Instruction sets that multiply bytes no faster than 4-bit codes have no such kernels: there the same weights have
the scales unit · step and offsets unit · low of `linear.py`.
"""

from dataclasses import dataclass

from agq_tvm.errors import AgqError
from agq_tvm.kernels import linear_grid_panels
from agq_tvm.kernels.intrin.base import ACTIVATION_LIMIT, InstructionSet
from agq_tvm.kernels.intrin.grid_intrin import ZERO, grid_code
from agq_tvm.kernels.layout import K_BLOCK, k_blocks
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_assembly import default_panels, space_of_panels
from agq_tvm.kernels.linear_fetch import emit_fetch
from agq_tvm.kernels.linear_operands import declare_operands
from agq_tvm.kernels.linear_schedule import Plan, row_tile, schedule
from agq_tvm.kernels.linear_space import most_sums
from agq_tvm.kernels.space import Space, divisors
from agq_tvm.tvm_seam import IRBuilder, T

OPERANDS = ("w", "step", "low", "ws", "bias")
"""Packed parameters of a linear that are operands of `define`, in order."""
_FEW_ROWS = 16
_FEW_ROWS_FETCHED = 8
"""Up to which it does not pay to put all codes on their grid in memory: without and with a fetch of the next."""
_MOST_ROWS = 16
"""Of a register tile."""
_CHUNKS = (4, 8, 9, 12, 16, 18, 32)
"""k-blocks of a chunk."""
_CHUNK = {"avx512vnni": 8}
_OTHER_CHUNK = 4
"""The same by default, at most; no more than there are tiles of rows, see `linear_fetch.py`."""
_INT32_LIMIT = (1 << 31) - 1


@dataclass(frozen=True)
class GridKernel:
    """Everything that distinguishes one compiled product on an integer grid from another.

    Attributes
    ----------
    rows, columns, channels : int
        M, N and K; K is padded to whole groups.
    group_size : int
        Channels of a column that share a step and a low.
    bias : bool
        Whether a float32 vector is added to the result.
    activation_bits : int
        8 for activation codes -127..127, 4 for -7..7.

    Raises
    ------
    AgqError
        If sums over so many channels may leave 32 bits.
    """

    rows: int
    columns: int
    channels: int
    group_size: int
    bias: bool
    activation_bits: int = 8

    def __post_init__(self) -> None:
        most = _INT32_LIMIT // ((2 * ZERO - 1) * (ACTIVATION_LIMIT if self.activation_bits == 8 else 7))
        if self.channels > most:
            raise AgqError(f"sums of bytes over {self.channels} channels may leave 32 bits: {most} are the most")

    @property
    def bits(self) -> int:
        """Bits of the weights."""
        return 4

    @property
    def code_rows(self) -> int:
        """Rows of activation codes."""
        return self.rows

    @property
    def code_sums(self) -> int:
        """Sums of the codes of a row: one."""
        return 1

    @property
    def per_group(self) -> bool:
        """Whether activations have a scale for each group: never."""
        return False

    @property
    def offsets(self) -> str:
        """What `LinearKernel` calls the weights' form."""
        return "grid"

    @property
    def blocks(self) -> int:
        """KB, the number of k-blocks."""
        return k_blocks(self.channels, self.group_size)

    @property
    def groups(self) -> int:
        """G, the number of groups along K."""
        return -(-self.channels // self.group_size)

    @property
    def name(self) -> str:
        """E.g. ``linear_w4a8g32_grid_m128_n4096_k4096``."""
        bias = "_bias" if self.bias else ""
        sizes = f"m{self.rows}_n{self.columns}_k{self.channels}"
        return f"linear_w4a{self.activation_bits}g{self.group_size}_grid{bias}_{sizes}"


def applies(kernel: GridKernel, isa: InstructionSet) -> bool:
    """Whether an instruction set has this kernel: loops in assembly are for whole tiles of rows."""
    return isa.grids and (isa.assembly is None or linear_grid_panels.loop_for(kernel, isa) is not None)


def choose(
    isa: InstructionSet, rows: int, columns: int, channels: int, group_size: int, bias: bool, activation_bits: int = 8
) -> GridKernel | LinearKernel:
    """Return the product that is the faster one: this, or that of `linear.py` with scales and offsets of groups.

    One row waits for memory, and many rows share codes that are put on their grid once. Between them the ends of groups
    cost less than either. Loops in assembly are ahead for whole tiles of rows, however few.
    """
    kernel = GridKernel(rows, columns, channels, group_size, bias, activation_bits)
    few = 1 < rows <= (_FEW_ROWS_FETCHED if isa.ahead else _FEW_ROWS)
    if applies(kernel, isa) and (isa.assembly or not few):
        return kernel
    return LinearKernel(rows, columns, channels, 4, group_size, False, "grid", bias, activation_bits)


def default(kernel: GridKernel, isa: InstructionSet) -> dict[str, int]:
    """Return the decisions made by hand."""
    loop = linear_grid_panels.loop_for(kernel, isa)
    return default_panels(kernel, loop) if loop else _scheduled(kernel, isa)


def _scheduled(kernel: GridKernel, isa: InstructionSet) -> dict[str, int]:
    """Return the decisions made by hand for a kernel that has a schedule."""
    one_row, rows = kernel.rows == 1, row_tile(kernel.rows, isa.product_rows)
    chunk = min(_CHUNK.get(isa.family, _OTHER_CHUNK), kernel.rows // rows)
    return {
        "rows": rows,
        "vectors": isa.layout_4bit.vectors,
        "chunk": kernel.blocks if one_row else row_tile(kernel.blocks, chunk),
        "split": 0,
        "blocks": 1,
        "parallel": 1,
        "columns_first": 0,
        "ahead": isa.ahead if one_row else int(isa.ahead > 0),
    }


def space(kernel: GridKernel, isa: InstructionSet, threads: int = 1) -> Space:
    """Return the decisions of a product, with the meaning that they have for `linear_schedule.Plan`.

    chunk
        k-blocks whose products are summed in registers, and whose codes are unpacked together.
    ahead
        How far ahead packed codes are fetched: k-blocks for one row; for more chunks, so that memory is read while
        rows are multiplied, and not only while codes are unpacked.
    """
    loop = linear_grid_panels.loop_for(kernel, isa)
    if loop:
        return space_of_panels(kernel, loop, isa, threads)
    made, V, several = _scheduled(kernel, isa), isa.layout_4bit.vectors, threads > 1
    one_row = kernel.rows == 1
    choices = {
        "rows": divisors(kernel.rows, _MOST_ROWS),
        "vectors": divisors(V, V),
        "chunk": tuple(chunk for chunk in (*_CHUNKS, kernel.blocks) if kernel.blocks % chunk == 0),
        "split": (0, 1),
        "blocks": (1, 2, 4) if several else (1,),
        "parallel": (0, 1) if several else (1,),
        "columns_first": (0, 1),
        "ahead": (0, 2, 4, 8, 16, 32) if one_row else (0, 1),
    }
    choices = {name: tuple(sorted({made[name], *values})) for name, values in choices.items()}
    return Space(choices, made, lambda d: d == made or all(_fits(kernel, isa, d)))


def _fits(kernel: GridKernel, isa: InstructionSet, d: dict[str, int]):
    partial = d["vectors"] < isa.layout_4bit.vectors
    yield d["rows"] * d["vectors"] <= most_sums(isa)
    yield kernel.rows % (d["rows"] * d["blocks"]) == 0
    yield partial or not (d["split"] or d["columns_first"])
    yield not d["split"] or (d["blocks"] == 1 and not d["columns_first"])
    yield not d["columns_first"] or d["rows"] < kernel.rows
    yield d["parallel"] or not (d["split"] or d["blocks"] > 1)


def define(kernel: GridKernel, isa: InstructionSet, decisions: dict[str, int] | None = None):
    """Return the matrix product as unscheduled TIR.

    The buffers are those of `declare_operands`; inside there are chunks C of k-blocks, and TV vectors of a tile.
    """
    decisions = decisions or _scheduled(kernel, isa)
    layout, less = isa.layout_4bit, ZERO
    M, KB, NT, GB = kernel.rows, kernel.blocks, layout.tiles(kernel.columns), kernel.group_size // K_BLOCK
    S, V, L, D = layout.steps, layout.vectors, layout.lanes, layout.depth
    CB, TV = decisions["chunk"], V if M == 1 else decisions["vectors"]
    C = KB // CB
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(kernel.name)
            T.func_attr({"global_symbol": kernel.name, "tirx.noalias": True})
            args = declare_operands(kernel, layout)
            x, sx, xsum, w, step, low, ws = (args[n] for n in ("x", "sx", "xsum", "w", "step", "low", "ws"))
            bias, out = args.get("bias"), args["out"]
            codes = T.sblock_alloc_buffer((NT, V // TV, KB, S, 2, TV, L, D), "uint8")
            dot = T.sblock_alloc_buffer((NT, C, M, V, L), "int32")
            total = T.sblock_alloc_buffer((NT, M, V, L), "int32")
            with T.grid(*codes.shape) as loops, T.sblock("unpack"):
                t, p, kb, s, h, v, j, i = T.axis.remap("SSSSSSSS", loops)
                g, column = kb // GB, p * TV + v
                code = grid_code(w[t, kb, s, column, j, i], h, layout, step[t, g, column, j], low[t, g, column, j])
                T.buffer_store(codes, code, [t, p, kb, s, h, v, j, i])
            with T.grid(*dot.shape, CB, S, 2, D) as loops, T.sblock("dot"):
                t, c, m, v, j, b, s, h, i = T.axis.remap("SSSSSRRRR", loops)
                with T.init():
                    T.buffer_store(dot, T.int32(0), [t, c, m, v, j])
                block = c * CB + b
                code = T.Cast("int32", codes[t, v // TV, block, s, h, v % TV, j, i])
                product = T.Cast("int32", x[block, m, s, h, i]) * code
                T.buffer_store(dot, dot[t, c, m, v, j] + product, [t, c, m, v, j])
            fetched = emit_fetch(w, C, M // decisions["rows"]) if _plan(kernel, decisions).fetches else None
            with T.grid(*total.shape, C) as loops, T.sblock("total"):
                t, m, v, j, c = T.axis.remap("SSSSR", loops)
                waits = [] if fetched is None else [fetched[t, c, m // decisions["rows"]]]
                T.reads(dot[t, c, m, v, j], *waits)
                T.writes(total[t, m, v, j])
                with T.init():
                    T.buffer_store(total, T.int32(0), [t, m, v, j])
                T.buffer_store(total, total[t, m, v, j] + dot[t, c, m, v, j], [t, m, v, j])
            with T.grid(*out.shape) as loops, T.sblock("out"):
                m, n = T.axis.remap("SS", loops)
                t, v, j = n // layout.width, n % layout.width // L, n % L
                value = T.Cast("float32", total[t, m, v, j] - xsum[m, 0] * less)
                y = value * T.Cast("float32", ws[t, 0, v, j]) * sx[m, 0]
                T.buffer_store(out, y + bias[t, v, j] if kernel.bias else y, [m, n])
    return builder.get()


def _plan(kernel: GridKernel, decisions: dict[str, int]) -> Plan:
    return Plan(inline=kernel.rows == 1, **{name: value for name, value in decisions.items() if name != "chunk"})


def build(kernel: GridKernel, isa: InstructionSet, decisions: dict[str, int] | None = None):
    """Return the scheduled PrimFunc of a matrix product: a chunk of k-blocks takes the place of a group.

    Raises
    ------
    AgqError
        If the instruction set has no such kernels, or none for so many rows.
    """
    if not applies(kernel, isa):
        rows = f" for {kernel.rows} rows in groups of {kernel.group_size}" if isa.grids else ""
        raise AgqError(f"there are no kernels for integer grids on {isa.name}{rows}: take those of `linear.py`")
    if isa.assembly:
        return linear_grid_panels.build(kernel, isa, decisions)
    decisions = decisions or _scheduled(kernel, isa)
    func, plan = define(kernel, isa, decisions), _plan(kernel, decisions)
    scheduled = schedule(func, kernel, isa, plan, "total", ["unpack"], grid=True)
    return scheduled.mod["main"].with_attr("global_symbol", kernel.name)
