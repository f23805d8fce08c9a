"""What a person sees of tuning: one line for each task, which moves on a terminal."""

import shutil
import sys
import time

from agq_tvm.tuning.progress import Progress

_EVERY = 0.2
_SELDOM = 30.0
_SHORTEST = 12
"""Letters of a name that stay, however narrow the terminal is."""


class Lines:
    """Shows a line for each task on standard error.

    Parameters
    ----------
    limit_of : callable, optional
        ``f(task) -> seconds or None``: the least that a call can take.
    meaningful : bool
        Whether seconds mean anything; on emulated boards they do not.
    stream : text file, optional
        Instead of standard error.
    """

    def __init__(self, limit_of=lambda task: None, meaningful: bool = True, stream=None):
        self._limit_of, self._meaningful = limit_of, meaningful
        self._stream = stream or sys.stderr
        self._moves = self._stream.isatty()
        self._shown = -1e9

    def update(self, progress: Progress) -> None:
        """Show where a task is: at once on a terminal, now and then in a file."""
        now = time.monotonic()
        if now - self._shown < (_EVERY if self._moves else _SELDOM):
            return
        self._shown = now
        self._write(progress, "" if self._moves else "\n")

    def finish(self, progress: Progress) -> None:
        """Leave a task's last line."""
        self._shown = time.monotonic()
        self._write(progress, "\n")

    def _write(self, progress: Progress, end: str) -> None:
        start, line = "\r\x1b[2K" if self._moves else "", self.line(progress)
        if not end:  # what wraps would not be overwritten
            line = _fitted(line, progress.task.name, shutil.get_terminal_size().columns - 1)
        self._stream.write(f"{start}{line}{end}")
        self._stream.flush()

    def line(self, progress: Progress) -> str:
        """Say where a task is."""
        parts = [f"{progress.task.name}  {progress.known}/{progress.wanted}"]
        limit = self._limit_of(progress.task)  # measured when a task begins, before any candidate is
        if self._meaningful and progress.best:
            parts += [f"best {readable(progress.best)}", rate(progress)]
            parts += [f"{100 * limit / progress.best:.0f} % of the limit"] if limit else []
            parts += [f"default {readable(progress.default)}"] if progress.default else []
        parts.append(f"{progress.failures} failed")
        if progress.time_left is not None:
            parts.append(f"{clock(progress.time_left)} left in all")
        return ", ".join(parts)


def _fitted(line: str, name: str, width: int) -> str:
    """Shorten a line to a width, first the name that it begins with."""
    excess = len(line) - width
    if excess > 0:
        line = f"{name[: max(_SHORTEST, len(name) - excess - 1)]}…{line[len(name) :]}"
    return line[:width]


def rate(progress: Progress) -> str:
    """Return billions of operations a second of the best; of bytes, where nothing is multiplied."""
    if progress.task.macs:
        return f"{2 * progress.task.macs / progress.best / 1e9:.1f} GOP/s"
    return f"{progress.task.bytes / progress.best / 1e9:.1f} GB/s"


def readable(seconds: float) -> str:
    """Return a short time in a unit that suits it."""
    for unit, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-9:.3g} ns"


def clock(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
