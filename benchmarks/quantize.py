"""Time and memory of quantizing: SmolLM2, a random 1.1B model, and layers of LLaMA-7B's shapes.

    python -m benchmarks.quantize --work DIR

Each run has a process of its own, with as many threads as OMP_NUM_THREADS says. Beside the time on the clock stands
that of the processor, all threads together, which other work on the machine changes less. Two peaks are reported: of
the memory that the process itself holds, and of what is resident, which includes the pages of the model's file that
the kernel has mapped and can take back at any time.
"""

import argparse
import multiprocessing
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.progress import say
from benchmarks.random_model import SHAPES, write_random_model
from benchmarks.tables import RESULTS, aligned, report, write_report

_LOOK = 0.02  # seconds between two looks at a process
_SMOLLM2 = "smollm2-135m-instruct"
_LAYERS_7B = (1, 2)


@dataclass(frozen=True)
class Run:
    """One thing to measure.

    Attributes
    ----------
    label : str
    model : str
        What `quantize` is given.
    method : str
    samples, length : int
        Windows that calibration looks at, and their tokens.
    """

    label: str
    model: str
    method: str
    samples: int = 0
    length: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", required=True, type=Path, metavar="DIR", help="random models are written here")
    parser.add_argument("--samples", type=int, default=8, help="windows for GPTQ (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="WORD", help="only runs whose name has this in it")
    parser.add_argument("-o", "--output", default=RESULTS / "quantize.json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict] = []
    for run in _runs(arguments.work, arguments.samples, arguments.length):
        if arguments.only in f"{run.label}, {run.method}":
            rows.append(_measured(run, arguments.work))
            packages = ("torch", "numpy", "safetensors")
            contents = {"rows": rows, "whole_7b": _whole_7b(rows)}
            write_report(arguments.output, report("benchmarks.quantize", packages, **contents))
    print(aligned(_table(rows, _whole_7b(rows))))
    return 0


def _runs(work: Path, samples: int, length: int) -> list[Run]:
    models = [("SmolLM2-135M", _SMOLLM2), ("random 1.1B", str(work / "random-1.1b"))]
    models += [(f"random 7B, layers: {n}", str(work / f"random-7b-{n}")) for n in _LAYERS_7B]
    return [
        run for label, model in models for run in (Run(label, model, "rtn"), Run(label, model, "gptq", samples, length))
    ]


def _measured(run: Run, work: Path) -> dict:
    """Quantize in a process of its own; look at its memory until it ends."""
    _make_model(run)
    say(f"{run.label}, {run.method}")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_quantize, args=(run, str(work / "quantized"), theirs))
    process.start()
    theirs.close()
    peak = 0
    while not ours.poll(_LOOK):
        peak = max(peak, _status(process.pid).get("RssAnon", 0))
    try:
        result = ours.recv()
    except EOFError:
        process.join()
        raise AgqError(f"{run.label}, {run.method}: the process ended with code {process.exitcode}") from None
    process.join()
    return {**asdict(run), **result, "peak_own_bytes": peak}


def _make_model(run: Run) -> None:
    path = Path(run.model)
    if path.name == "random-1.1b":
        write_random_model(path, "1.1b")
    elif path.name.startswith("random-7b-"):
        write_random_model(path, "7b", int(path.name.rpartition("-")[2]))


def _quantize(run: Run, output: str, connection: Connection) -> None:
    import torch  # noqa: F401  (its time and memory are not the model's)

    before, started, busy = _status("self")["RssAnon"], time.perf_counter(), time.process_time()
    calibration = Calibration(samples=run.samples, length=run.length) if run.samples else None
    result = quantize(run.model, output, method=run.method, group_size=64, calibration=calibration)
    connection.send(
        {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - busy,
            "idle_own_bytes": before,
            "peak_resident_bytes": _status("self")["VmHWM"],
            "bytes": result["bytes"],
            "bits_per_weight": result["bits_per_weight"],
            "calibration": result["calibration"],
        }
    )


def _status(process: int | str) -> dict[str, int]:
    """Return what Linux says of the memory of a process, in bytes; nothing once it has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    except OSError:
        return {}
    lines = (line.split() for line in text.splitlines())
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines if len(line) == 3 and line[2] == "kB"}


def _whole_7b(rows: list[dict]) -> dict[str, dict]:
    """Tell what all layers of 7B take: those of one layer more, so many times; a layer more needs no more memory."""
    found = {}
    layers = SHAPES["7b"]["num_hidden_layers"]
    for method in ("rtn", "gptq"):
        measured = [row for row in rows if row["label"].startswith("random 7B") and row["method"] == method]
        if len(measured) == len(_LAYERS_7B):
            one, two = measured
            more = layers - _LAYERS_7B[-1]
            found[method] = {
                name: two[name] + more * (two[name] - one[name]) for name in ("seconds", "cpu_seconds", "bytes")
            }
            found[method] |= {"peak_own_bytes": max(one["peak_own_bytes"], two["peak_own_bytes"])}
    return found


def _table(rows: list[dict], whole: dict[str, dict]) -> list[tuple[str, ...]]:
    lines = [("model", "method", "windows", "s", "CPU s", "own peak MB", "resident peak MB", "checkpoint MB")]
    for row in rows:
        windows = f"{row['samples']} x {row['length']}" if row["samples"] else "none"
        sizes = (f"{row[name] / 1e6:.0f}" for name in ("peak_own_bytes", "peak_resident_bytes", "bytes"))
        lines.append((row["label"], row["method"], windows, *_times(row), *sizes))
    for method, row in whole.items():
        sizes = (f"{row['peak_own_bytes'] / 1e6:.0f}", "", f"{row['bytes'] / 1e6:.0f}")
        lines.append(
            (f"7B, {SHAPES['7b']['num_hidden_layers']} layers, from these", method, "", f"{row['seconds']:.0f}", *sizes)
        )
    return lines


def _times(row: dict) -> tuple[str, str]:
    return f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}"


if __name__ == "__main__":
    sys.exit(main())
