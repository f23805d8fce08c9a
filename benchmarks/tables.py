"""What every benchmark reports: aligned tables, and JSON that says where, when and of what it was made."""

import datetime
import hashlib
import os
import platform
import shlex
import statistics
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from agq_tvm import __version__
from agq_tvm.files import write_json

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
_NUMBERS = frozenset("+-0123456789")


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Align columns, those of numbers to the right.

    Examples
    --------
    >>> print(aligned([("name", "ms"), ("long name", "1.5"), ("a", "12.0")]))
    name         ms
    long name   1.5
    a          12.0
    """
    columns = list(zip(*rows, strict=True))
    cells = []
    for column in columns:
        width = max(map(len, column))
        numeric = any(cell[:1] in _NUMBERS for cell in column[1:] if cell)
        cells.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*cells, strict=True))


def cpu_name() -> str:
    """Return the processor's name as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Return the short hash of the source's commit, or ``"unknown"``."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()


def source_hash() -> str:
    """Return a short hash of what bundles that are kept depend on, committed or not: the source and tuned schedules."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "agq_tvm").rglob("*.py"), *(ROOT / "schedules").rglob("*.jsonl")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def versions(*packages: str) -> dict[str, str]:
    """Return the version of agq_tvm and of installed packages."""
    found = {"agq_tvm": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def add_run_options(parser) -> None:
    """Add what benchmarks beside other engines have in common: `threads`, `only` and `seconds`."""
    parser.add_argument("--threads", type=_numbers, default=[1], metavar="N,N", help="default: 1")
    names = "only engines whose names hold one of these texts; ours is always among them"
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="TEXT,TEXT", help=names)
    seconds = "begin no round after these (but to have three); loading comes on top; default: %(default)s"
    parser.add_argument("--seconds", type=float, default=600.0, metavar="S", help=seconds)


def _numbers(text: str) -> list[int]:
    """Read positive whole numbers between commas."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def summaries(measured: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return median, best (largest) and standard deviation of each list."""
    return {
        name: {"median": statistics.median(values), "best": max(values), "std": statistics.pstdev(values)}
        for name, values in measured.items()
    }


def _without_folder(argument: str) -> str:
    return Path(argument).name if Path(argument).is_absolute() else argument


def report(module: str, packages: tuple[str, ...], **contents) -> dict:
    """Put the circumstances of a measurement around its results.

    Parameters
    ----------
    module : str
        What ``python -m`` ran.
    packages : tuple of str
        Packages whose versions matter.
    """
    # Where things lie on this machine is nobody's business.
    arguments = [",".join(map(_without_folder, each.split(","))) for each in sys.argv[1:]]
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg()[0],
        },
        "versions": versions(*packages),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *arguments]),
        "commit": commit(),
        **contents,
    }


def write_report(path: Path, contents: dict) -> None:
    """Write a report as JSON, and say so on standard error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, contents)
    print(f"wrote {path}", file=sys.stderr)
