"""Linking compiled models: the system's compiler for this machine's kind, zig for every other."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from agq_tvm.errors import AgqError
from agq_tvm.targets import detect
from agq_tvm.targets.device import Device

# The first use for a target builds zig's own start-up objects, which takes half a minute on a small machine.
_TIME_LIMIT = 600.0
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


def cache_directory(name: str) -> Path:
    """Return a directory for files that can be made again, making it if need be.

    Raises
    ------
    AgqError
        If it is not writable.
    """
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(root).expanduser() / "agq_tvm" / name
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AgqError(f"cannot write {path} ({error.strerror}): set XDG_CACHE_HOME to a writable folder") from error
    if not os.access(path, os.W_OK):
        raise AgqError(f"cannot write {path}: set XDG_CACHE_HOME to a writable folder")
    return path


def zig_cc(device: Device, arguments: Sequence[str], what: str) -> None:
    """Run zig's C compiler for a device.

    Parameters
    ----------
    device : Device
        Gives the architecture and the oldest C library.
    arguments : sequence of str
        The compiler's arguments, without the target.
    what : str
        What is being made, for the message of an error.

    Raises
    ------
    AgqError
        If the compiler fails or does not end in time.
    """
    target = f"{device.triple}.{device.glibc}"
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target, *arguments]
    cache = str(cache_directory("zig"))
    variables = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    run_tool(command, what, _TIME_LIMIT, variables | dict(os.environ))


def link_shared(
    output: str | os.PathLike,
    objects: Iterable[str | os.PathLike],
    device: Device,
    options: Sequence[str] = (),
) -> None:
    """Link objects into a shared library for a device; it needs nothing but the C library.

    Parameters
    ----------
    output : path-like
        The library to write.
    objects : iterable of path-like
        Object files (or C sources) for the device.
    device : Device
        What to link for.
    options : sequence of str
        More arguments for the compiler.

    Raises
    ------
    AgqError
        If linking fails, or the result is not for the device's architecture.
    """
    output = Path(output)
    files = [str(path) for path in objects]
    what = f"link {output.name} for {device.name}"
    if not files:
        raise AgqError(f"cannot {what}: there are no objects")
    arguments = ["-shared", "-fPIC", "-O2", "-o", str(output), *files, *options, "-lm"]
    compiler = system_compiler() if device.machine == detect.machine() else None
    if compiler:
        run_tool([compiler, *arguments], what, _TIME_LIMIT)
    else:
        zig_cc(device, arguments, what)
    check_elf(output, device)


def check_elf(path: str | os.PathLike, device: Device) -> None:
    """Check that a file is a 64-bit ELF file for the device's architecture.

    Raises
    ------
    AgqError
        If it is not.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(20)
    except OSError as error:
        raise AgqError(f"cannot read {path}: {error.strerror}") from error
    if len(header) < 20 or header[:6] != b"\x7fELF\x02\x01":
        raise AgqError(f"{path} is not a 64-bit little-endian ELF file: it cannot run on {device.name}")
    if int.from_bytes(header[18:20], "little") != _ELF_MACHINES[device.machine]:
        raise AgqError(f"{path} is not for {device.machine}: it cannot run on {device.name}")


@dataclass(frozen=True)
class Exporter:
    """The ``fcompile`` of TVM's ``export_library``, for one device. It can be sent to worker processes."""

    device: Device
    output_format: ClassVar[str] = "so"

    def __call__(self, file_name: str, files: Sequence[str], options: Sequence[str] | None = None, **_) -> None:
        link_shared(file_name, files, self.device, options or ())


def exporter(device: Device) -> Exporter:
    """Return the ``fcompile`` argument of ``export_library`` for a device.

    Examples
    --------
    >>> executable.export_library("model.so", fcompile=exporter(device))  # doctest: +SKIP
    """
    return Exporter(device)


def system_compiler() -> str | None:
    """Return the path of this machine's C compiler, or None."""
    return next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)


def run_tool(command: list[str], what: str, time_limit: float, environment: dict[str, str] | None = None) -> None:
    """Run a program, its output kept for the message if it fails.

    Parameters
    ----------
    command : list of str
    what : str
        What it is for, as in "cannot link model.so".
    time_limit : float
        Seconds.
    environment : dict, optional
        Instead of this process's own.

    Raises
    ------
    AgqError
        If it does not start, does not end in time, or fails; with the line of its output that says most.
    """
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=time_limit,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise AgqError(f"cannot {what}: {command[0]} did not end within {time_limit:.0f} s") from None
    except OSError as error:
        raise AgqError(f"cannot {what}: {command[0]} does not start ({error.strerror})") from error
    if result.returncode:
        raise AgqError(f"cannot {what}: {_reason(result.stdout, result.returncode)}")


def _reason(output: bytes, code: int) -> str:
    """Return the line of a program's output that says most: its first error, else its last line."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("collect2:")]
    errors = [line for line in lines if "error:" in line]
    return errors[0] if errors else lines[-1] if lines else f"it ended with code {code}"
