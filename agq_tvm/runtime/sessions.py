"""Where a bundle runs: on this machine, or on a board behind TVM's tracker."""

from collections.abc import Iterator
from contextlib import contextmanager

from agq_tvm.errors import AgqError
from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.engine import LocalSession, Session


def check_place(tracker: str | None, key: str | None) -> None:
    """Refuse a board's key without a tracker.

    Raises
    ------
    AgqError
    """
    if key is not None and tracker is None:
        raise AgqError("--key names a board of a tracker: give --tracker HOST:PORT, too")


@contextmanager
def open_session(
    bundle: Bundle, threads: int | None = None, tracker: str | None = None, key: str | None = None
) -> Iterator[Session]:
    """Load a bundle where it shall run; a board is free again after the block.

    Parameters
    ----------
    bundle : Bundle
    threads : int, optional
        Those of the device by default.
    tracker, key : str, optional
        A board behind TVM's tracker, ``"HOST:PORT"``, and what it is registered as (by default the name of the
        bundle's device). Without a tracker the bundle runs on this machine.

    Raises
    ------
    AgqError
        If the bundle does not run there, or the board is lost inside the block.
    """
    check_place(tracker, key)
    if tracker is None:
        yield LocalSession(bundle, threads)
        return
    from agq_tvm.runtime.board_session import open_board

    with open_board(bundle, tracker, key, threads) as board:
        yield board
