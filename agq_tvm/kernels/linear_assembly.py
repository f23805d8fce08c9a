"""Products of prefill around a loop in assembly: what `linear_panels.py` and `linear_grid_panels.py` share.

Threads take tiles of columns. A tile's codes are unpacked for a panel of channels, then rows pass over them, as many at
a time as the loop has registers for. Sums are in memory between panels.
"""

from agq_tvm.kernels.emit import task_loop
from agq_tvm.kernels.intrin.assembly import Assembly
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.layout import K_BLOCK
from agq_tvm.kernels.space import Space
from agq_tvm.tvm_seam import IRBuilder, T, tirx

FLOATS = 4
"""In a vector register."""
WORD = 4
"""Bytes of a sum."""


def default_panels(kernel, loop: Assembly) -> dict[str, int]:
    """Return the decisions made by hand for a product in groups around a loop."""
    return {"panel": min(kernel.groups, loop.panel // kernel.group_size), "rows_first": 1, "parallel": 1}


def space_of_panels(kernel, loop: Assembly, isa: InstructionSet, threads: int) -> Space:
    """Return the decisions of a product in groups around a loop.

    panel
        Groups that a call goes through; their codes are unpacked together.
    rows_first
        Whether a tile of rows takes all columns of the panel before the next one does, or the other way round.
    parallel
        Whether threads share the tiles of columns.
    """
    made = default_panels(kernel, loop)
    most = made["panel"]
    panels = {most, *(most // n for n in (2, 3, 4, 6, 8, 12, 16) if most // n), *(n for n in (2, 4, 8) if n <= most)}
    choices = {
        "panel": tuple(sorted(panels)),
        "rows_first": (0, 1) if isa.layout_4bit.width > loop.columns else (1,),
        "parallel": (0, 1) if threads > 1 else (1,),
    }
    return Space(choices, made)


class Panels:
    """How tiles, panels, and rows and columns of one follow each other.

    A product adds its parts: `args`, which declares its operands and keeps ``x``, ``w``, ``out`` and ``bias``; `text`
    of the functions in assembly; and, as they are emitted, `allocate` with ``sums``, `start` of the sums of a tile of
    columns, `unpack` of a panel, `call` for a tile of rows and the columns of a call, and `finish` of the tile.

    Parameters
    ----------
    kernel : LinearKernel or GridKernel
    isa : InstructionSet
    loop : Assembly
    decisions : dict or None
        A point of `space_of_panels`; the default if None.
    """

    def __init__(self, kernel, isa: InstructionSet, loop: Assembly, decisions: dict[str, int] | None):
        decisions = decisions or default_panels(kernel, loop)
        self.kernel, self.loop, self.layout = kernel, loop, isa.layout_4bit
        self.blocks = kernel.group_size // K_BLOCK
        self.panel, self.rows_first = decisions["panel"], decisions["rows_first"]
        self.parallel = decisions["parallel"]
        self.panels = -(-kernel.groups // self.panel)
        self.last = kernel.groups - (self.panels - 1) * self.panel
        self.calls = self.layout.width // loop.columns
        self.tile = loop.rows * K_BLOCK
        """Bytes of a k-block of a tile of rows."""

    def emit(self):
        """Return the PrimFunc."""
        tiles = self.layout.tiles(self.kernel.columns)
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True):
                T.func_name(self.kernel.name)
                T.func_attr({"global_symbol": self.kernel.name, "tirx.noalias": True})
                *inputs, out = self.args().values()
                with (
                    T.attr(tirx.const(0, "int32"), "pragma_import_llvm", self.text()),
                    task_loop("tile", tiles, inputs, [out], 1 if self.parallel else tiles) as t,
                ):
                    self.allocate()
                    self.start(t)
                    with T.serial(self.panels) as panel:
                        groups = tirx.min(self.kernel.groups - panel * self.panel, self.panel)
                        self.unpack(t, panel, groups)
                        self.multiply(panel, groups)
                    self.finish(t)
        return builder.get()

    def multiply(self, panel, groups) -> None:
        """Call the loop for every tile of rows."""
        rows = self.kernel.code_rows // self.loop.rows
        for calls in [range(self.calls)] if self.rows_first else [[call] for call in range(self.calls)]:
            with T.serial(rows) as m:
                for call in calls:
                    self.call(panel, groups, m, call)

    def allocate_codes(self, dtype: str):
        """Allocate the unpacked codes of a panel, bytes [calls, k-blocks, 32 x columns] in words of the sums' type.

        TVM lets allocations share memory if one is not needed while the other is, and then `access_ptr` must name the
        same type for both.
        """
        return T.sblock_alloc_buffer((self.calls * self.codes_of_call // WORD,), dtype)

    @property
    def codes_of_call(self) -> int:
        """Return the bytes of the unpacked codes of a panel that one call multiplies."""
        return self.panel * self.kernel.group_size * self.loop.columns

    def codes_of_rows(self, panel, m):
        """Return a pointer to a panel's first activation codes of a tile of rows."""
        first = panel * (self.panel * self.blocks)
        return self.x.access_ptr("r", offset=first * self.kernel.code_rows * K_BLOCK + m * self.tile)

    @property
    def stride(self):
        """Return the bytes from the last 64 of a k-block of a tile of rows to the next k-block."""
        return T.int64(self.kernel.code_rows * K_BLOCK - self.tile + 64)

    def packed(self, t, panel):
        """Return a pointer to a panel's packed codes."""
        return tirx.address_of(self.w[t, panel * (self.panel * self.blocks), 0, 0, 0, 0])

    def sums_of(self, m, call: int):
        """Return a pointer to the sums of one call."""
        offset = m * (self.loop.rows * self.layout.width) + call * self.loop.rows * self.loop.columns
        return self.sums.access_ptr("rw", offset=offset)

    def sums_at(self, m, r: int, column: int):
        """Return where the sums of 4 columns of a row of a tile are."""
        rows, chunk, width = self.loop.rows, self.loop.chunk, self.layout.width
        at = ((m * (width // chunk) + column // chunk) * rows + r) * chunk + column % chunk
        return tirx.Ramp(at, 1, FLOATS)

    def vector(self, buffer, t, g, column: int):
        """Load 4 columns of a parameter [NT, G, V, L] as floats."""
        v, j = column // self.layout.lanes, column % self.layout.lanes
        return T.Cast(f"float32x{FLOATS}", buffer.vload([t, g, v, j], f"{buffer.dtype}x{FLOATS}"))

    def store(self, t, row, column: int, value) -> None:
        """Store the results of 4 columns of a row, with their bias."""
        if self.kernel.bias:
            v, j = column // self.layout.lanes, column % self.layout.lanes
            value = value + self.bias.vload([t, v, j], f"float32x{FLOATS}")
        T.buffer_store(self.out, value, [row, tirx.Ramp(t * self.layout.width + column, 1, FLOATS)])
