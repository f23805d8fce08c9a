"""Processes that outlive the command that started them: a file for each says which they are.

A process is known by its number and its start time, so that one that got the number later is never touched.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.files import read_json, write_json


@dataclass(frozen=True)
class Process:
    """A tracker or an emulated board that was started here.

    Attributes
    ----------
    name : str
        What to call it; no two that live have the same.
    kind : str
        ``"tracker"`` or ``"board"``.
    device : str or None
        Name of the device that a board emulates.
    key : str or None
        What a board is registered as.
    tracker : str
        ``"HOST:PORT"`` of the tracker.
    pid : int
        Number of the process, and of its group.
    started : int
        When it started, in the kernel's ticks since boot.
    log : str
        File with its output.
    """

    name: str
    kind: str
    device: str | None
    key: str | None
    tracker: str
    pid: int
    started: int
    log: str

    def alive(self) -> bool:
        """Whether the process still runs."""
        return _start_of(self.pid) == self.started


def state_directory() -> Path:
    """Return the folder of the state files and logs, making it if need be."""
    path = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "agq_tvm" / "boards"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AgqError(f"cannot write {path} ({error.strerror}): set XDG_STATE_HOME to a writable folder") from error
    return path


def launch(command: Sequence[str], log: Path) -> tuple[subprocess.Popen, int]:
    """Start a process in a group of its own, with its output in a file; return it and its start time."""
    keep = ("PATH", "HOME", "TMPDIR", "LANG", "PYTHONPATH", "VIRTUAL_ENV", "TVM_NUM_THREADS")
    try:
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={name: os.environ[name] for name in keep if name in os.environ},
                start_new_session=True,
            )
    except OSError as error:
        raise AgqError(f"cannot start {command[0]} with its log in {log}: {error.strerror}") from error
    return process, _start_of(process.pid) or 0


def remember(process: Process) -> None:
    """Write the state file of a process."""
    write_json(_state_file(process.pid), asdict(process))


def processes() -> list[Process]:
    """Return the processes that live, by name; the files of those that ended are removed."""
    living = []
    for path in state_directory().glob("*.json"):
        try:
            process = Process(**read_json(path, "state file"))
            well_formed = isinstance(process.name, str) and type(process.pid) is int and process.pid > 1
        except (AgqError, TypeError):
            well_formed = False
        if well_formed and process.alive():
            living.append(process)
        else:
            path.unlink(missing_ok=True)
    return sorted(living, key=lambda process: (process.kind != "tracker", process.name))


def free_name(wanted: str) -> str:
    """Return a name that no living process has: `wanted`, or with a number after it."""
    names = {process.name for process in processes()}
    number = 1
    name = wanted
    while name in names:
        number += 1
        name = f"{wanted}-{number}"
    return name


def stop(process: Process, patience: float = 5.0) -> None:
    """End a process and all that it started: first with a request, after `patience` seconds by force.

    Raises
    ------
    AgqError
        If it lives on.
    """
    if process.alive():
        for sign, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(process.pid, sign)
            except ProcessLookupError:
                break
            except PermissionError:
                raise AgqError(
                    f"cannot stop {process.name} (process {process.pid}): it belongs to another user"
                ) from None
            if _wait_for_group(process.pid, seconds):
                break
        else:
            raise AgqError(f"{process.name} (process {process.pid}) does not end: see {process.log}")
    _state_file(process.pid).unlink(missing_ok=True)


def last_line(log: str | os.PathLike) -> str:
    """Return the last line of a log, or a word on its absence."""
    try:
        lines = Path(log).read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "its log is empty"


def _state_file(pid: int) -> Path:
    return state_directory() / f"{pid}.json"


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on (state, parent, group, ...), or None."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _start_of(pid: int) -> int | None:
    """Return the start time of a process, or None if it has ended."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def _wait_for_group(group: int, seconds: float) -> bool:
    """Wait until no process of a group runs; return whether that came true."""
    deadline = time.monotonic() + seconds
    while True:
        _reap(group)
        if not _group_runs(group):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)


def _group_runs(group: int) -> bool:
    for entry in os.listdir("/proc"):
        fields = _stat(int(entry)) if entry.isdigit() else None
        if fields and int(fields[2]) == group and fields[0] not in "ZX":
            return True
    return False


def _reap(pid: int) -> None:
    """Take note of the end of a process if it is a child of this one."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
