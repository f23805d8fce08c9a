"""Operands of a product on an integer grid and its exact result, computed by numpy on plain [M, K] and [N, K] codes."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import tvm

from agq_tvm.flow.packing import pack_codes
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_grid import GridKernel
from tests.kernels.operands import LIMIT


@dataclass
class GridOperands:
    """Codes in their plain order, and everything that a kernel reads.

    Attributes
    ----------
    x, q : int8 [M, K], uint8 [N, K]
    steps, lows : int [N, G]
    sx, units, bias
        float arrays [M, 1], [N, 1], [N] or None.
    """

    kernel: GridKernel | LinearKernel
    x: np.ndarray
    q: np.ndarray
    steps: np.ndarray
    lows: np.ndarray
    sx: np.ndarray
    units: np.ndarray
    bias: np.ndarray | None

    def weights(self) -> np.ndarray:
        """Return step · q + low, int64 [N, K]."""
        groups = np.arange(self.kernel.channels) // self.kernel.group_size
        return self.steps[:, groups] * self.q.astype("int64") + self.lows[:, groups]

    def totals(self) -> np.ndarray:
        """Return Σ x (step · q + low), int64 [M, N]."""
        return self.x.astype("int64") @ self.weights().T

    def expected(self) -> np.ndarray:
        """Return the result in float64, [M, N]."""
        y = self.totals() * self.units.T.astype("float64") * self.sx
        return y if self.bias is None else y + self.bias

    def integer_form(self) -> "GridOperands":
        """Return the same codes with scales 1, so that results are integers, rounded once to float32."""
        ones, bias = np.ones_like, None if self.bias is None else np.zeros_like(self.bias)
        return replace(self, sx=ones(self.sx), units=ones(self.units), bias=bias)

    def run(self, function, isa: InstructionSet) -> np.ndarray:
        """Call a compiled kernel: float32 [M, N]."""
        kernel, layout = self.kernel, isa.layout_4bit
        x = np.zeros((kernel.rows, kernel.groups * kernel.group_size), "int8")
        x[:, : kernel.channels] = self.x
        summed = x.reshape(kernel.rows, 1 if isinstance(kernel, GridKernel) else kernel.groups, -1)
        x = x.reshape(kernel.rows, -1, layout.steps, 2, layout.depth).transpose(1, 0, 2, 3, 4)
        arrays = [
            np.ascontiguousarray(x),
            self.sx,
            summed.sum(2, dtype="int32"),
            pack_codes(self.q, kernel.group_size, layout),
            layout.pack_columns(self.steps.astype("uint8")),
            layout.pack_columns((self.lows + 128).astype("uint8")),
            layout.pack_columns(self.units),
            *([] if self.bias is None else [np.ascontiguousarray(layout.pack_columns(self.bias[:, None])[:, 0])]),
        ]
        # Full of NaN, so that an element that is not written shows.
        out = tvm.runtime.tensor(np.full((kernel.rows, layout.tiles(kernel.columns) * layout.width), np.nan, "float32"))
        function(*(tvm.runtime.tensor(array) for array in arrays), out)
        return out.numpy()[:, : kernel.columns]


def random_grid(kernel: GridKernel | LinearKernel, seed: int = 0) -> GridOperands:
    """Draw codes over their whole range, and grids that reach to either end of a byte."""
    rng, limit = np.random.default_rng(seed), LIMIT[kernel.activation_bits]
    M, N, K, G = kernel.rows, kernel.columns, kernel.channels, kernel.groups
    steps = rng.integers(1, 18, (N, G))
    return GridOperands(
        kernel,
        rng.integers(-limit, limit + 1, (M, K)).astype("int8"),
        rng.integers(0, 16, (N, K)).astype("uint8"),
        steps,
        rng.integers(-128, 128 - 15 * steps),
        rng.uniform(0.5, 2, (M, 1)).astype("float32"),
        rng.uniform(0.5, 1, (N, 1)).astype("float16"),
        rng.standard_normal(N).astype("float32") if kernel.bias else None,
    )


def grid_corners(kernel: GridKernel | LinearKernel) -> dict[str, GridOperands]:
    """All codes at the ends of their ranges, on the grids that reach furthest."""
    base, limit, full = random_grid(kernel), LIMIT[kernel.activation_bits], np.full_like
    return {
        f"x={x} q={q} step={step} low={low}": replace(
            base, x=full(base.x, x), q=full(base.q, q), steps=full(base.steps, step), lows=full(base.lows, low)
        )
        for x in (-limit, limit)
        for q in (0, 15)
        for step, low in ((1, -128), (1, 112), (17, -128))
    }


def every_byte(rows: int = 8) -> list[GridOperands]:
    """Every byte times every activation: a column for each code, a group for each step and the lows beside its ends.

    A row has an activation; operands by operands all are at some of a group's channels.
    """
    grids = [(step, low) for step in range(1, 18) for low in (-128, min(-1, 127 - 15 * step), 127 - 15 * step)]
    kernel = GridKernel(rows, 16, 32 * len(grids), 32, False)
    base = random_grid(kernel).integer_form()
    steps, lows = (np.tile([grid[i] for grid in grids], (16, 1)) for i in range(2))
    q = np.tile(np.arange(16, dtype="uint8")[:, None], (1, kernel.channels))
    made = []
    for first, place in itertools.product(range(-127, 128, rows), range(0, 32, 5)):
        x = np.zeros_like(base.x)
        x[:, place::32] = np.clip(first + np.arange(rows), -127, 127)[:, None]
        made.append(replace(base, x=x, q=q, steps=steps, lows=lows))
    return made


def at_the_bound(rows: int) -> GridOperands:
    """The longest rows whose sums are sure to stay within 32 bits, and their largest; the last row's are negative.

    Unsigned bytes, 255 for 127, come within a product of 2^31; signed ones to half of that.
    """
    kernel = GridKernel(rows, 16, ((1 << 31) - 1) // (255 * 127), 128, False)
    base = random_grid(kernel).integer_form()
    x = np.full_like(base.x, 127)
    x[-1] = -127
    return replace(base, x=x, q=base.q * 0 + 15, steps=base.steps * 0 + 17, lows=base.lows * 0 - 128)
