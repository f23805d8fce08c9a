"""llama.cpp's Arm kernels, counted like ours: one ``ggml_mul_mat``, one thread, float in and out.

Its source comes from the package registry, as that of llama-cpp-python, and is built here for each device.
"""

import hashlib
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.files import fresh_directory
from agq_tvm.targets import Device, load_device
from agq_tvm.targets.link import cache_directory, run_tool, zig_cc
from agq_tvm.tuning.block_counts import run_counted
from benchmarks.instructions.products import CHANNELS, COLUMNS, DEVICES, ROWS

PACKAGE = "llama-cpp-python==0.3.36"
TYPES = ("Q4_0", "Q4_K", "Q8_0", "F32")
LARGEST_ERROR = 0.2
"""Relative, against float: what is above it does not multiply."""

_DRIVER = Path(__file__).with_name("llama_cpp.cpp")
_SOURCE = "vendor/llama.cpp/ggml"
_FILES = """
    ggml.c ggml-alloc.c ggml-backend.cpp ggml-backend-meta.cpp ggml-quants.c ggml-threading.cpp
    ggml-cpu/ggml-cpu.c ggml-cpu/ggml-cpu.cpp ggml-cpu/repack.cpp ggml-cpu/hbm.cpp ggml-cpu/quants.c
    ggml-cpu/traits.cpp ggml-cpu/binary-ops.cpp ggml-cpu/unary-ops.cpp ggml-cpu/vec.cpp ggml-cpu/ops.cpp
    ggml-cpu/amx/amx.cpp ggml-cpu/amx/mmq.cpp ggml-cpu/tiled/tiled.cpp ggml-cpu/tiled/tiled-kernel.cpp
    ggml-cpu/arch/arm/quants.c ggml-cpu/arch/arm/repack.cpp ggml-cpu/llamafile/sgemm.cpp
""".split()
_DEFINES = ("GGML_USE_CPU_REPACK", "GGML_USE_LLAMAFILE", "GGML_SCHED_MAX_COPIES=4", "_GNU_SOURCE", "NDEBUG")
_LEFT_OUT = {"cortex-x2": "-v9a-sve-sve2"}
"""By the device's core: what our kernels for it do without as well, see the device's file."""
_DOWNLOAD_LIMIT = 900.0


@dataclass(frozen=True)
class Peer:
    """What one product of llama.cpp executes.

    Attributes
    ----------
    device, type : str
        The type of its weights is llama.cpp's.
    repacked : bool
        Whether llama.cpp stored the weights in another order for the device.
    rows, instructions : int
    error : float
        Of the first row, relative to float.
    """

    device: str
    type: str
    repacked: bool
    rows: int
    instructions: int
    error: float

    @property
    def ratio(self) -> float:
        """Multiply-accumulates for each instruction."""
        return self.rows * COLUMNS * CHANNELS / self.instructions

    def as_line(self) -> tuple[str, ...]:
        """Return a row of the table."""
        name = f"{self.type}{' repacked' if self.repacked else ''}"
        figures = (str(self.rows), str(self.instructions), f"{self.ratio:.2f}", f"{100 * self.error:.1f}")
        return (self.device, name, *figures)


def count(folder: Path) -> Iterator[Peer]:
    """Build llama.cpp for each device and count what its products execute, those in another order where there are any.

    Parameters
    ----------
    folder : Path
        For files that are in use.

    Raises
    ------
    AgqError
        If it cannot be fetched, built or run, or gives wrong results.
    """
    for name in DEVICES:
        device = load_device(name)
        program = _program(device)
        for kind in TYPES:
            for form in ("plain", "repacked"):
                yield from _count_type(program, device, kind, form, folder / "peer.blocks")


def _count_type(program: Path, device: Device, kind: str, form: str, output: Path) -> Iterator[Peer]:
    for rows in ROWS:
        shape = [str(extent) for extent in (CHANNELS, COLUMNS, rows)]
        command = [str(program), kind.lower(), form, *shape]
        (error, once), (_, three) = (run_counted([*command, times], device, output) for times in ("1", "3"))
        if error == "none":
            return
        if not float(error) < LARGEST_ERROR:
            raise AgqError(f"llama.cpp's {kind} ({form}) is off by {error} on {device.name}: its build is wrong")
        yield Peer(device.name, kind, form == "repacked", rows, _per_call(once, three), float(error))


def _per_call(once: dict, three: dict) -> int:
    """Return the instructions of one call, from the blocks of a process that makes one and of one that makes three."""
    one, all_three = (sum(size * runs for size, runs in blocks.values()) for blocks in (once, three))
    return (all_three - one) // 2


def _program(device: Device) -> Path:
    """Return the driver, linked with ggml for a device; made if need be."""
    source = _fetch()
    digest = hashlib.sha256(_DRIVER.read_bytes()).hexdigest()[:12]
    folder = cache_directory("") / f"{source.name}-{device.cpu}-{digest}"
    if not folder.is_dir():
        print(f"building {PACKAGE} for {device.cpu}: some minutes", file=sys.stderr)
        with fresh_directory(folder, "llama.cpp") as made:
            _build(source / _SOURCE, made, device)
    return folder / "llama_cpp"


def _build(ggml: Path, folder: Path, device: Device) -> None:
    processor = device.cpu.replace("-", "_") + _LEFT_OUT.get(device.cpu, "")
    arguments = [f"-mcpu={processor}", "-O3", "-g0", "-lc++"]
    arguments += [f"-D{define}" for define in _DEFINES]
    for include in ("include", "src", "src/ggml-cpu"):
        arguments += ["-I", str(ggml / include)]
    sources = [_DRIVER, *(ggml / "src" / name for name in _FILES)]
    objects = [str(folder / f"{number}.o") for number in range(len(sources))]

    def compile_one(source: Path, made: str) -> None:
        zig_cc(device, [*arguments, "-c", str(source), "-o", made], f"compile llama.cpp's {source.name}")

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(compile_one, sources, objects))
    link = [*objects, "-lc++", "-lm", "-ldl", "-lpthread", "-o", str(folder / "llama_cpp")]
    zig_cc(device, link, f"link llama.cpp for {device.name}")


def _fetch() -> Path:
    """Return a folder with the package's source, fetched if need be."""
    folder = cache_directory("") / PACKAGE.replace("==", "-")
    if folder.is_dir():
        return folder
    with fresh_directory(folder, "llama.cpp") as made, tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        run_tool([*command, "--dest", download, PACKAGE], f"download {PACKAGE} with pip", _DOWNLOAD_LIMIT)
        (archive,) = Path(download).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            for member in tar:
                member.name = member.name.partition("/")[2]
                if member.name.startswith(f"{_SOURCE}/") and member.isfile():
                    tar.extract(member, made, filter="data")
        version = made / _SOURCE / "src" / "ggml-version.h"
        version.write_text('#define GGML_VERSION "0"\n#define GGML_COMMIT "0"\n')
    return folder
