"""Bringing files to a board, once: its server keeps what it got, named by checksum."""

from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from agq_tvm.progress import progress

_PIECE = 4 << 20


def send_files(session, files: list[tuple[Path, str]]) -> int:
    """Put files into the folder of a session.

    Parameters
    ----------
    session : tvm.rpc.RPCSession
    files : list of (path, sha256)

    Returns
    -------
    int
        Bytes that were sent: 0 if the board had kept all of them. TVM's own Python server keeps nothing.
    """
    take = _function(session, "agq.board.take")
    missing = [
        (path, sha256) for path, sha256 in files if take is None or not take(sha256, path.stat().st_size, path.name)
    ]
    total = sum(path.stat().st_size for path, _ in missing)
    with progress((), "uploading", total=total, unit="B") as bar:
        bar.unit_scale = True
        for path, sha256 in missing:
            if take is None:
                session.upload(str(path))
                bar.update(path.stat().st_size)
            else:
                _send(session, path, sha256, bar)
    return total


def _function(session, name: str) -> Callable | None:
    try:
        return session.get_function(name)
    except (AttributeError, RuntimeError, ValueError):
        return None


def _send(session, path: Path, sha256: str, bar: tqdm) -> None:
    """Send a file in pieces; the board gives it its name only if it is whole."""
    append = session.get_function("agq.board.append")
    session.get_function("agq.board.receive")(sha256, path.stat().st_size)
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            append(bytearray(piece))
            bar.update(len(piece))
    session.get_function("agq.board.keep")(path.name)
