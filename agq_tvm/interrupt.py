"""Ctrl-C, which TVM may lose: an exception on its way through C++ becomes a RuntimeError, or is dropped."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_asked = threading.Event()


def watch() -> None:
    """Remember Ctrl-C from now on; it still raises KeyboardInterrupt. Not where whoever started us has it ignored."""
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _note)


def check() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was asked for, however often; loops that call TVM call this, too."""
    if _asked.is_set():
        raise KeyboardInterrupt


@contextmanager
def kept() -> Iterator[None]:
    """Make any exception after Ctrl-C a KeyboardInterrupt: it is what became of that."""
    try:
        yield
    except Exception as error:
        if _asked.is_set():
            raise KeyboardInterrupt from error
        raise


def _note(_number, _frame) -> None:
    _asked.set()
    raise KeyboardInterrupt
