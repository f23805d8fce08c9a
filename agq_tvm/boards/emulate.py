"""Emulated boards: real Arm code under QEMU, registered with TVM's real tracker.

They prove that a model computes the right thing with the instructions that a board has. Their speed means
nothing.
"""

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from agq_tvm.boards import processes
from agq_tvm.boards.processes import Process
from agq_tvm.boards.server_build import SERVER, server_folder
from agq_tvm.boards.tracker import parse_tracker, tracker_summary
from agq_tvm.errors import AgqError
from agq_tvm.targets import Device

_EMULATOR = "qemu-aarch64"
_SYSROOT = Path("/usr/aarch64-linux-gnu")
_SYSROOT_FILES = ("ld-linux-aarch64.so.1", "libc.so.6", "libstdc++.so.6", "libgcc_s.so.1")
_PACKAGES = "qemu-user libc6-arm64-cross libstdc++6-arm64-cross libgcc-s1-arm64-cross"
_START_LIMIT = 90.0
_PORT_LIMIT = 5.0
"""Seconds that a tracker which has just been stopped may still hold its port."""
_LOOPBACK = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")
"""Addresses to listen on that are none to reach."""


def find_emulator() -> str:
    """Return the path of the emulator.

    Raises
    ------
    AgqError
        If it or the Arm C library is not installed.
    """
    emulator = shutil.which(_EMULATOR)
    missing = [str(_SYSROOT / "lib" / name) for name in _SYSROOT_FILES if not (_SYSROOT / "lib" / name).exists()]
    if emulator is None:
        missing.insert(0, _EMULATOR)
    if missing:
        raise AgqError(f"emulated boards need {missing[0]}: install it with: apt-get install {_PACKAGES}")
    return emulator


def start_tracker(host: str = _LOOPBACK, port: int = 0) -> Process:
    """Start TVM's tracker.

    Parameters
    ----------
    host : str
        Address to listen on; whoever reaches it runs code on the boards.
    port : int
        0 for a free one.

    Raises
    ------
    AgqError
        If it does not come up.
    """
    for _ in range(0 if port else 2):
        with contextlib.suppress(AgqError):  # another program may take the port before the tracker does
            return _start_tracker_at(_free_port(), host)
    return _start_tracker_at(port or _free_port(), host)


def _start_tracker_at(port: int, host: str = _LOOPBACK) -> Process:
    deadline = time.monotonic() + _PORT_LIMIT
    while not (free := _is_free(host, port)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if not free:
        raise AgqError(f"cannot listen on {host}:{port}: another program does, or it is no address of this machine")
    log = processes.state_directory() / f"tracker-{time.time_ns()}.log"
    command = [sys.executable, "-m", "tvm.exec.rpc_tracker", "--host", host]
    child, started = processes.launch([*command, "--port", str(port), "--port-end", str(port + 1)], log)
    name, reached = processes.free_name("tracker"), _LOOPBACK if host in EVERYWHERE else host
    tracker = Process(name, "tracker", None, None, f"{reached}:{port}", child.pid, started, str(log))
    return _ready(tracker, child, lambda: _answers(reached, port))


def start_board(device: Device, tracker: str, key: str | None = None) -> Process:
    """Start an emulated board and wait until it is registered.

    Parameters
    ----------
    device : Device
        The device to emulate.
    tracker : str
        ``"HOST:PORT"`` of the tracker.
    key : str, optional
        What to register as; by default the device's name.

    Raises
    ------
    AgqError
        If the device cannot be emulated, QEMU is missing, or the board does not come up.
    """
    if device.emulator is None:
        raise AgqError(f"{device.name} cannot be emulated: its file names no emulator")
    key = device.name if key is None else key
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", key):
        raise AgqError(f"a key is up to 64 letters, digits, dots, dashes and underscores, not {key!r}")
    host, port = parse_tracker(tracker)
    emulator = find_emulator()
    tracker_summary(host, port)
    server = server_folder(device) / SERVER
    name, log = processes.free_name(key), processes.state_directory() / f"{key}-{time.time_ns()}.log"
    command = [emulator, "-cpu", device.emulator, "-L", str(_SYSROOT), str(server), "--cache", str(_cache(name))]
    child, started = processes.launch([*command, "--key", key, "--tracker", tracker, "--emulated"], log)
    board = Process(name, "board", device.name, key, tracker, child.pid, started, str(log))
    return _ready(board, child, lambda: is_registered(board))


def is_registered(board: Process) -> bool:
    """Whether a board's tracker knows it: by the port that the board says in its log that it listens on."""
    try:
        listening = re.search(r"listening on \S+ port (\d+)", Path(board.log).read_text(errors="replace"))
        summary = tracker_summary(*parse_tracker(board.tracker)) if listening else {}
    except (OSError, AgqError):
        return False
    return any(port == int(listening[1]) for _, port in summary.get(board.key, {}).get("boards", []))


def list_boards() -> list[Process]:
    """Return the trackers and emulated boards that were started here and still run, trackers first."""
    return processes.processes()


def stop_board(name: str) -> list[Process]:
    """Stop the board or tracker of that name, or all of them; their logs and what they kept go with them.

    Parameters
    ----------
    name : str
        A name from `list_boards`, or ``"all"``.

    Returns
    -------
    list[Process]
        What was stopped, boards before trackers.

    Raises
    ------
    AgqError
        If there is none of that name.
    """
    running = list_boards()
    chosen = [process for process in reversed(running) if name in ("all", process.name)]
    if not chosen and name != "all":
        names = ", ".join(process.name for process in running) or "none"
        raise AgqError(f"no emulated board {name!r} runs here; running: {names}")
    for process in chosen:
        processes.stop(process)
        Path(process.log).unlink(missing_ok=True)
        shutil.rmtree(_cache(process.name), ignore_errors=True)
    return chosen


def _cache(name: str) -> Path:
    """Return the folder of what a board keeps between sessions: until it is stopped, so that it has no traces here."""
    return processes.state_directory() / f"{name}.cache"


def _free_port() -> int:
    with socket.socket() as server:
        server.bind((_LOOPBACK, 0))
        return server.getsockname()[1]


def _is_free(host: str, port: int) -> bool:
    """Whether a tracker could listen there, which takes up ports that connections have just left."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return True
    except OSError:
        return False


def _answers(host: str, port: int) -> bool:
    try:
        tracker_summary(host, port, timeout=1.0)
    except AgqError:
        return False
    return True


def _ready(process: Process, child: subprocess.Popen, ready: Callable[[], bool]) -> Process:
    """Return a process that was just started once it is ready; stop it if that does not come true."""
    processes.remember(process)
    try:
        _wait(process, child, ready)
    except BaseException:
        processes.stop(process)
        raise
    return process


def _wait(process: Process, child: subprocess.Popen, ready: Callable[[], bool]) -> None:
    """Wait until a process that was just started is ready."""
    deadline = time.monotonic() + _START_LIMIT
    while not ready():
        if child.poll() is not None:
            raise AgqError(f"{process.name} ended as it started: {processes.last_line(process.log)} ({process.log})")
        if time.monotonic() > deadline:
            raise AgqError(f"{process.name} is not ready after {_START_LIMIT:.0f} s: see {process.log}")
        time.sleep(0.05)
