"""The design space of attention.

No decision depends on how long the caches are, so that one found with a context of fixed length builds the kernel whose
context is known when it runs.
"""

from math import gcd

from agq_tvm.kernels.attention_form import AttentionKernel
from agq_tvm.kernels.emit import LANES
from agq_tvm.kernels.space import Space, divisors

_MOST_PAIRS = 12
_MOST_ROWS = 8


def default(kernel: AttentionKernel) -> dict[str, int]:
    """Return the decisions made by hand."""
    rows, heads = kernel.query_rows, kernel.shared
    return {
        "rows": rows,
        "heads": heads,
        "chains": _chains(kernel, rows * heads),
        "lanes": max(lanes for lanes in _lanes(kernel) if _in_registers(kernel, rows * heads, lanes)),
        "parallel": 1,
    }


def space(kernel: AttentionKernel, threads: int = 1) -> Space:
    """Return the decisions of attention.

    rows, heads
        Of a task: rows of the batch, and query heads that share a KV head.
    chains
        Sums of a score that are kept apart, of every n-th channel.
    lanes
        Channels of values that are summed at a time.
    parallel
        Whether threads share the tasks.
    """
    made = default(kernel)
    choices = {
        "rows": tuple(sorted({made["rows"], *divisors(kernel.rows, _MOST_ROWS)})),
        "heads": divisors(kernel.shared, kernel.shared),
        "chains": (1,) if kernel.int8 else tuple(sorted({gcd(kernel.head_dim, n) for n in (1, 2, 4)})),
        "lanes": _lanes(kernel),
        "parallel": (0, 1) if threads > 1 else (1,),
    }

    def rule(d: dict[str, int]) -> bool:
        pairs = d["rows"] * d["heads"]
        return d == made or (pairs <= _MOST_PAIRS and _in_registers(kernel, pairs, d["lanes"]))

    return Space(choices, made, rule)


def _chains(kernel: AttentionKernel, pairs: int) -> int:
    """Keep sums apart where few pairs share a key: a multiply-add waits for the one before."""
    if kernel.int8:
        return 1
    return gcd(kernel.head_dim, 4) if pairs <= 2 else gcd(kernel.head_dim, 2) if pairs <= 4 else 1


def _lanes(kernel: AttentionKernel) -> tuple[int, ...]:
    """List how many channels can be summed at a time: whole vectors that divide a head."""
    if not kernel.int8_values:
        vector, channels = gcd(LANES, kernel.head_dim), kernel.head_dim
    elif kernel.form.dot:
        vector, channels = kernel.form.dot.lanes, kernel.channels
    else:
        return (LANES,)
    return tuple(lanes for lanes in range(vector, channels + 1, vector) if channels % lanes == 0)


def _in_registers(kernel: AttentionKernel, pairs: int, lanes: int) -> bool:
    digits = 2 if kernel.int8_values and kernel.form.dot else 1
    return digits * pairs * lanes <= kernel.form.sums or lanes == _lanes(kernel)[0]
