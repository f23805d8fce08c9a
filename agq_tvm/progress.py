"""Progress on standard error, so that standard output stays for results."""

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress(items: Iterable, what: str, total: int | None = None, unit: str = "it") -> Iterable:
    """Iterate over `items`, showing a bar named `what` on standard error when the work takes over a second."""
    return tqdm(items, desc=what, total=total, unit=unit, file=sys.stderr, delay=1.0, leave=False, dynamic_ncols=True)


def say(text: str) -> None:
    """Print one line about what happens now on standard error."""
    print(text, file=sys.stderr, flush=True)
