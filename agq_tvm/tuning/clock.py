"""Timing a call."""

import time
from collections.abc import Callable


def seconds(run: Callable[[], object]) -> float:
    """Time one call: the lower of wall-clock and CPU time.

    On one thread the two differ only by what other programs took of the core; on several, CPU time is the higher.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    cpu = time.process_time() - cpu
    return min(time.perf_counter() - wall, cpu)
