"""Every multiply of an instruction set: all pairs of its codes through whole products, and its bare tiles at bounds."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tvm

from agq_tvm.kernels import linear
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.intrin import tensor_intrin
from agq_tvm.kernels.layout import Layout
from agq_tvm.kernels.linear import LinearKernel
from tests.kernels.operands import Operands, random_operands

LARGEST = (1 << 31) - 1
CHANNELS = 32


@dataclass(frozen=True)
class Long(Layout):
    """A layout with k-blocks of another length, to reach a bound."""

    steps: int = 8


@dataclass(frozen=True)
class Tile:
    """The bare multiply of a kernel.

    Attributes
    ----------
    isa : str
    bits : int
        Of the weights.
    packed : bool
        Whether two codes share a byte.
    rows : int
        Of activations of 8 bits.
    steps : int
        Of its k-block; 0 for those of the layout.
    """

    isa: str
    bits: int
    packed: bool
    rows: int
    steps: int = 0

    @property
    def name(self) -> str:
        """A name that C allows."""
        return f"{self.isa}_w{self.bits}_{'packed' if self.packed else 'bytes'}_m{self.rows}_s{self.steps}"

    @property
    def layout(self) -> Layout:
        """The layout of its weights."""
        form = INSTRUCTION_SETS[self.isa].tile(self.bits, self.packed)
        steps = self.steps or form.steps
        return Long(form.bits, form.vectors, form.lanes, form.depth, form.zero, steps)

    @property
    def center(self) -> int:
        """What is subtracted of unpacked codes."""
        return INSTRUCTION_SETS[self.isa].center(self.bits, 8, self.packed)

    def build(self):
        """Return the PrimFunc: x, w, sums."""
        multiply = INSTRUCTION_SETS[self.isa].multiply(self.bits, 8, self.packed, self.rows)
        implement = multiply.implement or tensor_intrin.dot_impl
        function = implement(tensor_intrin.Tile(self.rows, self.layout, self.packed, self.center), multiply)
        return function.with_attr("global_symbol", self.name)

    def sums(self, function: Callable, x: int, code: int, used: int = 0, start: int = 0) -> tuple[np.ndarray, int]:
        """Multiply activations that are all `x` by weights that are all `code`, or 0 from channel `used` on.

        Returns the sums, started at `start`, int64 [R * V * L], and what each should be.
        """
        form, channels = self.layout, self.layout.steps * 2 * self.layout.depth
        stored = np.where(np.arange(channels) < (used or channels), code - form.zero - self.center, 0)
        expected = start + int((stored * x).sum())
        wide = (form.steps, 2, form.vectors, form.lanes, form.depth)
        bytes_ = np.broadcast_to(stored.reshape(form.steps, 2, 1, 1, form.depth), wide).astype("uint8")
        if self.packed:
            weights = bytes_[:, 0] & 15 | bytes_[:, 1] << 4
        else:
            weights = bytes_.view("int8") if form.zero or self.center else bytes_
        lead = () if self.rows == 1 else (self.rows,)
        sums = tvm.runtime.tensor(np.full((*lead, form.vectors, form.lanes), start, "int32"))
        activations = np.full((*lead, form.steps, 2, form.depth), x, "int8")
        function(tvm.runtime.tensor(activations), tvm.runtime.tensor(np.ascontiguousarray(weights)), sums)
        return sums.numpy().ravel().astype("int64"), expected


def tiles_of(isa: str) -> list[Tile]:
    """List the multiplies of one row and of several, 4-bit weights and 8-bit ones."""
    rows = INSTRUCTION_SETS[isa].rows
    return [Tile(isa, 4, True, 1), Tile(isa, 4, False, rows), Tile(isa, 8, False, 1), Tile(isa, 8, False, rows)]


# By instruction set: a tile, the last values that are right, the first that are not: x, code, and channels in use.
NARROW_BOUNDS = {
    # Pairs of products in 16 bits, 16 * 15 * 127 = 30480 and 18 * 15 * 127 = 34290.
    "avx2": [
        (Tile("avx2", 4, True, 1, 5), (127, 15, 32), (127, 15, 34)),
        (Tile("avx2", 4, False, 2, 5), (-127, 15, 32), (-127, 15, 34)),
        # -128 has no opposite in a byte.
        (Tile("avx2", 8, False, 1), (-127, 0, 0), (-128, 0, 0)),
        (Tile("avx2", 8, False, 2), (-127, 0, 0), (-128, 0, 0)),
    ],
    # A product in each of two 16-bit lanes: 17 * 15 * 127 = 32385, 18 * 15 * 127 = 34290; less 8, 32 * 8 * 127 = 32512.
    "neon": [
        (Tile("neon", 4, True, 1, 12), (127, 15, 34), (127, 15, 36)),
        (Tile("neon", 4, False, 2, 20), (-127, 0, 64), (-127, 0, 66)),
    ],
}


def build_all(isa: str) -> dict:
    """Return the functions that these tests call, by name: tiles and whole products."""
    tiles = [*tiles_of(isa), *(tile for tile, _, _ in NARROW_BOUNDS.get(isa, []))]
    functions = {tile.name: tile.build() for tile in tiles}
    return functions | {kernel.name: linear.build(kernel, INSTRUCTION_SETS[isa]) for kernel in PAIRS}


def check_bounds(isa: str, function: Callable) -> None:
    """Assert that sums are right up to the last value in range and wrong at the next; ``function(name)`` calls."""
    for tile in tiles_of(isa):
        x, code = -127, 0 if tile.center or tile.layout.zero else (1 << tile.bits) - 1
        _, block = tile.sums(function(tile.name), x, code)
        sign = 1 if block > 0 else -1
        last = sign * LARGEST - block
        got, expected = tile.sums(function(tile.name), x, code, start=last)
        assert abs(expected) == LARGEST and (got == expected).all(), tile
        # One product more leaves 32 bits. -2^31 is one more number below 0.
        last += sign * abs(block) // CHANNELS
        got, expected = tile.sums(function(tile.name), x, code, start=int(np.clip(last, -LARGEST, LARGEST)))
        assert (got != expected).all(), tile
    for tile, holds, breaks in NARROW_BOUNDS.get(isa, []):
        got, expected = tile.sums(function(tile.name), *holds)
        assert (got == expected).all(), tile
        got, expected = tile.sums(function(tile.name), *breaks)
        assert (got != expected).any(), tile


PAIRS = [
    LinearKernel(rows, 1 << bits, CHANNELS, bits, CHANNELS, True, "float16" if bits == 4 else None, False)
    for bits in (4, 8)
    for rows in (1, 256)
]
"""Columns have all weights, rows all activations, -127 twice."""


def check_pairs(isa: str, function: Callable, tensor: Callable = tvm.runtime.tensor) -> None:
    """Assert that each activation times each weight is right, in one channel alone and in all 32 together.

    Parameters
    ----------
    function : callable
        ``function(name)`` returns what takes tensors.
    tensor : callable
        Puts an array where the functions run.
    """
    values = np.append(np.arange(-127, 128), -127)
    alone = np.zeros((256, CHANNELS), "int8")
    alone[np.arange(256), np.arange(256) * 5 % CHANNELS] = values
    together = values[:, None].repeat(CHANNELS, 1).astype("int8")
    for kernel in PAIRS:
        q = np.arange(kernel.columns)[:, None].repeat(CHANNELS, 1).astype("uint8")
        base = random_operands(kernel)
        for x in (alone, together):
            parts = x.reshape(-1, kernel.rows, CHANNELS)
            first = Operands(kernel, parts[0], q, base.sx, base.scales, base.offsets, base.bias).integer_form()
            there = [tensor(array) for array in first.arrays(INSTRUCTION_SETS[isa])]
            layout = INSTRUCTION_SETS[isa].layout(kernel.bits)
            out = tensor(np.full((kernel.rows, layout.tiles(kernel.columns) * layout.width), np.nan, "float32"))
            call, weights = function(kernel.name), q.astype("int64") - (128 if kernel.bits == 8 else 0)
            for part in parts:
                there[0].copyfrom(
                    np.ascontiguousarray(
                        part.reshape(kernel.rows, 1, layout.steps, 2, layout.depth).transpose(1, 0, 2, 3, 4)
                    )
                )
                there[2].copyfrom(part.sum(1, keepdims=True, dtype="int32"))
                call(*there, out)
                np.testing.assert_array_equal(out.numpy()[:, : kernel.columns], part.astype("int64") @ weights.T)
