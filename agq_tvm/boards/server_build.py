"""Compiling the board server: one folder that runs on a board without Python."""

import hashlib
import shutil
from importlib import metadata
from pathlib import Path

from agq_tvm.boards.runtime_files import LIBRARIES, locked, runtime_folder, runtime_versions
from agq_tvm.files import fresh_directory
from agq_tvm.targets import Device
from agq_tvm.targets.link import cache_directory, check_elf, zig_cc

SERVER = "board-server"
_SOURCES = Path(__file__).parent / "server"


def server_folder(device: Device) -> Path:
    """Return a folder with the board server for a device and the libraries that it needs, made if need be.

    The folder can be copied to a board as it is; start it there with ``./board-server --key KEY --tracker
    HOST:PORT``.

    Raises
    ------
    AgqError
        If the libraries cannot be downloaded or the server cannot be compiled.
    """
    cache = cache_directory("")
    final = cache / f"board-server-{device.machine}-{_fingerprint(device)}"
    runtime = runtime_folder(device)
    with locked(cache / "board-server.lock"):
        if not (final / SERVER).is_file():
            with fresh_directory(final, "board-server") as folder:
                _build(folder, runtime, device)
    return final


def copy_server(device: Device, output: Path) -> None:
    """Write the board server's folder for a device to `output`."""
    built = server_folder(device)
    with fresh_directory(output, "board-server") as folder:
        for name in (SERVER, *LIBRARIES):
            shutil.copy2(built / name, folder / name)


def _fingerprint(device: Device) -> str:
    """Return a name that changes with anything that the server is made of."""
    digest = hashlib.sha256()
    parts = [device.triple, device.glibc, metadata.version("ziglang"), *runtime_versions().values()]
    for part in [
        *(part.encode() for part in parts),
        *(path.read_bytes() for path in sorted(_SOURCES.iterdir())),
    ]:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _build(folder: Path, runtime: Path, device: Device) -> None:
    import tvm_ffi

    for name in LIBRARIES:
        shutil.copy2(runtime / name, folder / name)
    arguments = ["-O2", "-std=gnu11", "-Wall", "-Wextra"]
    for include in {tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()}:
        arguments += ["-I", str(include)]
    arguments += ["-o", str(folder / SERVER), *map(str, sorted(_SOURCES.glob("*.c")))]
    # The libraries register themselves with each other when loaded: all are needed, though few are called.
    arguments += ["-Wl,--no-as-needed", *(str(folder / name) for name in LIBRARIES), "-Wl,--as-needed"]
    arguments += ["-Wl,-rpath,$ORIGIN", "-lm"]
    zig_cc(device, arguments, f"compile the board server for {device.machine}")
    check_elf(folder / SERVER, device)
