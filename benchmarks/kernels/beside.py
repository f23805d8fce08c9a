"""Our products beside those of other engines: processes that are asked in turn, at each shape and number of rows.

Decode (M = 1) and few rows read their weights from memory: each engine goes through enough distinct copies that none
is in a cache when its turn comes again. Both limits are measured once in every round.
"""

import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agq_tvm.quantize.weights import codes_of, rtn
from benchmarks import tables
from benchmarks.kernels.own import DISTINCT_BYTES, SHAPES, print_limits
from benchmarks.kernels.verdict import verdicts
from benchmarks.peers import base, fleet
from benchmarks.peers.engines import ours

ROWS = (1, 16, 128)
MANY_ROWS = 64
"""From here on the weights' way from memory takes little of the time, and one copy is enough."""
BYTES = {"g32": 0.5, "g128": 0.5, "int8": 1.0, "float": 2.0}
"""Of a weight, about, by what forms are compared with: how many copies make up `DISTINCT_BYTES`."""
LIMITS = "limits"


@dataclass(frozen=True)
class Run:
    """What is measured.

    Attributes
    ----------
    work : Path
    only : list of str
        See `benchmarks.peers.fleet.named`.
    rounds : int
        For each shape and number of rows.
    seconds : float
        That all rounds of all shapes, rows and thread counts may take together, about.
    shapes, rows : tuple
    engines : dict of str to module, optional
        All by default.
    """

    work: Path
    only: list[str]
    rounds: int
    seconds: float
    shapes: tuple[tuple[int, int], ...] = SHAPES
    rows: tuple[int, ...] = ROWS
    engines: dict | None = None


def operands_of(run: Run, columns: int, channels: int) -> Path:
    """Write the operands of a shape, unless they are there; return their directory."""

    def rounded(w: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        linear = rtn(w, size, symmetric=True)
        return codes_of(linear), linear.scales.astype("float32")

    path = run.work / "operands" / f"{columns}x{channels}"
    if not (path / "w.npy").exists():  # which is written last
        base.Operands.write(path, columns, channels, max(ROWS), rounded)
    return path


def measure_threads(run: Run, threads: int, seconds: float) -> tuple[list[dict], dict, fleet.Fleet]:
    """Measure everything with a number of threads.

    Returns
    -------
    rows : list of dict
        One for each engine's form, shape and number of rows.
    limits : dict of str to dict
        Of every round of all of them.
    fleet : Fleet
        Stopped; it says what was missing.
    """
    found, rows, measured = fleet.Fleet(run.work, threads), [], {}
    try:
        engines = base.engines() if run.engines is None else run.engines
        forms = found.start(engines, "PRODUCTS", lambda form: fleet.named(form, run.only))
        limits = found.worker(ours, ours.PRODUCTS[0].name)
        found.workers[LIMITS] = limits
        cases = [(*shape, count) for shape in run.shapes for count in run.rows]
        for case in cases:
            rows += _case(run, found, forms, case, seconds / len(cases), measured)
    finally:
        found.stop()
    at_best = tables.summaries(measured)
    for row in rows:
        share_of_limit(row, at_best)
    return rows, at_best, found


def _case(run: Run, found: fleet.Fleet, forms: dict, case: tuple, seconds: float, measured: dict) -> list[dict]:
    """Prepare a product everywhere, time it in turn, and describe it."""
    columns, channels, count = case
    operands, began = operands_of(run, columns, channels), time.monotonic()
    prepared = {}
    for name in forms:
        if name in found.workers:
            with found.guarded(name):
                copies = copies_of(forms[name].kind, case)
                request = {"operands": str(operands.absolute()), "rows": count, "copies": copies}
                prepared[name] = found.workers[name].ask("prepare", **request)
    ready = time.monotonic()
    steps = {name: _step(found, name) for name in prepared}
    times = fleet.rounds_of({LIMITS: _limits_step(found)} | steps, found.threads, run.rounds, seconds)
    for limits in times.pop(LIMITS):
        for unit, value in limits.items():
            measured.setdefault(unit, []).append(value)
    taken = f"{ready - began:.0f} s to prepare, {time.monotonic() - ready:.0f} s to measure"
    print(f"{columns}x{channels}, M = {count}, {found.threads} threads: {taken}", file=sys.stderr)
    return [row_of(forms[name], case, found.threads, prepared[name], times[name]) for name in prepared if times[name]]


def copies_of(kind: str, case: tuple[int, int, int]) -> int:
    """Return how many distinct copies of its weights a form gets at N, K and M."""
    columns, channels, rows = case
    return 1 if rows >= MANY_ROWS else math.ceil(DISTINCT_BYTES / (BYTES[kind] * columns * channels))


def _step(found: fleet.Fleet, name: str):
    def step() -> dict | None:
        with found.guarded(name):
            return found.workers[name].ask("run")
        return None

    return step


def _limits_step(found: fleet.Fleet):
    return lambda: found.workers[LIMITS].ask("call", method="limits_here")


def row_of(form: base.Form, case: tuple, threads: int, prepared: dict, times: list[dict]) -> dict:
    """Describe the measurements of one form at one shape and number of rows."""
    columns, channels, count = case
    taken = [fleet.lower(each, threads) for each in times]
    median = statistics.median(taken)
    unit = "GB/s" if count == 1 else "GOP/s"
    work = prepared["bytes"] if count == 1 else 2.0 * count * columns * channels
    return {
        "engine": form.name,
        "kind": form.kind,
        "threads": threads,
        "shape": f"{columns}x{channels}",
        "rows": count,
        "bits_per_weight": 8 * prepared["bytes"] / (columns * channels),
        "error": prepared["error"],
        "milliseconds": 1e3 * median,
        "milliseconds_best": 1e3 * min(taken),
        "milliseconds_std": 1e3 * statistics.pstdev(taken),
        "wall_milliseconds": 1e3 * statistics.median(each["wall"] for each in times),
        "rounds": len(taken),
        "rate": work / median / 1e9,
        "unit": unit,
    }


def share_of_limit(row: dict, at_best: dict[str, dict]) -> None:
    """Add which share of the limit a row reaches: of the multiply of bytes, even if it multiplies floats."""
    limit = at_best.get(row["unit"])
    row["share_percent"] = 100 * row["rate"] / limit["median"] if limit else None


def as_lines(rows: list[dict]) -> str:
    """Write rows as a table, the fastest of each product first."""
    head = ("threads", "N x K", "M", "engine", "class", "bits", "error", "ms", "±", "rate", "unit", "of limit %")
    lines = [(*head, "ms / ours", "against ours")]
    for row in sorted(rows, key=lambda row: (row["threads"], row["shape"], row["rows"], row["milliseconds"])):
        own = own_row(rows, row)
        share = row["share_percent"]
        cells = (row["threads"], row["shape"], row["rows"], row["engine"], row["kind"], f"{row['bits_per_weight']:.2f}")
        figures = (row["error"], row["milliseconds"], row["milliseconds_std"])
        ratio = "-" if own is None else f"{row['milliseconds'] / own['milliseconds']:.2f}"
        remarks = "" if own is None else ", ".join(differences(row, own))
        lines.append(
            (
                *map(str, cells),
                *(f"{value:.4f}" for value in figures),
                f"{row['rate']:.1f}",
                row["unit"],
                "-" if share is None else f"{share:.1f}",
                ratio,
                remarks,
            )
        )
    return tables.aligned(lines)


def own_row(rows: list[dict], row: dict) -> dict | None:
    """Return our row that another engine's is compared with: of its class, else of groups of 32."""
    kind = row["kind"] if row["kind"] in ("g32", "g128") else "g32"
    same = [
        other
        for other in rows
        if other["engine"] == f"agq_tvm {kind}" and all(other[key] == row[key] for key in ("threads", "shape", "rows"))
    ]
    return same[0] if same else None


def differences(row: dict, own: dict) -> list[str]:
    """Name in what an engine's weights are not like ours: bits that are stored, and errors."""
    found = []
    if row["bits_per_weight"] > own["bits_per_weight"] + 0.1:
        found.append("more bits")
    if row["error"] < 0.97 * own["error"]:
        found.append("less error")
    return found


def measure(run: Run, threads: list[int], path: Path) -> None:
    """Measure with each number of threads, print tables and verdicts, and write JSON."""
    rows, limits, versions, missing = [], {}, {}, {}
    for count in threads:
        found_rows, found_limits, found = measure_threads(run, count, run.seconds / len(threads))
        rows += found_rows
        limits[count] = found_limits
        versions |= found.versions
        missing |= {f"{name}, threads: {count}": reason for name, reason in found.missing.items()}
    for count, found_limits in limits.items():
        print(f"threads: {count}")
        print_limits(found_limits)
    print(as_lines(rows))
    judged = verdicts(rows)
    print()
    print(judged_lines(judged))
    for name, reason in missing.items():
        print(f"NOT MEASURED: {name}: {reason}")
    contents = {"threads": threads, "rounds": run.rounds, "limits": limits, "engines": versions, "missing": missing}
    packages = ("apache-tvm", "numpy")
    report = tables.report("benchmarks.kernels", packages, **contents, results=rows, verdicts=judged)
    tables.write_report(path, report)


def judged_lines(judged: list[dict]) -> str:
    """Write verdicts as a table."""
    lines = [("threads", "N x K", "M", "ours", "what", "beside", "value", "bound", "met")]
    for each in judged:
        cells = (each["threads"], each["shape"], each["rows"], each["engine"], each["what"], each["beside"] or "")
        lines.append((*map(str, cells), f"{each['value']:.2f}", f"{each['bound']:.2f}", "yes" if each["met"] else "no"))
    return tables.aligned(lines)
