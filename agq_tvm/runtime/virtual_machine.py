"""The functions of a compiled library on this machine, called without copying what goes in or comes out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from agq_tvm.tvm_runtime import tvm_ffi

ALIGNMENT = 64
"""Of every tensor that compiled code gets, and of those in a bundle's file, in bytes."""
_CPU, _FIRST, _POOLED = 1, 0, 2  # TVM's numbers for the device and how it allocates


def aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return an array of zeros that a tensor can view; memory is taken where it is first written."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.zeros(size + ALIGNMENT, "uint8")
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


class VirtualMachine:
    """Functions ``f(int32 arrays…, state) -> float32 array``.

    Parameters
    ----------
    library : path-like
    state : list of array
        Caches and weights, at multiples of 64 bytes: what the functions take as one tuple, read and updated in place.
    instrument : callable, optional
        Called before and after each function that the machine calls, see TVM's ``VirtualMachine.set_instrument``.
    """

    def __init__(self, library: str | Path, state: list[np.ndarray], instrument: Callable | None = None):
        ffi = tvm_ffi()
        self._from_dlpack = ffi.from_dlpack
        self._module = ffi.load_module(str(library))["vm_load_executable"]()
        self._module["vm_initialization"](_CPU, _FIRST, _POOLED)
        if instrument is not None:
            self._module["set_instrument"](ffi.convert(instrument))
        self._state = ffi.convert([ffi.from_dlpack(array) for array in state])
        self._calls: dict[str, tuple] = {}

    def run(self, function: str, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        """Call a function; its inputs always have the shapes that they had the first time."""
        if function not in self._calls:
            self._calls[function] = self._prepare(function, arrays)
        call, inputs, arguments = self._calls[function]
        for own, array in zip(inputs, arrays, strict=True):
            own[:] = array
        return np.from_dlpack(call(*arguments))

    def _prepare(self, function: str, arrays: tuple[np.ndarray, ...]) -> tuple:
        """Return a function and its inputs, as arrays and as tensors: to make them takes longer than some kernels."""
        inputs = [aligned(array.shape, "int32") for array in arrays]
        return self._module[function], inputs, [*(self._from_dlpack(own) for own in inputs), self._state]
