"""What a candidate must compute: from numpy where that is exact, else from the hand-made kernel on the same device."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from agq_tvm.kernels import tunable
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.intrin.grid_intrin import ZERO as GRID_ZERO
from agq_tvm.kernels.layout import K_BLOCK
from agq_tvm.kernels.linear import LinearKernel, center_of
from agq_tvm.kernels.linear_grid import GridKernel
from agq_tvm.tuning.measure import Argument
from agq_tvm.tuning.operands import Operand, digest, operands_of
from agq_tvm.tuning.task import Task


def expected_digest(task: Task, operands: list[Operand]) -> int | None:
    """Return the digest of a task's result, from numpy; None for kernels of which numpy knows nothing here."""
    compute = {LinearKernel: multiply, GridKernel: multiply_on_grid}.get(type(task.kernel))
    if compute is None:
        return None
    arrays = {operand.name: operand.array() for operand in operands if operand.role != "output"}
    return digest(compute(task.kernel, task.instruction_set, arrays))


def arguments_of(
    task: Task, digests: Mapping[int, int] | None = None, files: Mapping[int, Path] | None = None
) -> list[Argument]:
    """List a task's arguments, with what is expected of those that the kernel writes.

    Parameters
    ----------
    task : Task
    digests : dict of int to int, optional
        Digests by place; by default that from numpy, if there is one.
    files : dict of int to path, optional
        Arrays by place, where results depend on the order of sums.
    """
    operands = operands_of(task.kernel, tunable.build(task.kernel, task.instruction_set))
    written = [place for place, operand in enumerate(operands) if operand.role in ("output", "updated")]
    if digests is None:
        known = expected_digest(task, operands)
        digests = {} if known is None else {written[0]: known}
    arrays = {place: str(path) for place, path in (files or {}).items()}
    arguments = [Argument(operand.shape, operand.dtype, operand.role) for operand in operands]
    for place in written:
        arguments[place] = replace(arguments[place], digest=digests.get(place), reference=arrays.get(place))
    return arguments


def is_exact(task: Task) -> bool:
    """Whether a kernel's results are the same bits in whatever order it sums: matrix products are, see `operands`."""
    return hasattr(task.kernel, "columns")


def multiply(kernel: LinearKernel, isa: InstructionSet, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Compute a quantized matrix product as `agq_tvm.kernels.linear` defines it, float32 [rows, columns].

    Parameters
    ----------
    kernel : LinearKernel
    isa : InstructionSet
    arrays : dict of str to array
        Its operands, whose sums are small enough for floats to be exact.
    """
    layout, rows = isa.layout(kernel.bits), kernel.code_rows
    blocks, columns = arrays["x"].shape[0], layout.tiles(kernel.columns) * layout.width
    less = isa.center(kernel.bits, kernel.activation_bits, kernel.packed)
    codes = layout.unpack(arrays["w"].view("uint8"), columns, blocks * K_BLOCK).astype("float64")
    x = arrays["x"].transpose(1, 0, 2, 3, 4).reshape(rows, -1).astype("float64")
    center = center_of(layout, less, kernel.bits, kernel.offsets)
    sums, (scales, offsets) = arrays["xsum"].astype("float64"), _scales_and_offsets(kernel, arrays)
    offsets = offsets + scales * center
    sx = np.broadcast_to(arrays["sx"].astype("float64"), sums.shape)
    total = np.zeros((rows, columns))
    for g in range(kernel.groups):
        part = slice(g * kernel.group_size, (g + 1) * kernel.group_size)
        dot = x[:, part] @ (codes[:, part] - (layout.zero + less)).T
        total += (dot * scales[:, g] + sums[:, g : g + 1] * offsets[:, g]) * sx[:, g : g + 1]
    result = sum(total[term * kernel.rows : (term + 1) * kernel.rows] for term in range(kernel.terms))
    if kernel.bias:
        result = result + arrays["bias"].reshape(-1).astype("float64")
    return result.astype("float32")


def _scales_and_offsets(kernel: LinearKernel, arrays: Mapping[str, np.ndarray]) -> tuple:
    """Return float64 [columns, G] of each, or 0 for the offsets of symmetric weights."""
    scales = _by_column(arrays["ws"])
    if kernel.offsets == "grid":
        return scales * _by_column(arrays["step"]), scales * (_by_column(arrays["low"]) - GRID_ZERO)
    return scales, _by_column(arrays["wo"]) if kernel.offsets else 0


def multiply_on_grid(kernel: GridKernel, isa: InstructionSet, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Compute a product on an integer grid as `agq_tvm.kernels.linear_grid` defines it, float32 [rows, columns].

    Parameters
    ----------
    kernel : GridKernel
    isa : InstructionSet
    arrays : dict of str to array
        Its operands; scales are powers of two.
    """
    layout = isa.layout_4bit
    blocks, columns = arrays["x"].shape[0], layout.tiles(kernel.columns) * layout.width
    codes = layout.unpack(arrays["w"], columns, blocks * K_BLOCK).astype("float64")
    steps, lows = (np.repeat(_by_column(arrays[name]), kernel.group_size, axis=1) for name in ("step", "low"))
    x = arrays["x"].transpose(1, 0, 2, 3, 4).reshape(kernel.rows, -1).astype("float64")
    totals = (x @ (steps * codes + lows - GRID_ZERO).T).astype("float32")
    result = totals * arrays["sx"] * _by_column(arrays["ws"]).T.astype("float32")
    return result + arrays["bias"].reshape(-1) if kernel.bias else result


def _by_column(tiled: np.ndarray) -> np.ndarray:
    """Return what is stored in tiles, [tiles, G, vectors, lanes], as float64 [columns, G]."""
    return tiled.astype("float64").transpose(0, 2, 3, 1).reshape(-1, tiled.shape[1])
