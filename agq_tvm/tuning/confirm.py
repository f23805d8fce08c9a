"""Which candidates are measured again, in turns with the default: the fastest of many is partly luck."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agq_tvm.kernels.record import Record
from agq_tvm.tuning.task import Task

_BEST = 3
_SHARE, _MOST = 16, 12
"""Of all candidates one in so many may be the best, up to so many; these are measured once more to find the `_BEST`."""
_ROUNDS = 3


@dataclass(frozen=True)
class Turn:
    """One measurement of a candidate: its seconds, and what was told of it besides, ``"board"`` among that."""

    seconds: list[float]
    about: dict

    @property
    def board(self) -> str:
        """Where it was measured, "" for this machine."""
        return self.about.get("board", "")


def to_confirm(
    task: Task, known: Sequence[Record], all_records: Sequence[Record], with_default: bool = True
) -> list[Record | None]:
    """Return the default and the best candidates; nothing if the default is best, or the best is confirmed.

    Parameters
    ----------
    task : Task
    known : sequence of Record
        What was measured, confirmations not among them.
    all_records : sequence of Record
        Of the task, with confirmations.
    with_default : bool
        Whether the default is one of the candidates. Otherwise it is None here, a yardstick only.
    """
    default = task.space.default
    good = sorted((record for record in known if record.usable), key=lambda record: record.time)
    own = next((record for record in good if record.decisions == default), None)
    if not good or good[0] is own or (with_default and own is None):
        return []
    done = {record.key[1] for record in all_records if record.confirmed and record.usable}
    if good[0].key[1] in done:
        return []
    count = min(_MOST, max(_BEST, len(good) // _SHARE))
    return [own, *[record for record in good[:count] if record is not own]]


def in_turns(count: int, measure: Callable[[int], Turn | None]) -> dict[int, list[Turn]] | None:
    """Measure the default and the best candidates in turns, every other turn backwards.

    Where there are many candidates, all of them are measured once before, to find the best. The first is always among
    these: as long as it is not confirmed, `to_confirm` asks for it.

    Parameters
    ----------
    count : int
        Of them all; the default has number 0, then come the candidates as `to_confirm` has them.
    measure : callable
        ``f(number) -> Turn``; None if it failed, which ends all.

    Returns
    -------
    dict of int to list of Turn, or None
        By number; None if a measurement failed.
    """
    best = list(range(1, count))
    if len(best) > _BEST:
        again = _rounds(best, 1, measure)
        if again is None:
            return None
        others = sorted(best[1:], key=lambda number: statistics.median(again[number][0].seconds))
        best = [best[0], *others[: _BEST - 1]]
    return _rounds([0, *best], _ROUNDS, measure)


def _rounds(numbers: list[int], rounds: int, measure: Callable[[int], Turn | None]) -> dict[int, list[Turn]] | None:
    found: dict[int, list[Turn]] = {number: [] for number in numbers}
    for turn in range(rounds):
        for number in numbers if turn % 2 == 0 else reversed(numbers):
            measured = measure(number)
            if measured is None:
                return None
            found[number].append(measured)
    return found


def verdict(default: Sequence[Turn], candidate: Sequence[Turn]) -> tuple[list[float], dict] | None:
    """Hold a candidate against the default, by the turns of one board: others may be faster or slower.

    Returns
    -------
    seconds : list of float
        Of the candidate.
    provenance : dict
        What the board told last, ``hot`` if it ever was, ``default_seconds``, and ``doubtful`` if not every turn of
        the candidate was faster than that of the default, which is then the better choice.
    None
        Instead of both, if no board has measured both.
    """

    def on(board: str) -> list[list[Turn]]:
        return [[turn for turn in turns if turn.board == board] for turns in (default, candidate)]

    boards = sorted({turn.board for turn in candidate})
    defaults, own = max(map(on, boards), key=lambda turns: min(map(len, turns)))
    if not defaults:
        return None
    pairs = zip(defaults, own, strict=False)
    faster = [b is a or statistics.median(b.seconds) < statistics.median(a.seconds) for a, b in pairs]
    about = own[-1].about | {"hot": any(turn.about.get("hot") for turn in own)}
    about["default_seconds"] = statistics.median(_joined(defaults))
    return _joined(own), about | ({} if all(faster) else {"doubtful": True})


def _joined(turns: Sequence[Turn]) -> list[float]:
    return [second for turn in turns for second in turn.seconds]
