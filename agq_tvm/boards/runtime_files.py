"""TVM's runtime libraries for a board, out of the wheels on PyPI."""

import fcntl
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.files import fresh_directory
from agq_tvm.progress import say
from agq_tvm.targets import Device
from agq_tvm.targets.link import cache_directory, check_elf, run_tool

# What is taken out of which distribution.
_MEMBERS = {
    "apache-tvm": ("tvm/lib/libtvm_runtime.so", "tvm/lib/libtvm_runtime_extra.so"),
    "apache-tvm-ffi": ("tvm_ffi/lib/libtvm_ffi.so",),
}
LIBRARIES = tuple(Path(member).name for members in _MEMBERS.values() for member in members)
_MAX_LIBRARY = 256 << 20
_TIME_LIMIT = 1800.0


def runtime_versions() -> dict[str, str]:
    """Return the versions of the installed TVM distributions; a board must run the same."""
    return {name: metadata.version(name) for name in _MEMBERS}


def runtime_folder(device: Device) -> Path:
    """Return a folder with TVM's runtime libraries for a device, downloading them the first time (100 MB).

    Raises
    ------
    AgqError
        If the download fails or is not what was asked for.
    """
    versions = runtime_versions()
    cache = cache_directory("")
    final = cache / "-".join(["board-runtime", device.machine, *versions.values()])
    with locked(cache / "board-runtime.lock"):
        if all((final / name).is_file() for name in LIBRARIES):
            return final
        with tempfile.TemporaryDirectory(prefix="wheels.", dir=cache) as wheels:
            say(f"downloading TVM's runtime for {device.machine} boards (100 MB, once)")
            _download(Path(wheels), versions, device)
            with fresh_directory(final, "board-runtime") as folder:
                for name, version in versions.items():
                    _extract(_wheel(Path(wheels), name, version, device), _MEMBERS[name], folder, device)
    return final


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time run the block, so that two do not do the same long work."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(folder: Path, versions: dict[str, str], device: Device) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command += ["--no-deps", "--only-binary=:all:", "--python-version", "3.11"]
    for glibc in ("2_28", "2_27", "2_24", "2_17"):
        command += ["--platform", f"manylinux_{glibc}_{device.machine}"]
    command += ["--dest", str(folder), *(f"{name}=={version}" for name, version in versions.items())]
    run_tool(command, f"download TVM's runtime for {device.machine} with pip", _TIME_LIMIT)


def _wheel(folder: Path, name: str, version: str, device: Device) -> Path:
    """Return the one wheel of a distribution, by its exact name, version and architecture."""
    start = re.escape(f"{name.replace('-', '_')}-{version}-")
    found = [path for path in folder.iterdir() if re.fullmatch(rf"{start}[\w.-]+_{device.machine}\.whl", path.name)]
    if len(found) != 1:
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise AgqError(f"pip did not bring one {name} {version} for {device.machine}: it brought {names}")
    return found[0]


def _extract(wheel: Path, members: tuple[str, ...], folder: Path, device: Device) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in members:
                if archive.getinfo(member).file_size > _MAX_LIBRARY:
                    raise AgqError(f"{wheel.name}: {member} is too large to be TVM's runtime")
                path = folder / Path(member).name
                path.write_bytes(archive.read(member))
                check_elf(path, device)
    except (KeyError, zipfile.BadZipFile) as error:
        raise AgqError(f"{wheel.name} is not the wheel that was expected: {error}") from error
