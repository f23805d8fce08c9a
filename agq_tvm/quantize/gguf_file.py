"""Reading GGUF files without trusting them: every length is checked against the file before it is used."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agq_tvm.errors import AgqError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# GGML's number of each tensor type that is read: its name, weights in a block, bytes of a block.
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}
_OTHERS = {6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file.

    Attributes
    ----------
    kind : str
        ``"F32"``, ``"F16"``, ``"BF16"``, ``"Q8_0"``, ``"Q4_1"`` or ``"Q4_0"``.
    shape : tuple of int
        Outermost dimension first.
    data : uint8 array
        Of F32, F16 and BF16 flat; else [rows, blocks of 32, bytes of a block].
    """

    kind: str
    shape: tuple[int, ...]
    data: np.ndarray


def read_gguf(path: str | os.PathLike) -> tuple[dict[str, object], dict[str, GgufTensor]]:
    """Read the metadata of a GGUF file and map its tensors into memory.

    Returns
    -------
    metadata : dict
        Numbers, strings, booleans, and lists of them.
    tensors : dict of GgufTensor

    Raises
    ------
    AgqError
        If it is not a little-endian GGUF file of version 2 or 3, is truncated, or has other types of tensors.
    """
    path = Path(path)
    try:
        if path.stat().st_size < 24:
            raise AgqError(f"{path} is not a GGUF file: it is too short")
        data = np.asarray(np.memmap(path, mode="r"))
    except OSError as error:
        raise AgqError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return _Reader(data).read()
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise AgqError(f"{path} is not a usable GGUF file: {error}") from error


class _Reader:
    """A cursor over the mapped file; raises ValueError for anything that does not fit."""

    def __init__(self, data: np.ndarray) -> None:
        self._data = data
        self._at = 0

    def read(self) -> tuple[dict[str, object], dict[str, GgufTensor]]:
        if bytes(self._take(4)) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, tensor_count, value_count = self._unpack("I"), self._unpack("Q"), self._unpack("Q")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, only 2 and 3 are read")
        metadata: dict[str, object] = {}
        for _ in range(value_count):
            name = self._string()
            if name in metadata:
                raise ValueError(f"{name} is there twice")
            metadata[name] = self._value(self._unpack("I"))
        infos = {}
        for _ in range(tensor_count):
            name, info = self._tensor_info()
            if name in infos:
                raise ValueError(f"tensor {name} is there twice")
            infos[name] = info
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment {alignment!r} is not a power of two")
        start = -(-self._at // alignment) * alignment
        return metadata, {name: self._tensor(name, start, *info) for name, info in infos.items()}

    def _take(self, size: int) -> np.ndarray:
        if size > len(self._data) - self._at:
            raise ValueError(f"it ends at byte {len(self._data)}, in the middle of something")
        self._at += size
        return self._data[self._at - size : self._at]

    def _unpack(self, code: str):
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        return bytes(self._take(self._unpack("Q"))).decode("utf-8")

    def _value(self, kind: int):
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"it has a value of unknown type {kind}")
        item, count = self._unpack("I"), self._unpack("Q")
        if item == _STRING:
            return [self._string() for _ in range(count)]
        if item not in _SCALARS:
            raise ValueError(f"it has an array of unknown type {item}")
        width = struct.calcsize("<" + _SCALARS[item])
        return list(struct.unpack(f"<{count}{_SCALARS[item]}", self._take(count * width)))

    def _tensor_info(self) -> tuple[str, tuple]:
        name, rank = self._string(), self._unpack("I")
        if not 1 <= rank <= 4:
            raise ValueError(f"tensor {name} has {rank} dimensions")
        shape = tuple(self._unpack("Q") for _ in range(rank))[::-1]
        return name, (shape, self._unpack("I"), self._unpack("Q"))

    def _tensor(self, name: str, start: int, shape: tuple, kind: int, offset: int) -> GgufTensor:
        if kind not in _TYPES:
            found = _OTHERS.get(kind, f"of GGML type {kind}")
            known = ", ".join(known for known, _, _ in _TYPES.values())
            raise ValueError(f"tensor {name} is {found}, only {known} are read")
        label, block, width = _TYPES[kind]
        count = 1
        for size in shape:
            count *= size
        if count == 0 or shape[-1] % block:
            raise ValueError(f"tensor {name} has shape {list(shape)}, which {label} cannot hold")
        self._at = start + offset
        if self._at > len(self._data):
            raise ValueError(f"tensor {name} lies beyond its end")
        data = self._take(count // block * width)
        if block > 1:
            data = data.reshape(-1, shape[-1] // block, width)
        return GgufTensor(label, shape, data)
