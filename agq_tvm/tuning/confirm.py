"""Which candidates are measured again, in turns with the default: the fastest of many is partly luck."""

from collections.abc import Callable, Sequence

from agq_tvm.kernels.record import Record
from agq_tvm.tuning.task import Task

_BEST = 3
_ROUNDS = 3


def to_confirm(task: Task, known: Sequence[Record], all_records: Sequence[Record]) -> list[Record]:
    """Return the default and the best candidates; nothing if the default is best, or the best is confirmed.

    Parameters
    ----------
    task : Task
    known : sequence of Record
        What was measured, confirmations not among them.
    all_records : sequence of Record
        Of the task, with confirmations.
    """
    default = task.space.default
    good = sorted((record for record in known if record.usable), key=lambda record: record.time)
    own = next((record for record in good if record.decisions == default), None)
    if own is None or good[0] is own:
        return []
    done = {record.key[1] for record in all_records if record.confirmed and record.usable}
    if good[0].key[1] in done:
        return []
    return [own, *[record for record in good[:_BEST] if record is not own]]


def in_turns(count: int, measure: Callable[[int], list[float] | None]) -> list[list[float]] | None:
    """Measure candidates in turns, every other turn backwards; return the seconds of each.

    Parameters
    ----------
    count : int
        Candidates.
    measure : callable
        ``f(number) -> seconds``; None if it failed, which ends all: then None is returned.
    """
    found: list[list[float]] = [[] for _ in range(count)]
    for turn in range(_ROUNDS):
        for number in range(count) if turn % 2 == 0 else reversed(range(count)):
            seconds = measure(number)
            if seconds is None:
                return None
            found[number] += seconds
    return found
