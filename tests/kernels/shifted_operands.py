"""Operands of an integer-only product and its exact result, computed by numpy on plain [M, K] and [N, K] codes."""

from dataclasses import dataclass, replace

import numpy as np
import tvm

from agq_tvm.flow.packing import pack_codes
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.layout import K_BLOCK
from agq_tvm.kernels.linear_shifted import ShiftedKernel
from tests.kernels.operands import LIMIT


@dataclass
class ShiftedOperands:
    """Codes with their channels in falling order of exponents, and everything that a kernel reads.

    Attributes
    ----------
    x, q : int8 [M, K], uint8 [N, K]
    exponents : int [KB]
        Of the k-blocks, falling to 0.
    sx, scales, offsets, bias
        float arrays [M, 1], [N, 1], [N, 1] or None, [N].
    """

    kernel: ShiftedKernel
    x: np.ndarray
    q: np.ndarray
    exponents: np.ndarray
    sx: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None
    bias: np.ndarray

    def _powers(self) -> np.ndarray:
        return 2 ** np.repeat(self.exponents, K_BLOCK)[: self.kernel.channels].astype("int64")

    def sums(self) -> np.ndarray:
        """Return Σ x 2^exponent of every row, int64 [M, 1]."""
        return (self.x * self._powers()).sum(1, keepdims=True)

    def totals(self) -> np.ndarray:
        """Return Σ x q 2^exponent, int64 [M, N]."""
        return (self.x * self._powers()) @ self.q.T.astype("int64")

    def expected(self) -> np.ndarray:
        """Return the result in float64, [M, N]."""
        totals = self.totals() - (8 * self.sums() if self.offsets is None else 0)
        y = totals * self.scales.T.astype("float64")
        if self.offsets is not None:
            y = y + self.sums() * self.offsets.T.astype("float64")
        return y * self.sx + self.bias

    def integer_form(self) -> "ShiftedOperands":
        """Return the same codes with scale 1, so that results are integers: exact in float32 below 2^24."""
        offsets = None if self.offsets is None else np.zeros_like(self.offsets)
        ones = np.ones_like
        return replace(self, sx=ones(self.sx), scales=ones(self.scales), offsets=offsets, bias=np.zeros_like(self.bias))

    def run(self, function, isa: InstructionSet) -> np.ndarray:
        """Call a compiled kernel: float32 [M, N]."""
        kernel, layout = self.kernel, isa.layout_4bit
        x = np.zeros((kernel.rows, kernel.blocks * K_BLOCK), "int8")
        x[:, : kernel.channels] = self.x
        x = x.reshape(kernel.rows, kernel.blocks, layout.steps, 2, layout.depth).transpose(1, 0, 2, 3, 4)
        shift = -np.diff(self.exponents, prepend=self.exponents[:1])
        arrays = [
            np.ascontiguousarray(x),
            self.sx,
            self.sums().astype("int32"),
            pack_codes(self.q, K_BLOCK, layout),
            shift.astype("int32"),
            layout.pack_columns(self.scales),
            *([] if self.offsets is None else [layout.pack_columns(self.offsets)]),
            np.ascontiguousarray(layout.pack_columns(self.bias[:, None])[:, 0]),
        ]
        # Full of NaN, so that an element that is not written shows.
        out = np.full((kernel.rows, layout.tiles(kernel.columns) * layout.width), np.nan, "float32")
        out = tvm.runtime.tensor(out)
        function(*(tvm.runtime.tensor(array) for array in arrays), out)
        return out.numpy()[:, : kernel.columns]


def falling(blocks: int, largest: int, seed: int = 0) -> np.ndarray:
    """Draw exponents that fall from `largest` to 0 over so many blocks, at most; the last is always 0."""
    drawn = np.random.default_rng(seed).integers(0, largest + 1, blocks)
    drawn[0], drawn[-1] = largest, 0
    return np.sort(drawn)[::-1].copy()


def random_shifted(kernel: ShiftedKernel, largest: int = 4, seed: int = 0) -> ShiftedOperands:
    """Draw codes over their whole range, exponents up to `largest`, and scales and offsets of either sign."""
    rng, limit = np.random.default_rng(seed), LIMIT[kernel.activation_bits]
    M, N, K = kernel.rows, kernel.columns, kernel.channels
    return ShiftedOperands(
        kernel,
        rng.integers(-limit, limit + 1, (M, K)).astype("int8"),
        rng.integers(0, 16, (N, K)).astype("uint8"),
        falling(kernel.blocks, largest, seed),
        rng.uniform(0.5, 2, (M, 1)).astype("float32"),
        rng.standard_normal((N, 1)).astype("float16"),
        rng.standard_normal((N, 1)).astype(kernel.offsets) if kernel.offsets else None,
        rng.standard_normal(N).astype("float32"),
    )


def shifted_corners(kernel: ShiftedKernel) -> dict[str, ShiftedOperands]:
    """All codes at the ends of their ranges, and exponents that never, always, once by much, or first fall."""
    base, limit, KB = random_shifted(kernel), LIMIT[kernel.activation_bits], kernel.blocks
    corners = {
        f"x={x} q={q}": replace(base, x=np.full_like(base.x, x), q=np.full_like(base.q, q))
        for x in (-limit, limit)
        for q in (0, 15)
    }
    ladders = {
        "never": np.zeros(KB, int),
        "always": np.arange(KB)[::-1].clip(max=6),
        "last": np.append(np.full(KB - 1, 4), 0) if KB > 1 else np.zeros(1, int),
        "first": np.append(4, np.zeros(KB - 1, int)) if KB > 1 else np.zeros(1, int),
    }
    return corners | {f"falls {name}": replace(base, exponents=ladder) for name, ladder in ladders.items()}
