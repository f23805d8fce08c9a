"""Whether processors slow down while candidates are measured: a fixed computation is timed beside each of them.

What it takes at least is remembered for each board. A candidate that is measured while it takes more than 5 % longer
rests and is measured again, and if that does not help its record says so: see `measure.measure`.
"""

import threading


class Drift:
    """The least that the fixed computation ever took, by board; this machine is ``""``."""

    def __init__(self) -> None:
        self._best: dict[str, float] = {}
        self._lock = threading.Lock()

    def note(self, board: str, seconds: float | None) -> None:
        """Remember what it took on a board."""
        if seconds is not None:
            with self._lock:
                self._best[board] = min(seconds, self._best.get(board, seconds))

    def best(self) -> dict[str, float]:
        """Return the least it took, by board."""
        with self._lock:
            return dict(self._best)
