"""Writing safetensors one tensor at a time, so that no more than one of the large ones need be in memory."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_TYPES = {"float32": "F32", "float16": "F16", "uint8": "U8", "int8": "I8", "int32": "I32"}
_ALIGNMENT = 8
_LARGEST_OFFSET = 2**53  # the most digits that an offset is given room for


def write_tensors(
    path: str | os.PathLike,
    names: Iterable[str],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: dict[str, str],
) -> None:
    """Write a safetensors file; each tensor is written when it comes.

    The header stands first and tells where everything is, so room for it is left and filled with spaces, which the
    format allows. Tensors whose bytes are not a multiple of 8 wait for the end, the widest types first: thus all are
    aligned without the gaps that the format forbids.

    Parameters
    ----------
    path : path-like
        Replaced if it exists.
    names : iterable of str
        Those of all tensors to come, in any order.
    tensors : iterable of (str, array)
        Each name once; float32, float16, uint8, int8 or int32 of up to two axes.
    metadata : dict of str
        Texts to store in the header.

    Raises
    ------
    OSError
        If the file cannot be written.
    ValueError
        If the tensors are not those that were named.
    """
    names = set(names)
    room = _room(names, metadata)
    header: dict[str, dict] = {}
    with open(path, "wb") as file:
        file.seek(room)
        for name, value in _aligned(tensors):
            if name in header or name not in names:
                raise ValueError(f"tensor {name} {'came twice' if name in header else 'was not named'}")
            begin = file.tell() - room
            file.write(np.ascontiguousarray(value).reshape(-1).view("uint8"))
            header[name] = _entry(_TYPES[value.dtype.name], value.shape, begin, file.tell() - room)
        if header.keys() != names:
            raise ValueError(f"tensor {min(names - header.keys())} did not come")
        size = room - _ALIGNMENT
        file.seek(0)
        file.write(size.to_bytes(_ALIGNMENT, "little") + _encoded(header, metadata).ljust(size))
    os.chmod(Path(path), 0o644)


def _aligned(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterable[tuple[str, np.ndarray]]:
    odd = []
    for name, value in tensors:
        if value.nbytes % _ALIGNMENT:
            odd.append((name, value))
        else:
            yield name, value
    yield from sorted(odd, key=lambda item: -item[1].itemsize)


def _room(names: set[str], metadata: dict[str, str]) -> int:
    """Return the bytes to leave for the header and its length, whatever types, shapes and places turn out to be."""
    widest = _entry("F32", (_LARGEST_OFFSET,) * 2, _LARGEST_OFFSET, _LARGEST_OFFSET)
    size = len(_encoded(dict.fromkeys(names, widest), metadata))
    return _ALIGNMENT + -(-size // _ALIGNMENT) * _ALIGNMENT


def _entry(kind: str, shape: tuple[int, ...], begin: int, end: int) -> dict:
    return {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}


def _encoded(header: dict[str, dict], metadata: dict[str, str]) -> bytes:
    return json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
