"""Which candidates are measured again, in turns with the default: the fastest of many is partly luck."""

from collections.abc import Sequence

from agq_tvm.kernels.record import Record
from agq_tvm.tuning.task import Task

_BEST = 3
ROUNDS = 3


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
