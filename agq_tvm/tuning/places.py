"""Where candidates run: this machine, with TVM's runtime alone, or a board's session. See `measure.Place`."""

import importlib.util
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from agq_tvm.boards.tracker import board_is_emulated
from agq_tvm.runtime.huge_pages import one_block
from agq_tvm.runtime.threads import Threads, configure_board
from agq_tvm.runtime.virtual_machine import aligned
from agq_tvm.tvm_runtime import tvm_ffi

_CPU = 1


class Here:
    """This machine."""

    keeps_time = True

    def __init__(self) -> None:
        self._ffi = tvm_ffi()
        libraries = Path(importlib.util.find_spec("tvm").origin).parent / "lib"
        self._ffi.libinfo.load_lib_ctypes("tvm", "tvm_runtime_extra", "RTLD_GLOBAL", extra_lib_paths=[libraries])
        self._evaluator = self._ffi.get_global_func("runtime.RPCTimeEvaluator")
        self._module: Any = None

    def threads(self, count: int):
        """See `Place`."""
        return Threads(count).running()

    def library(self, path: str) -> Callable[[str], Callable]:
        """See `Place`."""
        self._module = module = self._ffi.load_module(path)
        from_dlpack = self._ffi.from_dlpack

        def function(name: str) -> Callable:
            call = module[name]
            return lambda *arrays: call(*(from_dlpack(array) for array in arrays))

        return function

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """See `Place`."""
        return aligned(shape, dtype)

    def copies(self, tensor: np.ndarray, count: int) -> list[np.ndarray]:
        """See `Place`."""
        return one_block([tensor] * count)

    def array(self, tensor: np.ndarray) -> np.ndarray:
        """See `Place`."""
        return tensor

    def time(self, name: str, arguments: Sequence, repeats: int, milliseconds: int) -> list[float]:
        """See `Place`."""
        values = [self._ffi.from_dlpack(value) if isinstance(value, np.ndarray) else value for value in arguments]
        evaluate = self._evaluator(self._module, name, _CPU, 0, 1, repeats, milliseconds, 100, 0, 1, 0, "")
        return list(struct.unpack(f"@{repeats}d", bytes(evaluate(*values))))


class Board:
    """A board's session, from `agq_tvm.boards.tracker.connect`."""

    def __init__(self, session) -> None:
        import tvm

        self.keeps_time = not board_is_emulated(session)
        self._session, self._device, self._empty = session, session.cpu(0), tvm.runtime.empty
        self._module: Any = None

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """See `Place`; a session keeps its threads."""
        configure_board(self._session.get_function, count)
        yield

    def library(self, path: str) -> Callable[[str], Callable]:
        """See `Place`."""
        self._session.upload(path)
        self._module = self._session.load_module(Path(path).name)
        return lambda name: self._module[name]

    def empty(self, shape: tuple[int, ...], dtype: str):
        """See `Place`."""
        return self._empty(shape, dtype, self._device)

    def copies(self, tensor, count: int) -> list:
        """See `Place`."""
        return [tensor.copyto(self._device) for _ in range(count)]

    def array(self, tensor) -> np.ndarray:
        """See `Place`."""
        return tensor.numpy()

    def time(self, name: str, arguments: Sequence, repeats: int, milliseconds: int) -> list[float]:
        """See `Place`."""
        evaluate = self._module.time_evaluator(name, self._device, 1, repeats, milliseconds)
        return list(evaluate(*arguments).results)
