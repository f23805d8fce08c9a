"""Threads of TVM's pool: how many, on which processors, and for how long they wait awake.

TVM keeps a pool for each thread that calls it. Left alone, a pool takes half the processors of an x86 machine and
binds its caller to the first one, and with it everything that the caller starts later.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from agq_tvm.targets.processors import Processor, alike, best_first, processor_quota, usable_processors
from agq_tvm.tvm_runtime import tvm_ffi

SPINS = 50
"""How often a thread without work looks for some, and lets others run, before it sleeps; the board server's, too."""
_SPIN_VARIABLE = "TVM_THREAD_POOL_SPIN_COUNT"  # read once, when the process starts its first pool
_BIG, _ONE_PROCESSOR_EACH, _SHARE_ALL = 1, -2, -3  # TVM's modes
_CONFIGURE = "runtime.config_threadpool"
_pool = threading.local()


class Threads:
    """Threads for calls of compiled functions.

    They take the best processors that this process may use, one each if that takes all of their kind. Fewer threads
    share all of a kind, because the scheduler knows which of them other programs use.

    Parameters
    ----------
    count : int
        Those that are more than the processors, or than the process's control groups allow, are left out.

    Attributes
    ----------
    count : int
    """

    def __init__(self, count: int) -> None:
        self._processors = usable_processors()
        self.count = min(count, len(self._processors), processor_quota() or count)
        self._arguments = pool_arguments(self._processors, self.count)
        chosen = alike(self._processors, self.count)
        # The caller is the first thread.
        self._callers = {each.number for each in (chosen[:1] if len(chosen) == self.count else chosen)}

    def configure(self) -> None:
        """Make the pool of the calling thread; where the caller itself may run stays as it is."""
        os.environ.setdefault(_SPIN_VARIABLE, str(SPINS))
        configure, before = tvm_ffi().get_global_func(_CONFIGURE), os.sched_getaffinity(0)
        if not hasattr(_pool, "arguments"):  # its size is that of the first call
            configure(*_whole_pool(self._processors))
        configure(*self._arguments)
        os.sched_setaffinity(0, before)
        _pool.arguments = self._arguments

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the calls inside on these threads; the caller is one of them, and afterwards free again.

        What starts other processes belongs outside: they inherit where their parent may run.
        """
        if getattr(_pool, "arguments", None) != self._arguments:
            self.configure()
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._callers)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


def pool_arguments(processors: Sequence[Processor], count: int) -> tuple[int, int, list[str]]:
    """Return how TVM is told to run `count` threads on the first of `processors`: its mode, `count`, and their numbers.

    It gives threads processors of their own only if it is told of as many as its pool has threads, which is all.
    """
    chosen = alike(processors, count)
    pinned = len(chosen) == count > 1
    named = processors if pinned else chosen
    return _ONE_PROCESSOR_EACH if pinned else _SHARE_ALL, count, [str(each.number) for each in named]


def _whole_pool(processors: Sequence[Processor]) -> tuple[int, int, list[str]]:
    return _SHARE_ALL, len(processors), [str(each.number) for each in processors]


def configure_board(get_function: Callable[[str], Callable], count: int) -> None:
    """Do the same on a board, whose session is bound with its threads: it runs nothing else.

    Parameters
    ----------
    get_function : callable
        `get_function` of an RPC session.
    count : int
        TVM's Python server cannot tell its processors; there they are the first ones of the highest frequency.
    """
    try:
        described, configure = str(get_function("agq.board.processors")()), get_function("agq.board.use_threads")
    except (AttributeError, RuntimeError, ValueError):
        get_function(_CONFIGURE)(_BIG, count)
        return
    fields = (line.split(" ") for line in described.splitlines())
    processors = best_first((int(number), int(speed), int(hertz), names) for number, speed, hertz, names in fields)
    for mode, threads, numbers in (_whole_pool(processors), pool_arguments(processors, min(count, len(processors)))):
        configure(mode, threads, " ".join(numbers))
