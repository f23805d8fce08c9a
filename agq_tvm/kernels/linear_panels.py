"""The matrix product of prefill around an inner loop in assembly: what `linear.define` says, bit for bit in integers.

How a loop is called is in `linear_assembly.py`. Groups have factors, which are unpacked beside their codes. The offsets
of asymmetric weights, a product of its own of G channels, are what the float sums start at.
"""

from agq_tvm.kernels.emit import float32, lane_chunks
from agq_tvm.kernels.intrin import assembly
from agq_tvm.kernels.intrin.assembly import MAGIC, Assembly, Form, unroll_of
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.linear_assembly import FLOATS, WORD, Panels, space_of_panels
from agq_tvm.kernels.linear_operands import declare_operands
from agq_tvm.kernels.space import Space
from agq_tvm.tvm_seam import T, tirx

_GROUPS = 1365
"""The scales of a tile's last row are as far from the first as an instruction's offset reaches: 3 · 1365 · 4 bytes."""


def loop_for(kernel, isa: InstructionSet) -> Assembly | None:
    """Return an instruction set's loop for a `LinearKernel`, or None where there is none in assembly."""
    own = kernel.activation_bits == 4 and isa.multiply_4x4 is not None
    loop = isa.assembly_4x4 if own else isa.assembly
    if loop is None or kernel.bits != 4 or kernel.packed or kernel.groups > _GROUPS or kernel.offsets == "grid":
        return None
    return loop if kernel.rows % loop.rows == 0 and kernel.group_size in loop.groups else None


def space(kernel, isa: InstructionSet, threads: int = 1) -> Space:
    """Return the decisions of a product whose inner loop is in assembly."""
    return space_of_panels(kernel, loop_for(kernel, isa), isa, threads)


class _Scaled(Panels):
    """The parts of a product whose groups have float scales, as they are emitted."""

    def __init__(self, kernel, isa: InstructionSet, decisions: dict[str, int] | None):
        super().__init__(kernel, isa, loop_for(kernel, isa), decisions)
        self.narrow = self.loop is isa.assembly_4x4
        unroll = min(unroll_of(groups, self.blocks) for groups in (self.panel, self.last, kernel.groups))
        self.form = Form(kernel.per_group, self.blocks, kernel.groups, unroll)
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
        self.codes = self.allocate_codes("float32")
        # [calls, panel's groups, factors, 4]
        self.scaled = T.sblock_alloc_buffer((self.calls * groups * len(self.factors) * FLOATS,), "float32")
        # [code rows / R, chunks, R, chunk], see `Assembly.chunk`
        self.sums = T.sblock_alloc_buffer((self.kernel.code_rows * width,), "float32")
        self.magic = T.sblock_alloc_buffer((16,), "float32")
        if self.kernel.offsets:
            # [G, width], [R, width] and [R, G]
            self.offsets = T.sblock_alloc_buffer((self.kernel.groups * width,), "float32")
            self.first = T.sblock_alloc_buffer((self.loop.rows * width,), "float32")
            self.code_sums = T.sblock_alloc_buffer((self.loop.rows * self.kernel.groups,), "float32")

    def unpack(self, t, panel, groups) -> None:
        """Unpack the codes of a panel, those of each call by themselves, and its factors."""
        operands = {
            "packed": self.packed(t, panel),
            "codes": self.codes.access_ptr("w"),
            "next_codes": self.codes.access_ptr("w", offset=self.codes_of_call * (self.calls - 1) // WORD),
            "count": T.Cast("int64", groups * self.blocks),
        }
        assert tuple(operands) == assembly.UNPACK_OPERANDS
        T.evaluate(tirx.call_extern("void", self.unpack_symbol, *operands.values()))
        self._scale(t, panel, groups)

    def _scale(self, t, panel, groups) -> None:
        """Store the factors of a panel, call by call."""
        with T.serial(groups) as i:
            g = panel * self.panel + i
            for call in range(self.calls):
                for place, (kind, vector) in enumerate(self.factors):
                    column = call * self.loop.columns + vector * FLOATS
                    value = self.vector(self.ws, t, g, column)
                    if self.loop.running and not self.kernel.per_group:
                        follows = T.Select(i + 1 < groups, float32(1), float32(0))
                        after = self.vector(self.ws, t, tirx.min(g + 1, self.kernel.groups - 1), column)
                        value = value - after * T.broadcast(follows, FLOATS)
                    factor = (-MAGIC if kind == "t" else 1.0) / self.loop.code_scale(self.kernel.per_group)
                    at = ((call * self.panel + i) * len(self.factors) + place) * FLOATS
                    value = value * T.broadcast(float32(factor), FLOATS)
                    T.buffer_store(self.scaled, value, [tirx.Ramp(at, 1, FLOATS)])

    def start(self, t) -> None:
        """Let the sums start at what the offsets give, or at 0."""
        self._start_sums(t)
        T.buffer_store(self.magic, T.broadcast(float32(MAGIC), 16), [tirx.Ramp(0, 1, 16)])

    def _start_sums(self, t) -> None:
        rows, zero = self.loop.rows, T.broadcast(float32(0), FLOATS)
        if not self.kernel.offsets:
            with T.serial(self.kernel.code_rows * self.layout.width // FLOATS) as i:
                T.buffer_store(self.sums, zero, [tirx.Ramp(i * FLOATS, 1, FLOATS)])
            return
        width = self.layout.width
        with T.serial(self.kernel.groups) as g:
            for column in range(0, width, FLOATS):
                eights = self.vector(self.ws, t, g, column) * T.broadcast(float32(8), FLOATS)
                value = self.vector(self.wo, t, g, column) + eights
                T.buffer_store(self.offsets, value, [tirx.Ramp(g * width + column, 1, FLOATS)])
        vectors = [(r, i) for r in range(rows) for i in range(0, width, FLOATS)]
        with T.serial(self.kernel.code_rows // rows) as m:
            self._code_sums(m)
            for r, i in vectors:
                T.buffer_store(self.first, zero, [tirx.Ramp(r * width + i, 1, FLOATS)])
            with T.serial(self.kernel.groups) as g:
                for r, i in vectors:
                    at = tirx.Ramp(r * width + i, 1, FLOATS)
                    x = T.broadcast(self.code_sums[r * self.kernel.groups + g], FLOATS)
                    offsets = self.offsets[tirx.Ramp(g * width + i, 1, FLOATS)]
                    T.buffer_store(self.first, self.first[at] + offsets * x, [at])
            for r, i in vectors:
                value = self.first[tirx.Ramp(r * width + i, 1, FLOATS)]
                T.buffer_store(self.sums, value, [self.sums_at(m, r, i)])

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

    def call(self, panel, groups, m, call: int) -> None:
        """Sum a panel of groups for a tile of rows and the columns of a call."""
        kernel, rows = self.kernel, self.loop.rows
        scales = m * (rows * kernel.groups) + panel * self.panel if kernel.per_group else 0
        operands = {
            "x": self.codes_of_rows(panel, m),
            "codes": self.codes.access_ptr("r", offset=call * self.codes_of_call // WORD),
            "factors": self.scaled.access_ptr("r", offset=call * self.panel * len(self.factors) * FLOATS),
            "scales": self.sx.access_ptr("r", offset=scales),
            "sums": self.sums_of(m, call),
            "count": T.Cast("int64", groups // self.form.unroll),
            "stride": self.stride,
            "magic": self.magic.access_ptr("r"),
        }
        assert tuple(operands) == assembly.OPERANDS
        T.evaluate(tirx.call_extern("void", self.symbol, *operands.values()))

    def finish(self, t) -> None:
        """Put the terms together, with the scales of rows and the bias."""
        kernel, rows = self.kernel, self.loop.rows
        tiles = kernel.rows // rows
        with T.serial(tiles) as m:
            for r in range(rows):
                for column in range(0, self.layout.width, FLOATS):
                    value = None
                    for term in range(kernel.terms):
                        tile = m + term * tiles
                        part = self.sums[self.sums_at(tile, r, column)]
                        if not kernel.per_group:
                            part = part * T.broadcast(self.sx[tile * rows + r, 0], FLOATS)
                        value = part if value is None else value + part
                    self.store(t, m * rows + r, column, value)


def build(kernel, isa: InstructionSet, decisions: dict[str, int] | None = None):
    """Return the PrimFunc of a matrix product, of the operands of `declare_operands`."""
    return _Scaled(kernel, isa, decisions).emit()
