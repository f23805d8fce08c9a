"""The matrix product of prefill on an integer grid around a loop in assembly: what `linear_grid.define` says.

How a loop is called is in `linear_assembly.py`. Codes are put on their grid as they are unpacked, as signed bytes, so
that totals run on from group to group and from panel to panel, and the sums of activations are not needed.
"""

from agq_tvm.kernels.intrin import assembly
from agq_tvm.kernels.intrin.assembly import Assembly, unroll_of
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.linear_assembly import FLOATS, WORD, Panels
from agq_tvm.kernels.linear_operands import declare_operands
from agq_tvm.tvm_seam import T, tirx


def loop_for(kernel, isa: InstructionSet) -> Assembly | None:
    """Return an instruction set's loop for a `GridKernel`, or None where there is none in assembly."""
    loop = isa.assembly
    if loop is None or loop.grid is None or kernel.rows % loop.rows:
        return None
    return loop if kernel.group_size in loop.groups else None


class _Gridded(Panels):
    """The parts of a product on an integer grid, as they are emitted."""

    def __init__(self, kernel, isa: InstructionSet, decisions: dict[str, int] | None):
        super().__init__(kernel, isa, loop_for(kernel, isa), decisions)
        # k-blocks of a round, which divide those of every panel
        self.unroll = min(unroll_of(groups * self.blocks, 1) for groups in (self.panel, self.last))

    @property
    def symbol(self) -> str:
        """Name of the function in assembly: the same text has the same name."""
        return f"agq_{self.layout.name}_grid_u{self.unroll}"

    @property
    def unpack_symbol(self) -> str:
        """Name of the function that unpacks."""
        return f"agq_{self.layout.name}_unpack_grid_b{self.blocks}"

    def text(self) -> str:
        """Return LLVM's text of both functions."""
        loop = assembly.function(self.symbol, self.loop.grid(self.unroll), assembly.GRID_OPERANDS)
        unpack = self.loop.unpack_grid(self.blocks)
        return loop + assembly.function(self.unpack_symbol, unpack, assembly.GRID_UNPACK_OPERANDS)

    def args(self):
        """Declare the operands."""
        args = declare_operands(self.kernel, self.layout)
        self.x, self.sx, self.w, self.ws = (args[name] for name in ("x", "sx", "w", "ws"))
        self.step, self.low, self.bias, self.out = args["step"], args["low"], args.get("bias"), args["out"]
        return args

    def allocate(self) -> None:
        """Allocate what a tile needs."""
        self.codes = self.allocate_codes("int32")
        # [M / R, chunks, R, chunk], see `Assembly.chunk`
        self.sums = T.sblock_alloc_buffer((self.kernel.rows * self.layout.width,), "int32")

    def start(self, t) -> None:
        """Let the totals start at 0."""
        with T.serial(self.kernel.rows * self.layout.width // FLOATS) as i:
            T.buffer_store(self.sums, T.broadcast(T.int32(0), FLOATS), [tirx.Ramp(i * FLOATS, 1, FLOATS)])

    def unpack(self, t, panel, groups) -> None:
        """Put the codes of a panel on their grid, those of each call by themselves."""
        operands = {
            "packed": self.packed(t, panel),
            "step": tirx.address_of(self.step[t, panel * self.panel, 0, 0]),
            "low": tirx.address_of(self.low[t, panel * self.panel, 0, 0]),
            "codes": self.codes.access_ptr("w"),
            "next_codes": self.codes.access_ptr("w", offset=self.codes_of_call * (self.calls - 1) // WORD),
            "count": T.Cast("int64", groups),
        }
        assert tuple(operands) == assembly.GRID_UNPACK_OPERANDS
        T.evaluate(tirx.call_extern("void", self.unpack_symbol, *operands.values()))

    def call(self, panel, groups, m, call: int) -> None:
        """Sum a panel for a tile of rows and the columns of a call."""
        operands = {
            "x": self.codes_of_rows(panel, m),
            "codes": self.codes.access_ptr("r", offset=call * self.codes_of_call // WORD),
            "sums": self.sums_of(m, call),
            "count": T.Cast("int64", groups * self.blocks // self.unroll),
            "stride": self.stride,
        }
        assert tuple(operands) == assembly.GRID_OPERANDS
        T.evaluate(tirx.call_extern("void", self.symbol, *operands.values()))

    def finish(self, t) -> None:
        """Scale the totals, once."""
        rows = self.loop.rows
        with T.serial(self.kernel.rows // rows) as m:
            for r in range(rows):
                for column in range(0, self.layout.width, FLOATS):
                    total = T.Cast(f"float32x{FLOATS}", self.sums[self.sums_at(m, r, column)])
                    value = total * self.vector(self.ws, t, 0, column)
                    value = value * T.broadcast(self.sx[m * rows + r, 0], FLOATS)
                    self.store(t, m * rows + r, column, value)


def build(kernel, isa: InstructionSet, decisions: dict[str, int] | None = None):
    """Return the PrimFunc of a matrix product, of the operands of `declare_operands`."""
    return _Gridded(kernel, isa, decisions).emit()
