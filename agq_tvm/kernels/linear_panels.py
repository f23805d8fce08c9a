"""The matrix product of prefill around an inner loop in assembly: what `linear.define` says, bit for bit in integers.

Threads take tiles of columns. A tile's codes and factors are unpacked for a panel of channels, then rows pass over
them, as many at a time as the loop has registers for. Float sums are in memory between panels. The offsets of
asymmetric weights, a product of its own of G channels, are what the sums start at.
"""

from agq_tvm.kernels.emit import float32, lane_chunks, task_loop
from agq_tvm.kernels.intrin import assembly
from agq_tvm.kernels.intrin.assembly import MAGIC, Assembly, Form, unroll_of
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.layout import K_BLOCK
from agq_tvm.kernels.linear_operands import declare_operands
from agq_tvm.kernels.space import Space
from agq_tvm.tvm_seam import IRBuilder, T, tirx

_FLOATS = 4
_GROUPS = 1365
"""The scales of a tile's last row are as far from the first as an instruction's offset reaches: 3 · 1365 · 4 bytes."""


def loop_for(kernel, isa: InstructionSet) -> Assembly | None:
    """Return an instruction set's loop for a `LinearKernel`, or None where there is none in assembly."""
    own = kernel.activation_bits == 4 and isa.multiply_4x4 is not None
    loop = isa.assembly_4x4 if own else isa.assembly
    if loop is None or kernel.bits != 4 or kernel.packed or kernel.groups > _GROUPS:
        return None
    return loop if kernel.rows % loop.rows == 0 and kernel.group_size in loop.groups else None


def default(kernel, isa: InstructionSet) -> dict[str, int]:
    """Return the decisions made by hand."""
    return {
        "panel": min(kernel.groups, loop_for(kernel, isa).panel // kernel.group_size),
        "rows_first": 1,
        "parallel": 1,
    }


def space(kernel, isa: InstructionSet, threads: int = 1) -> Space:
    """Return the decisions of a product whose inner loop is in assembly.

    panel
        Groups that a call goes through; their codes are unpacked together.
    rows_first
        Whether a tile of rows takes all columns of the panel before the next one does, or the other way round.
    parallel
        Whether threads share the tiles of columns.
    """
    made = default(kernel, isa)
    most = made["panel"]
    panels = {most, *(most // n for n in (2, 3, 4, 6, 8, 12, 16) if most // n), *(n for n in (2, 4, 8) if n <= most)}
    calls = isa.layout_4bit.width // loop_for(kernel, isa).columns
    choices = {
        "panel": tuple(sorted(panels)),
        "rows_first": (0, 1) if calls > 1 else (1,),
        "parallel": (0, 1) if threads > 1 else (1,),
    }
    return Space(choices, made)


class _Product:
    """The parts of one product, as they are emitted."""

    def __init__(self, kernel, isa: InstructionSet, decisions: dict[str, int]):
        self.kernel, self.loop, self.layout = kernel, loop_for(kernel, isa), isa.layout_4bit
        self.narrow = self.loop is isa.assembly_4x4
        self.blocks = kernel.group_size // K_BLOCK
        self.panel, self.rows_first = decisions["panel"], decisions["rows_first"]
        self.panels = -(-kernel.groups // self.panel)
        self.last = kernel.groups - (self.panels - 1) * self.panel
        unroll = min(unroll_of(self.panel, self.blocks), unroll_of(self.last, self.blocks))
        unroll = min(unroll, unroll_of(kernel.groups, self.blocks))
        self.form = Form(kernel.per_group, self.blocks, kernel.groups, unroll)
        self.calls = self.layout.width // self.loop.columns
        self.factors = self.loop.factors(kernel.per_group)

    @property
    def symbol(self) -> str:
        """Name of the function in assembly: the same text has the same name."""
        return f"agq_{self.layout.name}{'_a4' if self.narrow else ''}_{self.form.name}"

    @property
    def unpack_symbol(self) -> str:
        """Name of the function that unpacks."""
        return f"agq_{self.layout.name}_unpack_{'group' if self.kernel.per_group else 'token'}"

    def text(self) -> str:
        """Return LLVM's text of both functions."""
        loop = assembly.function(self.symbol, self.loop.lines(self.form), assembly.OPERANDS)
        return loop + assembly.function(
            self.unpack_symbol, self.loop.unpack(self.kernel.per_group), assembly.UNPACK_OPERANDS
        )

    def args(self):
        """Declare the operands."""
        args = declare_operands(self.kernel, self.layout)
        self.x, self.sx, self.xsum, self.w, self.ws = (args[name] for name in ("x", "sx", "xsum", "w", "ws"))
        self.wo, self.bias, self.out = args.get("wo"), args.get("bias"), args["out"]
        return args

    def allocate(self) -> None:
        """Allocate what a tile needs."""
        width, groups = self.layout.width, self.panel
        # Bytes, held as floats: TVM lets allocations share memory if one is not needed while the other is, and then
        # `access_ptr` must name the same type for both.
        self.codes = T.sblock_alloc_buffer((groups * self.kernel.group_size * width // _FLOATS,), "float32")
        self.scaled = T.sblock_alloc_buffer((self.calls * groups * len(self.factors) * _FLOATS,), "float32")
        self.sums = T.sblock_alloc_buffer((self.kernel.code_rows * width,), "float32")
        self.magic = T.sblock_alloc_buffer((16,), "float32")
        if self.kernel.offsets:
            self.offsets = T.sblock_alloc_buffer((self.kernel.groups * width,), "float32")
            self.start = T.sblock_alloc_buffer((self.loop.rows * width,), "float32")
            self.code_sums = T.sblock_alloc_buffer((self.loop.rows * self.kernel.groups,), "float32")

    def _vector(self, buffer, t, g, column: int):
        """Load 4 columns of a parameter [NT, G, V, L] as floats."""
        v, j = column // self.layout.lanes, column % self.layout.lanes
        return T.Cast(f"float32x{_FLOATS}", buffer.vload([t, g, v, j], f"{buffer.dtype}x{_FLOATS}"))

    def unpack(self, t, panel, groups) -> None:
        """Unpack the codes of a panel, those of each call by themselves."""
        size, first = self.panel * self.kernel.group_size * self.loop.columns, panel * (self.panel * self.blocks)
        operands = {
            "packed": tirx.address_of(self.w[t, first, 0, 0, 0, 0]),
            "codes": self.codes.access_ptr("w"),
            "next_codes": self.codes.access_ptr("w", offset=size * (self.calls - 1) // _FLOATS),
            "count": T.Cast("int64", groups * self.blocks),
        }
        assert tuple(operands) == assembly.UNPACK_OPERANDS
        T.evaluate(tirx.call_extern("void", self.unpack_symbol, *operands.values()))

    def scale(self, t, panel, groups) -> None:
        """Store the factors of a panel, call by call."""
        with T.serial(groups) as i:
            g = panel * self.panel + i
            for call in range(self.calls):
                for place, (kind, vector) in enumerate(self.factors):
                    column = call * self.loop.columns + vector * _FLOATS
                    value = self._vector(self.ws, t, g, column)
                    if self.loop.running and not self.kernel.per_group:
                        follows = T.Select(i + 1 < groups, float32(1), float32(0))
                        after = self._vector(self.ws, t, tirx.min(g + 1, self.kernel.groups - 1), column)
                        value = value - after * T.broadcast(follows, _FLOATS)
                    factor = (-MAGIC if kind == "t" else 1.0) / self.loop.code_scale(self.kernel.per_group)
                    at = ((call * self.panel + i) * len(self.factors) + place) * _FLOATS
                    value = value * T.broadcast(float32(factor), _FLOATS)
                    T.buffer_store(self.scaled, value, [tirx.Ramp(at, 1, _FLOATS)])

    def start_sums(self, t) -> None:
        """Let the sums start at what the offsets give, or at 0."""
        rows, chunk, zero = self.loop.rows, self.loop.chunk, T.broadcast(float32(0), _FLOATS)
        if not self.kernel.offsets:
            with T.serial(self.kernel.code_rows * self.layout.width // _FLOATS) as i:
                T.buffer_store(self.sums, zero, [tirx.Ramp(i * _FLOATS, 1, _FLOATS)])
            return
        width = self.layout.width
        with T.serial(self.kernel.groups) as g:
            for column in range(0, width, _FLOATS):
                eights = self._vector(self.ws, t, g, column) * T.broadcast(float32(8), _FLOATS)
                value = self._vector(self.wo, t, g, column) + eights
                T.buffer_store(self.offsets, value, [tirx.Ramp(g * width + column, 1, _FLOATS)])
        vectors = [(r, i) for r in range(rows) for i in range(0, width, _FLOATS)]
        with T.serial(self.kernel.code_rows // rows) as m:
            self._code_sums(m)
            for r, i in vectors:
                T.buffer_store(self.start, zero, [tirx.Ramp(r * width + i, 1, _FLOATS)])
            with T.serial(self.kernel.groups) as g:
                for r, i in vectors:
                    at = tirx.Ramp(r * width + i, 1, _FLOATS)
                    x = T.broadcast(self.code_sums[r * self.kernel.groups + g], _FLOATS)
                    offsets = self.offsets[tirx.Ramp(g * width + i, 1, _FLOATS)]
                    T.buffer_store(self.start, self.start[at] + offsets * x, [at])
            for r, i in vectors:
                at = ((m * (width // chunk) + i // chunk) * rows + r) * chunk + i % chunk
                value = self.start[tirx.Ramp(r * width + i, 1, _FLOATS)]
                T.buffer_store(self.sums, value, [tirx.Ramp(at, 1, _FLOATS)])

    def _code_sums(self, m) -> None:
        """Store the sums of the codes of a tile's rows, times their scales if there are scales of groups."""
        rows, groups = self.loop.rows, self.kernel.groups
        chunks, lanes = lane_chunks(groups)
        for r in range(rows):
            with T.serial(chunks) as c, T.vectorized(lanes) as j:
                g = c * lanes + j
                x = T.Cast("float32", self.xsum[m * rows + r, g])
                x = x * self.sx[m * rows + r, g] if self.kernel.per_group else x
                T.buffer_store(self.code_sums, x, [r * groups + g])

    def multiply(self, panel, groups) -> None:
        """Call the loop for every tile of rows."""
        kernel, loop = self.kernel, self.loop
        rows = kernel.code_rows // loop.rows
        for calls in [range(self.calls)] if self.rows_first else [[call] for call in range(self.calls)]:
            with T.serial(rows) as m:
                self._multiply_rows(panel, groups, m, calls)

    def _multiply_rows(self, panel, groups, m, calls) -> None:
        kernel, loop = self.kernel, self.loop
        tile, size = loop.rows * K_BLOCK, self.panel * kernel.group_size * loop.columns
        for call in calls:
            first = panel * self.panel
            operands = {
                "x": self.x.access_ptr("r", offset=first * self.blocks * kernel.code_rows * K_BLOCK + m * tile),
                "codes": self.codes.access_ptr("r", offset=call * size // _FLOATS),
                "factors": self.scaled.access_ptr("r", offset=call * self.panel * len(self.factors) * _FLOATS),
                "scales": self.sx.access_ptr(
                    "r", offset=m * (loop.rows * kernel.groups) + first if kernel.per_group else 0
                ),
                "sums": self.sums.access_ptr(
                    "rw", offset=m * (loop.rows * self.layout.width) + call * loop.rows * loop.columns
                ),
                "count": T.Cast("int64", groups // self.form.unroll),
                "stride": T.int64(kernel.code_rows * K_BLOCK - tile + 64),
                "magic": self.magic.access_ptr("r"),
            }
            assert tuple(operands) == assembly.OPERANDS
            T.evaluate(tirx.call_extern("void", self.symbol, *operands.values()))

    def finish(self, t) -> None:
        """Put the terms together, with the scales of rows and the bias."""
        kernel, rows, chunk, width = self.kernel, self.loop.rows, self.loop.chunk, self.layout.width
        tiles = kernel.rows // rows
        with T.serial(tiles) as m:
            for r in range(rows):
                for column in range(0, width, _FLOATS):
                    value = None
                    for term in range(kernel.terms):
                        tile = m + term * tiles
                        at = ((tile * (width // chunk) + column // chunk) * rows + r) * chunk + column % chunk
                        part = self.sums[tirx.Ramp(at, 1, _FLOATS)]
                        if not kernel.per_group:
                            part = part * T.broadcast(self.sx[tile * rows + r, 0], _FLOATS)
                        value = part if value is None else value + part
                    if kernel.bias:
                        v, j = column // self.layout.lanes, column % self.layout.lanes
                        value = value + self.bias.vload([t, v, j], f"float32x{_FLOATS}")
                    T.buffer_store(self.out, value, [m * rows + r, tirx.Ramp(t * width + column, 1, _FLOATS)])


def build(kernel, isa: InstructionSet, decisions: dict[str, int] | None = None):
    """Return the PrimFunc of a matrix product, of the operands of `declare_operands`."""
    decisions = decisions or default(kernel, isa)
    product, tiles = _Product(kernel, isa, decisions), isa.layout_4bit.tiles(kernel.columns)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(kernel.name)
            T.func_attr({"global_symbol": kernel.name, "tirx.noalias": True})
            *inputs, out = product.args().values()
            with (
                T.attr(tirx.const(0, "int32"), "pragma_import_llvm", product.text()),
                task_loop("tile", tiles, inputs, [out], 1 if decisions["parallel"] else tiles) as t,
            ):
                product.allocate()
                product.start_sums(t)
                T.buffer_store(product.magic, T.broadcast(float32(MAGIC), 16), [tirx.Ramp(0, 1, 16)])
                with T.serial(product.panels) as panel:
                    groups = tirx.min(product.kernel.groups - panel * product.panel, product.panel)
                    product.unpack(t, panel, groups)
                    product.scale(t, panel, groups)
                    product.multiply(panel, groups)
                product.finish(t)
    return builder.get()
