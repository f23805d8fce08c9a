"""Count the instructions that a compiled function executes on an emulated Arm processor."""

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tvm_ffi

from agq_tvm.boards.emulate import find_emulator
from agq_tvm.boards.runtime_files import LIBRARIES, runtime_folder
from agq_tvm.errors import AgqError
from agq_tvm.files import fresh_directory
from agq_tvm.targets import Device, load_device
from agq_tvm.targets.link import cache_directory, link_shared, zig_cc

_HERE = Path(__file__).parent
_SYSROOT = "/usr/aarch64-linux-gnu"
_TIME_LIMIT = 600.0


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
    """Count what one call executes: the difference between three calls and one, halved.

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
    output = library.with_suffix(".blocks")
    runner = str(_tools(device) / "runner")

    def blocks(times: int) -> dict:
        base, found = run_counted([runner, str(library), function, str(times), *tensors], device, output)
        return {at - int(base, 16): block for at, block in found.items()}

    return per_call(blocks(1), blocks(3))


def per_call(once: dict, three: dict) -> Count:
    """Return what one call executes, from the blocks of a process that makes one and of one that makes three."""
    blocks = {at: (size, (runs - once.get(at, (size, 0))[1]) // 2) for at, (size, runs) in three.items()}
    blocks = {at: block for at, block in blocks.items() if block[1]}
    total = sum(size * runs for size, runs in three.values()) - sum(size * runs for size, runs in once.values())
    return Count(total // 2, blocks)


def run_counted(command: Sequence[str], device: Device, output: Path) -> tuple[str, dict[int, tuple[int, int]]]:
    """Run a program for a device under emulation.

    Parameters
    ----------
    command : sequence of str
        The program and its arguments.
    device : Device
    output : Path
        A file for the counts, removed again.

    Returns
    -------
    str
        What it printed.
    dict
        By address: the instructions of a block, and how often it ran.

    Raises
    ------
    AgqError
        If the emulator is missing, or the program fails.
    """
    emulator = [find_emulator(), "-cpu", device.emulator, "-L", _SYSROOT, "-E", "TVM_NUM_THREADS=1"]
    emulator += ["-plugin", f"{_tools(device) / 'plugin.so'},out={output}"]
    name = Path(command[0]).name
    try:
        result = subprocess.run([*emulator, *command], capture_output=True, text=True, timeout=_TIME_LIMIT)
    except subprocess.TimeoutExpired:
        raise AgqError(f"{name} did not end within {_TIME_LIMIT:.0f} s under emulation") from None
    if result.returncode:
        raise AgqError(f"{name} does not run under emulation: {result.stderr.strip()[-300:]}")
    blocks = {}
    for line in output.read_text().splitlines():
        address, size, runs = line.split()
        key = int(address, 16)
        blocks[key] = (int(size), blocks.get(key, (0, 0))[1] + int(runs))
    output.unlink()
    return result.stdout.strip(), blocks


@cache
def _tools(device: Device) -> Path:
    """Return a folder with the plugin and the runner, made if need be."""
    runtime = runtime_folder(device)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_HERE.glob("*.c"))))
    folder = cache_directory("") / f"counting-{device.machine}-{runtime.name}-{digest.hexdigest()[:12]}"
    if not (folder / "runner").is_file():
        with fresh_directory(folder, "counting") as made:
            _build(made, runtime, device)
    return folder


def _build(folder: Path, runtime: Path, device: Device) -> None:
    plugin = folder / "plugin.so"
    link_shared(plugin, [_HERE / "plugin.c"], load_device("host"), ["-Wall", "-Wextra", "-fvisibility=hidden"])
    for name in LIBRARIES:
        shutil.copy2(runtime / name, folder / name)
    arguments = ["-O2", "-std=gnu11", "-Wall", "-Wextra"]
    for include in {tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()}:
        arguments += ["-I", str(include)]
    arguments += ["-o", str(folder / "runner"), str(_HERE / "runner.c")]
    arguments += ["-Wl,--no-as-needed", *(str(folder / name) for name in LIBRARIES), "-Wl,--as-needed"]
    zig_cc(device, [*arguments, "-Wl,-rpath,$ORIGIN", "-ldl"], "compile the runner")
