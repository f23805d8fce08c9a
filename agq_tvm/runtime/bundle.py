"""The bundle: a directory with everything that one device needs to run a model, and its checks.

manifest.json    versions, device, shapes, and a checksum for every file and every parameter
model.so         kernels and the Relax VM's program
params.bin       packed parameters, little-endian, each at a multiple of 64 bytes
tokenizer.json   (and tokenizer_config.json)
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.files import read_json, sha256_file
from agq_tvm.runtime.huge_pages import collapse
from agq_tvm.runtime.virtual_machine import ALIGNMENT, aligned

FORMAT_VERSION = 1
LIBRARY, PARAMETERS, MANIFEST = "model.so", "params.bin", "manifest.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
CACHES = (".keys", ".values", ".key_scales", ".value_scales", ".positions")
"""How the names of the tensors end that a sequence fills."""
_DTYPES = ("uint8", "int8", "int32", "float16", "float32")


def versions() -> dict[str, str]:
    """Return the versions that compiled code depends on."""
    from importlib.metadata import version

    from agq_tvm import __version__

    return {"agq_tvm": __version__, "tvm": version("apache-tvm"), "tvm_ffi": version("apache-tvm-ffi")}


@dataclass(frozen=True)
class Parameter:
    """One array of ``params.bin``.

    Attributes
    ----------
    name, dtype : str
    shape : tuple of int
    offset : int
        In bytes, a multiple of 64.
    sha256 : str
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    sha256: str

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=object)) * np.dtype(self.dtype).itemsize


def write_parameters(path: Path, names: list[tuple[str, tuple[int, ...], str]], array_of) -> list[Parameter]:
    """Write arrays one after another.

    Parameters
    ----------
    names : list of (name, shape, dtype)
    array_of : callable
        ``f(name) -> array``, which must have that shape and type.
    """
    written = []
    with open(path, "wb") as file:
        for name, shape, dtype in names:
            array = np.ascontiguousarray(array_of(name))
            if array.shape != shape or array.dtype != dtype:
                raise AssertionError(f"{name}: packed {array.dtype}{array.shape}, compiled {dtype}{shape}")
            file.write(bytes(-file.tell() % ALIGNMENT))
            data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
            written.append(Parameter(name, dtype, shape, file.tell(), hashlib.sha256(data).hexdigest()))
            file.write(data)
    return written


class Bundle:
    """A bundle on disk, checked.

    Attributes
    ----------
    path : Path
    manifest : dict
    parameters : list of Parameter
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise AgqError(f"{path} is not a bundle: make one with `agq compile CKPT --target NAME -o BUNDLE`")
        self.manifest = read_json(self.path / MANIFEST, "bundle")
        try:
            self._check_manifest()
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise self._damaged(f"its manifest lacks or garbles {error}") from error
        self._check_files()

    def _damaged(self, what: str) -> AgqError:
        return AgqError(f"bundle {self.path} is damaged: {what}; compile it again")

    def _check_manifest(self) -> None:
        manifest = self.manifest
        if manifest["format_version"] != FORMAT_VERSION:
            raise AgqError(
                f"bundle {self.path} has format {manifest['format_version']}, this agq reads {FORMAT_VERSION}: "
                "compile it again"
            )
        ours = versions()
        for key in ("tvm", "tvm_ffi"):
            if manifest["versions"][key] != ours[key]:
                raise AgqError(
                    f"bundle {self.path} was compiled with {key} {manifest['versions'][key]}, here is "
                    f"{ours[key]}: compile it again, or install that version"
                )
        device, model = manifest["device"], manifest["model"]
        strings = [*(device[key] for key in ("name", "machine", "instruction_set")), *device["features"]]
        if not all(isinstance(value, str) for value in strings):
            raise ValueError("device")
        sizes = [model["vocab_size"], manifest["context"], device["threads"], *manifest["buckets"]]
        if not all(type(value) is int and 0 < value < 1 << 31 for value in sizes):
            raise ValueError("a size")
        self.caches = [(str(n), _shape(s), _dtype(d)) for n, s, d in manifest["caches"]]
        self.parameters = [
            Parameter(str(p["name"]), _dtype(p["dtype"]), _shape(p["shape"]), int(p["offset"]), p["sha256"])
            for p in manifest["parameters"]
        ]
        self._check_placement(manifest["files"][PARAMETERS]["bytes"])

    def _check_placement(self, size: int) -> None:
        end = 0
        for p in self.parameters:
            if p.offset % ALIGNMENT or p.offset < end:
                raise ValueError(f"the place of {p.name}")
            end = p.offset + p.nbytes
        if end != size:
            raise ValueError("the size of params.bin")

    def _check_files(self) -> None:
        for name, expected in self.manifest["files"].items():
            path = self.path / name
            if Path(name).name != name or not path.is_file():
                raise self._damaged(f"{name} is missing")
            if path.stat().st_size != expected["bytes"]:
                raise self._damaged(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
            if name != PARAMETERS and sha256_file(path) != expected["sha256"]:
                raise self._damaged(f"{name} has another checksum")
        if LIBRARY not in self.manifest["files"]:
            raise self._damaged(f"{LIBRARY} is missing")

    def check_runs_on(self, machine: str, features: frozenset[str], where: str = "this machine") -> None:
        """Refuse a processor that lacks what the code needs.

        Parameters
        ----------
        machine : str
            Architecture, as ``uname -m`` says.
        features : frozenset of str
            Names as in ``/proc/cpuinfo``.
        where : str
            Whose processor it is.

        Raises
        ------
        AgqError
        """
        device, here = self.manifest["device"], where == "this machine"
        if machine != device["machine"]:
            hint = (
                "compile it with `--target host`, or run it on a board" if here else "compile it for the board's device"
            )
            raise AgqError(
                f"bundle {self.path} is for {device['machine']} ({device['name']}), {where} is {machine}: {hint}"
            )
        missing = [feature for feature in device["features"] if feature not in features]
        if missing:
            lacking = "this processor lacks" if here else f"the processor of {where} lacks"
            raise AgqError(
                f"bundle {self.path} is for {device['name']} and needs {', '.join(missing)}, which {lacking}: "
                + ("compile it with `--target host`" if here else "compile it for the board's device")
            )

    def arrays(self) -> dict[str, np.ndarray]:
        """Read ``params.bin`` and check every parameter.

        The file could be mapped, but then its pages are of 4 KB: read into one large buffer with huge pages, the same
        weights stream faster, see docs/design.md.

        Returns
        -------
        dict of str to array
            Views of one buffer, at multiples of 64 bytes.

        Raises
        ------
        AgqError
            If a checksum differs, or the file cannot be read.
        """
        size = self.manifest["files"][PARAMETERS]["bytes"]
        data = aligned((size,), "uint8")
        try:
            with open(self.path / PARAMETERS, "rb") as file:
                count = file.readinto(data)
        except OSError as error:
            raise AgqError(f"cannot read {self.path / PARAMETERS}: {error.strerror}") from error
        if count != size:
            raise self._damaged(f"{PARAMETERS} has {count} bytes instead of {size}")
        collapse(data)
        arrays = {}
        for p in self.parameters:
            part = data[p.offset : p.offset + p.nbytes]
            if hashlib.sha256(part).hexdigest() != p.sha256:
                raise self._damaged(f"parameter {p.name} has another checksum")
            arrays[p.name] = part.view(p.dtype).reshape(p.shape)
        return arrays

    @property
    def nbytes(self) -> int:
        """Size of all its files."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())


def _shape(value) -> tuple[int, ...]:
    shape = tuple(value)
    if not shape or not all(type(extent) is int and 0 < extent < 1 << 40 for extent in shape):
        raise ValueError("a shape")
    return shape


def _dtype(value) -> str:
    if value not in _DTYPES:
        raise ValueError("a type")
    return value
