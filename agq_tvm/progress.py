"""Progress on standard error, so that standard output stays for results."""

import sys
import weakref
from collections.abc import Iterable

from tqdm import tqdm

_bars: weakref.WeakSet[tqdm] = weakref.WeakSet()


def progress(items: Iterable, what: str, total: int | None = None, unit: str = "it") -> Iterable:
    """Iterate over `items`, showing a bar named `what` on standard error when the work takes over a second."""
    bar = tqdm(items, desc=what, total=total, unit=unit, file=sys.stderr, delay=1.0, leave=False, dynamic_ncols=True)
    _bars.add(bar)
    return bar


def say(text: str) -> None:
    """Print one line about what happens now on standard error, in place of one that moves."""
    start = "\r\x1b[2K" if sys.stderr.isatty() else ""
    print(f"{start}{text}", file=sys.stderr, flush=True)


def say_why(text: str) -> None:
    """Print why a command ends; a bar that stands where the error was raised goes away first."""
    for bar in list(_bars):
        bar.close()
    say(f"agq: {text}")
