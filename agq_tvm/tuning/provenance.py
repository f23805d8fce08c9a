"""Where a record comes from: when, on what, and with which versions."""

import datetime
import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

from agq_tvm import __version__
from agq_tvm.kernels import tunable
from agq_tvm.tuning.task import Task

_CPUINFO = Path("/proc/cpuinfo")
_NUMBERS = {
    "cpu family": "family",
    "model": "model",
    "stepping": "stepping",
    "CPU implementer": "implementer",
    "CPU part": "part",
}
"""What /proc/cpuinfo calls a model's numbers, on x86 and on Arm, and what they are called here."""


def provenance_of(task: Task, told: dict, local: bool) -> dict:
    """Return what a record says of its origin.

    Parameters
    ----------
    task : Task
    told : dict
        What the measurement told: ``board``, ``emulated``, ``status``, ``hot`` and so on.
    local : bool
        Whether it was made on this machine's own processor.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    told = dict(told)
    status = told.pop("status", None) or {}
    clocks = _clocks(status) if told.get("board") else _own_clocks() if local else []
    return {
        "when": now,
        "device": task.device.name,
        "cpu": cpu_of(task, local),
        "threads": task.threads,
        "clock_khz": max(clocks, default=None),
        "versions": _versions(),
        "kernel_version": tunable.version_of(task.kernel),
        "commit": _commit(),
        **told,
    }


def cpu_of(task: Task, local: bool) -> str:
    """Return the processor that measures a task: this machine's by its name, a device's by LLVM's."""
    return _cpu() if local else task.device.cpu


def _clocks(status: dict) -> list[int]:
    clocks = status.get("kilohertz", [])
    values = clocks.values() if isinstance(clocks, dict) else clocks
    return [int(value) for value in values if isinstance(value, int | float)]


def _own_clocks() -> list[int]:
    """Return the clocks of this machine's processors in kHz, where Linux tells."""
    lines = _cpuinfo().splitlines()
    return [round(float(line.partition(":")[2]) * 1000) for line in lines if line.startswith("cpu MHz")]


def _cpuinfo() -> str:
    try:
        return _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@functools.cache
def _cpu() -> str:
    """Name this machine's processor. Virtual machines call many models alike, so that its numbers are part of it."""
    pairs = (line.partition(":") for line in reversed(_cpuinfo().splitlines()))
    found = {name.strip(): value.strip() for name, _, value in pairs}
    numbers = [f"{name} {found[key]}" for key, name in _NUMBERS.items() if key in found]
    name = found.get("model name", platform.machine())
    return f"{name} ({', '.join(numbers)})" if numbers else name


@functools.cache
def _versions() -> dict[str, str]:
    import tvm

    llvm = tvm.get_global_func("target.llvm_version_major", allow_missing=True)
    return {
        "agq_tvm": __version__,
        "tvm": importlib.metadata.version("apache-tvm"),
        "llvm": str(llvm()) if llvm else "unknown",
    }


@functools.cache
def _commit() -> str | None:
    """Return the commit of a checkout that this runs from, None elsewhere."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
