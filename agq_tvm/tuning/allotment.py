"""How many trials each task gets, from how much of a model's time it takes."""

from collections.abc import Mapping, Sequence

from agq_tvm.tuning.task import Task

_MULTIPLIES, _BYTES = 100e9, 20e9
"""Multiply-accumulates and bytes of a second, roughly, of a core and of a memory that go together."""
_SELDOM = 0.1
"""What a kernel counts that a decode step and a prefill of 512 tokens do not run: other prompts do."""
_LEAST = 2
"""Trials of any task, so that the default is measured and something with it."""


def weight_of(task: Task) -> float:
    """Return roughly which part of a model's time a task takes, as seconds of a made-up machine."""
    return (task.count or _SELDOM) * max(task.macs / _MULTIPLIES, task.bytes / _BYTES)


def allot(tasks: Sequence[Task], sizes: Mapping[str, int], trials: int) -> dict[str, int]:
    """Share trials among tasks.

    Each gets at least 2, and no more than its space has points; the rest goes by the square root of the weights,
    since the last trials of a task gain least.

    Parameters
    ----------
    tasks : sequence of Task
    sizes : dict of str to int
        Points of each task's space, by name.
    trials : int
        For all tasks together.

    Returns
    -------
    dict of str to int
        Trials by name; their sum is `trials`, unless the spaces have fewer points or the tasks want more.
    """
    weights = {task.name: weight_of(task) ** 0.5 for task in tasks}
    shares = {name: min(_LEAST, sizes[name]) for name in weights}
    left = trials - sum(shares.values())
    while left > 0:
        open_tasks = [name for name in weights if shares[name] < sizes[name]]
        if not open_tasks:
            break
        total, given = sum(weights[name] for name in open_tasks), 0
        for name in sorted(open_tasks, key=lambda name: -weights[name]):
            more = min(sizes[name] - shares[name], max(1, int(left * weights[name] / total)), left - given)
            shares[name] += more
            given += more
        left -= given
    return shares
