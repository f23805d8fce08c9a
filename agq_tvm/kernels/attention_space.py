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
    fitting = kernel.form.pairs
    heads = max(divisors(kernel.shared, min(fitting, _MOST_PAIRS)))
    rows = max(divisors(kernel.rows, max(1, min(fitting, _MOST_ROWS) // heads)))
    return {
        "rows": rows,
        "heads": heads,
        "chains": _chains(kernel, rows * heads),
        "lanes": _default_lanes(kernel, rows * heads),
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
    choices = {
        "rows": divisors(kernel.rows, _MOST_ROWS),
        "heads": divisors(kernel.shared, kernel.shared),
        "chains": (1,) if kernel.int8 else tuple(sorted({gcd(kernel.head_dim, n) for n in (1, 2, 4)})),
        "lanes": _lanes(kernel),
        "parallel": (0, 1) if threads > 1 else (1,),
    }

    def rule(d: dict[str, int]) -> bool:
        pairs = d["rows"] * d["heads"]
        return pairs <= _MOST_PAIRS and _in_registers(kernel, pairs, d["lanes"])

    return Space(choices, default(kernel), rule)


def _chains(kernel: AttentionKernel, pairs: int) -> int:
    """Keep sums apart where few pairs share a key and registers hold them: a multiply-add waits for the one before."""
    if kernel.int8:
        return 1
    chains = gcd(kernel.head_dim, 4 if pairs <= 2 else 2 if pairs <= 4 else 1)
    return max(n for n in divisors(chains, chains) if n == 1 or n * pairs <= kernel.form.pairs)


def _lanes(kernel: AttentionKernel) -> tuple[int, ...]:
    """List how many channels can be summed at a time: whole vectors that divide a head."""
    if not kernel.int8_values:
        vector, channels = gcd(LANES, kernel.head_dim), kernel.head_dim
    elif kernel.form.dot:
        vector, channels = kernel.form.dot.lanes, kernel.channels
    else:
        return (LANES,)
    return tuple(lanes for lanes in range(vector, channels + 1, vector) if channels % lanes == 0)


def _default_lanes(kernel: AttentionKernel, pairs: int) -> int:
    """Choose the most channels whose sums fit; of several rows' float sums, no more than keep multiply-adds busy.

    A single row's values come from memory, and are read in one go; those of several rows are next to the core, and a
    weight that one multiply-add takes needs no register.
    """
    fitting = [lanes for lanes in _lanes(kernel) if _in_registers(kernel, pairs, lanes)]
    if kernel.rows == 1 or kernel.int8_values:
        return max(fitting)
    return min((lanes for lanes in fitting if pairs * lanes >= kernel.form.busy), default=max(fitting))


def _in_registers(kernel: AttentionKernel, pairs: int, lanes: int) -> bool:
    digits = 2 if kernel.int8_values and kernel.form.dot else 1
    return digits * pairs * lanes <= kernel.form.sums or lanes == _lanes(kernel)[0]
