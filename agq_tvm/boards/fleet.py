"""All boards under a key, looked at before anything is sent to them."""

import gc

from agq_tvm.boards.status import unfit
from agq_tvm.boards.tracker import connect, parse_tracker, tracker_summary
from agq_tvm.errors import AgqError
from agq_tvm.targets import Device

_WAIT, _MOMENT = 10.0, 2.0
_TIME_LIMIT = 60.0


def check_fleet(tracker: str, key: str, device: Device) -> int:
    """Check the free boards of a key and return how many there are, with those that serve somebody else.

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
        If there is no tracker, nobody has the key, or a board cannot run code for the device.
    """
    entry = tracker_summary(*parse_tracker(tracker)).get(key, {"boards": [], "free": 0, "busy": []})
    sessions: list = []  # held together, so that the tracker gives each board once
    try:
        for number in range(max(1, len(entry["boards"]) - len(entry["busy"]))):
            # One that has just registered is offered in a moment; one that serves somebody may not say so.
            session = _connect(tracker, key, _WAIT if number < entry["free"] else _MOMENT, not entry["boards"])
            if session is None:
                break
            sessions.append(session)
            complaint = unfit(session, device)
            if complaint:
                where = f"board {session.board} under the key {key!r}"
                raise AgqError(f"{where} {complaint}: give it a key of its own, or choose its --target")
    finally:
        session = None
        sessions.clear()
        gc.collect()
    return max(1, len(entry["boards"]))


def _connect(tracker: str, key: str, wait: float, needed: bool):
    """Open a session; None if all boards serve somebody else."""
    try:
        return connect(tracker, key, timeout=_TIME_LIMIT, wait=wait)
    except AgqError:
        if needed:
            raise
        return None
