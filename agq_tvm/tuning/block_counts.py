"""How often each block of a compiled library's instructions runs in a call: counted under QEMU, the same every time.

The library runs on the device's emulated processor in a small program of its own, without TVM's runtime.
"""

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tvm_ffi

from agq_tvm.boards.emulate import find_emulator
from agq_tvm.boards.runtime_files import locked
from agq_tvm.errors import AgqError
from agq_tvm.files import fresh_directory
from agq_tvm.targets import Device, detect, load_device
from agq_tvm.targets.link import cache_directory, link_shared, run_tool, system_compiler, zig_cc

TIME_LIMIT = 600.0
_NATIVE = Path(__file__).parent / "native"
_ARM_SYSROOT = "/usr/aarch64-linux-gnu"
_X86_EMULATOR = "qemu-x86_64"
_X86_CPUS = {"avx2": "Haswell-v4", "generic": "Haswell-v4"}
"""By instruction set: QEMU's model. It runs AVX2, but nothing newer."""


class KernelFailed(AgqError):
    """What was run under emulation did not end well.

    Parameters
    ----------
    text : str
    late : bool
        Whether it did not end in time.
    crashed : bool
        Whether a signal ended it.
    """

    def __init__(self, text: str, late: bool = False, crashed: bool = False):
        super().__init__(text)
        self.late, self.crashed = late, crashed


@dataclass(frozen=True)
class Count:
    """What one call of a function executes.

    Attributes
    ----------
    instructions : int
    blocks : dict
        By the offset of a block in the library: its instructions, and how often it runs in one call.
    """

    instructions: int
    blocks: dict[int, tuple[int, int]]


def count_instructions(library: Path, function: str, tensors: Sequence[str], device: Device) -> Count:
    """Count what one call of a function executes.

    Parameters
    ----------
    library : Path
        Made by ``export_library`` for the device.
    function : str
        Its name in the library.
    tensors : sequence of str
        Its arguments, e.g. ``"int8:4x32"``.
    device : Device

    Raises
    ------
    AgqError
        If the emulator or its tools are missing, or the function fails.
    """
    arguments = ",".join(str(number) for number in range(len(tensors)))
    return count_calls(library, tensors, [f"@{function}:{arguments}"], device)[0]


def count_calls(
    library: Path,
    tensors: Sequence[str],
    calls: Sequence[str],
    device: Device,
    threads: int = 1,
    time_limit: float = TIME_LIMIT,
) -> tuple[Count, list[bytes]]:
    """Make calls of a library's functions in turn, and count what the marked one executes.

    Parameters
    ----------
    library : Path
        Made by ``export_library`` for the device.
    tensors : sequence of str
        E.g. ``"int8:4x32"``. Bytes count up, other elements are 1; after ``"~"`` there is anything.
    calls : sequence of str
        ``"add:0,1,i7,2"`` calls ``add`` with tensors 0 and 1, the integer 7 and tensor 2; ``"@"`` stands before the
        one that is counted. ``"=2"`` reads tensor 2.
    device : Device
    threads : int, optional
        What is parallel is cut into as many parts; the first, which has most to do, is counted.
    time_limit : float, optional
        Seconds.

    Returns
    -------
    Count
    list[bytes]
        The tensors that were read.

    Raises
    ------
    KernelFailed
        If a function fails, or they do not end in time.
    AgqError
        If the emulator or its tools are missing.
    """
    command = [str(_runner(device)), str(threads), str(library), *tensors, "--", *calls]
    with tempfile.TemporaryDirectory(prefix="agq-count-") as scratch:
        printed, found = run_counted(command, device, Path(scratch) / "blocks", time_limit)
    base, *read = printed.split("\n")
    blocks = {at - int(base, 16): block for at, block in found.items()}
    return Count(sum(size * runs for size, runs in blocks.values()), blocks), [bytes.fromhex(line) for line in read]


def run_counted(
    command: Sequence[str], device: Device, output: Path, time_limit: float = TIME_LIMIT
) -> tuple[str, dict[int, tuple[int, int]]]:
    """Run a program for a device under emulation.

    Parameters
    ----------
    command : sequence of str
        The program and its arguments.
    device : Device
    output : Path
        A file for the counts, removed again.
    time_limit : float, optional
        Seconds.

    Returns
    -------
    str
        What it printed.
    dict
        By address: the instructions of a block, and how often it ran.

    Raises
    ------
    KernelFailed
        If the program fails, or does not end in time.
    AgqError
        If the emulator is missing.
    """
    emulator = [*emulator_command(device), "-E", "TVM_NUM_THREADS=1", "-plugin", f"{_plugin()},out={output}"]
    try:
        result = subprocess.run(
            [*emulator, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=time_limit
        )
    except subprocess.TimeoutExpired:
        raise KernelFailed(f"the kernel did not end within {time_limit:g} s under emulation", late=True) from None
    if result.returncode:
        words = result.stderr.strip()[-300:] or f"it ended with code {result.returncode}"
        text = f"the kernel does not run on an emulated {device.name}: {words}"
        raise KernelFailed(text, crashed=result.returncode < 0)
    blocks = {}
    for line in output.read_text().splitlines():
        address, size, runs = line.split()
        key = int(address, 16)
        blocks[key] = (int(size), blocks.get(key, (0, 0))[1] + int(runs))
    output.unlink()
    return result.stdout.strip(), blocks


def prepare(device: Device) -> None:
    """Find, or make, what counting needs.

    Raises
    ------
    AgqError
        If the device cannot be emulated here, or the emulator or a compiler is missing.
    """
    emulator_command(device)
    _plugin()
    _runner(device)


def emulated_runner(device: Device) -> list[str]:
    """Return the command that calls a library's functions under emulation, uncounted: see runner.c."""
    return [*emulator_command(device), str(_runner(device))]


@cache
def emulator_command(device: Device) -> list[str]:
    """Return the emulator's command for a device.

    Raises
    ------
    AgqError
        If there is none for it, or it is not installed.
    """
    if device.machine == "aarch64":
        if device.emulator is None:
            raise AgqError(f"{device.name} cannot be simulated: its file names no emulator")
        return [find_emulator(), "-cpu", device.emulator, "-L", _ARM_SYSROOT]
    if device.instruction_set not in _X86_CPUS:
        what = f"QEMU does not run {device.instruction_set}"
        raise AgqError(f"{device.name} cannot be simulated ({what}): tune it on such a machine, with --local")
    if detect.machine() != device.machine:
        raise AgqError(f"{device.name} can be simulated on {device.machine} machines alone: QEMU uses their C library")
    emulator = shutil.which(_X86_EMULATOR)
    if emulator is None:
        raise AgqError(f"simulating {device.name} needs {_X86_EMULATOR}: install it with: apt-get install qemu-user")
    return [emulator, "-cpu", _X86_CPUS[device.instruction_set]]


def _tools(name: str, sources: Sequence[str], make) -> Path:
    """Return a file that ``make(path)`` writes from sources, from the cache if they are what they were."""
    digest = hashlib.sha256(b"".join((_NATIVE / source).read_bytes() for source in sources)).hexdigest()[:12]
    folder = cache_directory("") / f"counting-{name}-{digest}"
    with locked(cache_directory("") / "counting.lock"):
        if not (folder / name).is_file():
            with fresh_directory(folder, "counting") as made:
                make(made / name)
    return folder / name


@cache
def _plugin() -> Path:
    """Return the emulator's plugin, made if need be."""

    def make(path: Path) -> None:
        options = ["-Wall", "-Wextra", "-fvisibility=hidden"]
        link_shared(path, [_NATIVE / "plugin.c"], load_device("host"), options)

    return _tools("plugin.so", ("plugin.c", "mark.h"), make)


@cache
def _runner(device: Device) -> Path:
    """Return the program that calls a library's functions, made if need be."""
    arguments = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden"]
    for include in sorted({tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()}):
        arguments += ["-I", str(include)]

    def make(path: Path) -> None:
        command = [*arguments, "-o", str(path), str(_NATIVE / "runner.c"), "-rdynamic", "-ldl"]
        compiler = system_compiler() if device.machine == detect.machine() else None
        if compiler:
            run_tool([compiler, *command], "compile the runner", TIME_LIMIT)
        else:
            zig_cc(device, command, "compile the runner")

    return _tools(f"runner-{device.machine}-glibc{device.glibc}", ("runner.c", "mark.h"), make)
