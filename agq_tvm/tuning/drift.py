"""Whether processors slow down while candidates are measured: a fixed computation is timed beside each of them.

What it takes at least is remembered for each board. A candidate that is measured while it takes more than 5 % longer
rests and is measured again, and if that does not help its record says so: see `measure.measure`. Those after it do not
wait for what will not come, until the board is as fast as it was.
"""

import threading


class Drift:
    """The least that the fixed computation ever took, by board, and which boards are slow; this machine is ``""``."""

    def __init__(self) -> None:
        self._best: dict[str, float] = {}
        self._slow: set[str] = set()
        self._lock = threading.Lock()

    def note(self, board: str, seconds: float | None, hot: bool) -> None:
        """Remember what it took on a board, and whether that was slow in the end."""
        if seconds is None:
            return
        with self._lock:
            self._best[board] = min(seconds, self._best.get(board, seconds))
            (self._slow.add if hot else self._slow.discard)(board)

    def best(self) -> dict[str, float]:
        """Return the least it took, by board."""
        with self._lock:
            return dict(self._best)

    def slow(self) -> list[str]:
        """Return the boards whose last candidate was measured while they were slow."""
        with self._lock:
            return sorted(self._slow)
