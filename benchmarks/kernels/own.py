"""Matrix products of a LLaMA-7B on one thread, against what the processor can do at best in the same run.

Besides products with scales of groups there are those on integer grids, and TRIP's integer-only form, with one weight
scale for each column.
Decode (M = 1) reads its packed weights from memory: each product has enough distinct copies that none is in a
cache when its turn comes again. Prefill (M = 128) is held against the multiply in registers. Rounds go through
all kernels and both limits in turn, so that whatever else the machine does strikes them alike.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.kernels import linear, linear_grid, linear_shifted
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.intrin.grid_intrin import ZERO
from agq_tvm.kernels.layout import K_BLOCK, Layout
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_grid import GridKernel
from agq_tvm.kernels.linear_shifted import ShiftedKernel
from agq_tvm.runtime.huge_pages import collapse
from agq_tvm.runtime.threads import Threads
from agq_tvm.runtime.virtual_machine import aligned
from agq_tvm.targets import load_device
from agq_tvm.tuning import limits
from benchmarks import seconds, tables

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
"""N x K of a LLaMA-7B: attention, gate or up, down."""
GROUP_SIZES = (32, 64, 128)
GRID_SIZES = (32, 128)
"""Of groups on an integer grid."""
BUCKETS = ((3, 1 / 16), (2, 1 / 8), (1, 1 / 4))
"""Exponents of the integer-only form, with their shares of the k-blocks; of the rest it is 0."""
PREFILL_ROWS = 128
DISTINCT_BYTES = 160 << 20
"""Packed weights that decode goes through before it sees the first again."""
BOUND = 70.0
"""Share of the limit, in %, that is asked for."""
CHECKED_COLUMNS = 8
_MODULES = {LinearKernel: linear, GridKernel: linear_grid, ShiftedKernel: linear_shifted}


@dataclass
class Case:
    """One compiled matrix product and its operands.

    Attributes
    ----------
    kernel : LinearKernel, GridKernel or ShiftedKernel
    calls : list of callable
        One for each distinct copy of the weights.
    bytes : int
        Packed weights and scales of one call.
    """

    kernel: LinearKernel | GridKernel | ShiftedKernel
    calls: list
    bytes: int

    @property
    def group_size(self) -> int | str:
        """Of the weight scales."""
        if isinstance(self.kernel, GridKernel):
            return f"{self.kernel.group_size} grid"
        return "column" if isinstance(self.kernel, ShiftedKernel) else self.kernel.group_size

    @property
    def operations(self) -> float:
        """Two for each multiply-accumulate."""
        return 2.0 * self.kernel.rows * self.kernel.columns * self.kernel.channels

    @property
    def streams(self) -> bool:
        """Whether memory is the limit, and not the multiplies."""
        return self.kernel.rows == 1

    def seconds(self) -> float:
        """Time one call: the mean over all copies."""

        def run_all():
            for call in self.calls:
                call()

        return seconds(run_all) / len(self.calls)


class Weights:
    """Distinct packed weights of one shape; any byte is two valid codes.

    Parameters
    ----------
    columns, channels : int
    layout : Layout
    """

    def __init__(self, columns: int, channels: int, layout: Layout):
        shape = layout.packed_shape(columns, channels)
        copies = -(-DISTINCT_BYTES // int(np.prod(shape)))
        self.all = aligned((copies, *shape), "uint8")
        rng = np.random.default_rng(columns + channels)
        self.all[0] = rng.integers(0, 256, shape, "uint8")
        for i in range(1, copies):  # all distinct, and no two tiles of a copy alike
            np.add(self.all[0], np.uint8(37 * i % 256), out=self.all[i])
        collapse(self.all)


def prepare(kernel, weights: Weights, isa: InstructionSet, device, copies: int) -> Case:
    """Compile a product, check it against numpy, and bind it to its operands.

    Raises
    ------
    AgqError
        If it computes something else.
    """
    layout, module = isa.layout_4bit, _MODULES[type(kernel)]
    sums_of = kernel.groups if isinstance(kernel, LinearKernel) else 1
    powers = np.exp2(np.repeat(_exponents(kernel), K_BLOCK))
    rng = np.random.default_rng(sums_of)
    codes = rng.integers(-127, 128, (kernel.rows, kernel.channels)).astype("int8")
    shape = (kernel.rows, kernel.channels // K_BLOCK, layout.steps, 2, layout.depth)
    x = np.ascontiguousarray(codes.reshape(shape).transpose(1, 0, 2, 3, 4))
    sums = (codes * powers).reshape(kernel.rows, sums_of, -1).sum(-1).astype("int32")
    sx = rng.uniform(0.5, 2, (kernel.rows, 1)).astype("float32")
    scales = _scales(kernel, layout, copies, rng)
    out = aligned((kernel.rows, layout.tiles(kernel.columns) * layout.width), "float32")
    out[:] = np.nan
    function, _ = limits.compiled(module.build(kernel, isa), device)
    before = [limits.from_numpy(_aligned(array)) for array in (x, sx, sums)]
    between, after = [], [limits.from_numpy(out)]
    if isinstance(kernel, ShiftedKernel):
        exponents = _exponents(kernel)
        between = [limits.from_numpy(_aligned(-np.diff(exponents, prepend=exponents[:1]).astype("int32")))]
        bias = np.zeros((layout.tiles(kernel.columns), layout.vectors, layout.lanes), "float32")
        after.insert(0, limits.from_numpy(_aligned(bias)))

    def call(i: int):
        weight, own = limits.from_numpy(weights.all[i]), [limits.from_numpy(each[i]) for each in scales.values()]
        operands = (*before, weight, *between, *own, *after)
        return lambda: function(*operands)

    calls = [call(i) for i in range(copies)]
    calls[0]()
    first = {name: each[0] for name, each in scales.items()}
    _check(kernel, layout, codes * powers, sx, weights.all[0], first, out)
    return Case(kernel, calls, weights.all[0].nbytes + sum(each.nbytes for each in first.values()))


def _scales(kernel, layout: Layout, copies: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Make what codes are multiplied by: arrays [copies, NT, G, V, L] by their names, in the order of the operands."""
    tile, drawn = (layout.vectors, layout.lanes), {}
    groups = 1 if isinstance(kernel, ShiftedKernel) else kernel.groups
    if isinstance(kernel, GridKernel):
        steps = rng.integers(1, ZERO // 8 + 1, (layout.tiles(kernel.columns), groups, *tile))
        drawn = {"step": steps, "low": ZERO - 8 * steps}
        groups = 1
    drawn["ws"] = rng.uniform(0.5, 1, (layout.tiles(kernel.columns), groups, *tile))
    made = {}
    for name, values in drawn.items():
        made[name] = aligned((copies, *values.shape), "float16" if name == "ws" else "uint8")
        made[name][:] = values
        collapse(made[name])
    return made


def _exponents(kernel) -> np.ndarray:
    """Return the exponents of the k-blocks: 0 but for the integer-only form."""
    if not isinstance(kernel, ShiftedKernel):
        return np.zeros(kernel.channels // K_BLOCK, int)
    counts = [(exponent, int(share * kernel.blocks)) for exponent, share in BUCKETS]
    exponents = np.concatenate([np.full(count, exponent) for exponent, count in counts])
    return np.append(exponents, np.zeros(kernel.blocks - len(exponents), int))


def _aligned(array: np.ndarray) -> np.ndarray:
    copy = aligned(array.shape, str(array.dtype))
    copy[:] = array
    return copy


def _check(kernel, layout: Layout, x, sx, packed, scales, out) -> None:
    """Compare columns of the first and the last tile."""
    for tile in (0, layout.tiles(kernel.columns) - 1):
        w = layout.unpack(packed[tile : tile + 1], CHECKED_COLUMNS, kernel.channels).T.astype("float64") - 8
        for name, values in scales.items():
            if name != "low":  # which are -8 steps
                s = values[tile].reshape(-1, layout.width)[:, :CHECKED_COLUMNS].astype("float64")
                w = w * np.repeat(s, kernel.channels // len(s), axis=0)
        expected = (x.astype("float64") @ w) * sx
        got = out[:, tile * layout.width :][:, :CHECKED_COLUMNS]
        if not np.allclose(got, expected, rtol=0, atol=1e-5 * abs(expected).max()):
            raise AgqError(f"{kernel.name} does not compute what numpy does: it was not timed")


def all_cases(isa: InstructionSet, device) -> list[Case]:
    """Prepare every shape, number of rows and form: the integer-only one last."""
    cases = []
    for columns, channels in SHAPES:
        weights = Weights(columns, channels, isa.layout_4bit)
        for rows in (1, PREFILL_ROWS):
            sized = [LinearKernel(rows, columns, channels, 4, size, False, None, False) for size in GROUP_SIZES]
            grids = [GridKernel(rows, columns, channels, size, False) for size in GRID_SIZES if isa.grids]
            for kernel in [*sized, *grids, ShiftedKernel(rows, columns, channels, None)]:
                copies = len(weights.all) if rows == 1 else 1
                print(f"preparing {kernel.name}", file=sys.stderr)
                cases.append(prepare(kernel, weights, isa, device, copies))
    return cases


def time_all(cases: list[Case], rates: dict[str, limits.Limit], rounds: int) -> tuple[list, dict]:
    """Time cases and limits in turn: seconds of every round, and rates of every round.

    Both limits come before every case; reading memory also leaves nothing of the weights in a cache.
    """
    times = [[] for _ in cases]
    measured = {name: [] for name in rates}
    for number in range(rounds + 1):
        for case, own in zip(cases, times, strict=True):
            found = {name: limit.rate() for name, limit in rates.items()}
            once = case.seconds()
            if number:  # the first round is not counted
                own.append(once)
                for name, rate in found.items():
                    measured[name].append(rate)
    return times, measured


def row_of(case: Case, times: list[float], at_best: dict[str, float], integer_only: list[float]) -> dict:
    """Summarize a case; the limit that it is held against is the median of the same run.

    `integer_only` are the times of that form of the same product, round by round.
    """
    median = statistics.median(times)
    unit = "GB/s" if case.streams else "GOP/s"
    rate = (case.bytes if case.streams else case.operations) / median / 1e9
    share = 100 * rate / at_best[unit] if unit in at_best else None
    return {
        "kernel": case.kernel.name,
        "shape": f"{case.kernel.columns}x{case.kernel.channels}",
        "rows": case.kernel.rows,
        "group_size": case.group_size,
        "milliseconds": 1e3 * median,
        "milliseconds_std": 1e3 * statistics.pstdev(times),
        "of_integer_only": statistics.median(a / b for a, b in zip(times, integer_only, strict=True)),
        "bytes": case.bytes,
        "rate": rate,
        "unit": unit,
        "share_percent": share,
        "bound_percent": BOUND,
        "met": share is not None and share >= BOUND,
    }


def as_lines(rows: list[dict]) -> str:
    """Write the rows as a table."""
    head = ("kernel", "N x K", "M", "group", "ms", "of integer-only", "rate", "unit", "of limit %", "bound %", "met")
    lines = [
        (
            "gemv" if row["rows"] == 1 else "gemm",
            row["shape"],
            str(row["rows"]),
            str(row["group_size"]),
            f"{row['milliseconds']:.3f}",
            f"{row['of_integer_only']:.3f}",
            f"{row['rate']:.1f}",
            row["unit"],
            "-" if row["share_percent"] is None else f"{row['share_percent']:.1f}",
            f"{row['bound_percent']:.0f}",
            "yes" if row["met"] else "no",
        )
        for row in rows
    ]
    return tables.aligned([head, *lines])


def measure(rounds: int, path: Path) -> None:
    """Measure, print, and write JSON.

    Raises
    ------
    AgqError
        If a kernel computes something else than numpy does.
    """
    Threads(1).configure()
    device = load_device("host")
    isa = instruction_set(device.instruction_set)
    cases = all_cases(isa, device)
    rates = {"GB/s": limits.memory_limit(1), "GOP/s": limits.multiply_limit()}
    rates = {unit: limit for unit, limit in rates.items() if limit is not None}
    times, measured = time_all(cases, rates, rounds)
    at_best = {unit: statistics.median(values) for unit, values in measured.items()}
    forms = len(GROUP_SIZES) + len(GRID_SIZES) * isa.grids + 1
    integer_only = [times[i // forms * forms + forms - 1] for i in range(len(cases))]
    rows = [row_of(*each[:2], at_best, each[2]) for each in zip(cases, times, integer_only, strict=True)]
    found = tables.summaries(measured)
    print_limits(found)
    print(as_lines(rows))
    contents = {"instruction_set": isa.name, "threads": 1, "rounds": rounds, "limits": found}
    packages = ("apache-tvm", "numpy")
    tables.write_report(path, tables.report("benchmarks.kernels", packages, **contents, results=rows))


def print_limits(found: dict[str, dict]) -> None:
    """Print what the machine does at best."""
    for unit, limit in found.items():
        what = "memory read" if unit == "GB/s" else "multiply in registers"
        print(f"{what}: {limit['median']:.1f} {unit} median, {limit['best']:.1f} best")
