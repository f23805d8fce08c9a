"""All boards under a key, looked at before anything is sent to them."""

import gc
from dataclasses import dataclass

from agq_tvm.boards.status import unfit
from agq_tvm.boards.tracker import board_is_emulated, connect, parse_tracker, tracker_summary
from agq_tvm.errors import AgqError
from agq_tvm.targets import Device

_FIRST, _WAIT, _MOMENT = 30.0, 10.0, 2.0
_TIME_LIMIT = 60.0


@dataclass(frozen=True)
class Fleet:
    """The boards of a key.

    Attributes
    ----------
    boards : int
        How many are registered, with those that serve somebody else.
    emulated : bool
        Whether they are emulated, so that their time means nothing.
    """

    boards: int
    emulated: bool


def check_fleet(tracker: str, key: str, device: Device) -> Fleet:
    """Check all free boards of a key.

    Parameters
    ----------
    tracker : str
        ``"HOST:PORT"``.
    key : str
    device : Device
        What is going to be compiled for.

    Raises
    ------
    AgqError
        If there is no tracker, nobody has the key, all boards stay busy, a board cannot run code for the device, or
        some are emulated and others are not.
    """
    entry = tracker_summary(*parse_tracker(tracker)).get(key, {"boards": [], "free": 0, "busy": []})
    sessions: list = []  # held together, so that the tracker gives each board once
    kinds: dict[bool, str] = {}
    try:
        for number in range(max(1, len(entry["boards"]) - len(entry["busy"]))):
            # One that has just registered is offered in a moment; one that serves somebody may not say so.
            wait = _FIRST if number == 0 else _WAIT if number < entry["free"] else _MOMENT
            session = _connect(tracker, key, wait, number == 0)
            if session is None:
                break
            sessions.append(session)
            complaint = unfit(session, device)
            if complaint:
                where = f"board {session.board} under the key {key!r}"
                raise AgqError(f"{where} {complaint}: give it a key of its own, or choose its --target")
            kinds[board_is_emulated(session)] = session.board
    finally:
        session = None
        sessions.clear()
        gc.collect()
    if len(kinds) > 1:
        raise AgqError(
            f"of the boards under the key {key!r} {kinds[True]} is emulated and {kinds[False]} is not, and their times "
            "do not compare: give emulated boards a key of their own"
        )
    return Fleet(max(1, len(entry["boards"])), True in kinds)


def _connect(tracker: str, key: str, wait: float, needed: bool):
    """Open a session; None if all boards serve somebody else."""
    try:
        return connect(tracker, key, timeout=_TIME_LIMIT, wait=wait)
    except AgqError:
        if needed:
            raise
        return None
