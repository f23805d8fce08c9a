"""Talking to TVM's tracker, and sessions with the boards behind it.

TVM's own client waits for ever for a board that does not exist; here every wait ends.
"""

import getpass
import json
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agq_tvm.boards.line import Line, cut_since, sockets
from agq_tvm.errors import AgqError

if TYPE_CHECKING:
    from tvm.rpc import RPCSession

_MAX_ANSWER = 1 << 20
_GREETING_SECONDS = 30.0  # for a board that was given to us to greet
_LATE_SECONDS = 30.0  # for the board to say that the time of a session is over


def parse_tracker(text: str) -> tuple[str, int]:
    """Split ``"HOST:PORT"``.

    Raises
    ------
    AgqError
        If it is anything else.
    """
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise AgqError(f"a tracker is written HOST:PORT, for example 127.0.0.1:9190, not {text!r}")
    return host, int(port)


def tracker_summary(host: str, port: int, timeout: float = 5.0) -> dict[str, dict]:
    """Return what the boards of a tracker are doing.

    Parameters
    ----------
    host, port : str, int
        Address of the tracker.
    timeout : float
        Longest wait for its answer in seconds.

    Returns
    -------
    dict
        For each key: ``boards`` (list of ``[host, port]``), ``free`` (boards that wait for a client), ``pending``
        (clients that wait for a board) and ``busy`` (boards that say whom they serve: ``board``, ``user``, and
        ``since``, in seconds since 1970 by their clock).

    Raises
    ------
    AgqError
        If no tracker answers there.
    """
    from tvm.rpc.base import TrackerCode

    try:
        answer = _ask(host, port, [TrackerCode.SUMMARY], timeout)
    except TimeoutError:
        raise AgqError(f"no tracker answers at {host}:{port} within {timeout:g} s: correct --tracker") from None
    try:
        code, summary = answer
        if code != TrackerCode.SUCCESS:
            raise ValueError(code)
        keys: dict[str, dict] = {}
        for info in summary["server_info"]:
            key = info["key"].removeprefix("server:")
            queue = summary["queue_info"].get(key, {})
            entry = {"boards": [], "free": queue.get("free", 0), "pending": queue.get("pending", 0), "busy": []}
            keys.setdefault(key, entry)["boards"].append(list(info["addr"]))
            busy = info.get("busy")
            if isinstance(busy, dict):
                since = float(busy.get("since") or 0)
                keys[key]["busy"].append({"board": list(info["addr"]), "user": str(busy.get("user")), "since": since})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AgqError(f"{host}:{port} does not answer like TVM's tracker: is it another program?") from error
    return keys


def connect(
    tracker: str, key: str, timeout: float = 600.0, wait: float = 30.0, reply: float | None = None
) -> "RPCSession":
    """Open a session with a board; its attribute ``board`` is where that listens.

    Drop every module, tensor, device and function of a session before the next one: each keeps it open, and a
    board serves one session at a time.

    Parameters
    ----------
    tracker : str
        ``"HOST:PORT"`` of the tracker.
    key : str
        What the board is registered as; an emulated board's key is its device's name by default.
    timeout : float
        Seconds after which the board ends the session.
    wait : float
        Longest wait in seconds for a board that serves somebody else.
    reply : float, optional
        Longest wait in seconds for an answer of the board; `timeout` and a little more by default. The session's
        ``line`` can be cut earlier.

    Raises
    ------
    AgqError
        If there is no such tracker or board, or it stays busy.
    """
    if not timeout > 0:
        raise AgqError(f"the time limit of a session must be above 0 seconds, not {timeout}")
    return open_session(request_board(tracker, key, wait), timeout, reply)


@dataclass(frozen=True)
class Grant:
    """A board that the tracker has given us, and nobody else.

    Attributes
    ----------
    key : str
    address, port
        Where it listens.
    match_key : str
        By which it knows that we were sent.
    """

    key: str
    address: str
    port: int
    match_key: str

    @property
    def board(self) -> str:
        """``"ADDRESS:PORT"``."""
        return f"{self.address}:{self.port}"


def request_board(tracker: str, key: str, wait: float) -> Grant:
    """Ask a tracker for a board; see `connect`."""
    from tvm.rpc.base import TrackerCode

    host, port = parse_tracker(tracker)
    known = tracker_summary(host, port)
    if key not in known:
        names = ", ".join(sorted(known)) or "none: start one with `agq boards emulate start`"
        raise AgqError(f"no board {key!r} at the tracker {tracker}; registered: {names}")
    try:
        _, (address, board_port, match_key) = _ask(host, port, [TrackerCode.REQUEST, key, "", 1], wait)
    except TimeoutError:
        raise AgqError(f"board {key!r} at the tracker {tracker} is still in use after {wait:g} s") from None
    except (TypeError, ValueError) as error:
        raise AgqError(f"{tracker} does not answer like TVM's tracker: is it another program?") from error
    return Grant(key, address, board_port, match_key)


def open_session(grant: Grant, timeout: float, reply: float | None = None) -> "RPCSession":
    """Open the session with a board that was given; see `connect`."""
    from tvm import rpc

    before = sockets()
    guard = threading.Timer(_GREETING_SECONDS, cut_since, (before, grant.port))  # TVM has no limit for this either
    guard.daemon = True
    guard.start()
    try:
        key = f"{grant.match_key} -user={_user()}"
        session = rpc.connect(grant.address, grant.port, key, session_timeout=timeout)
    except Exception as error:  # TVM raises its own kinds, by release
        raise AgqError(f"board {grant.key!r} at {grant.board} does not answer: look at its log") from error
    finally:
        guard.cancel()
    session.board = grant.board
    session.line = Line(before, grant.port, reply or timeout + _LATE_SECONDS)
    return session


def board_features(session: "RPCSession") -> frozenset[str] | None:
    """Return the CPU features of a board in Linux's names, or None if its server cannot tell.

    Parameters
    ----------
    session : RPCSession
        An open session; the board server of this package can tell, TVM's Python server cannot.
    """
    try:
        return frozenset(str(session.get_function("agq.board.cpu_features")()).split())
    except (AttributeError, RuntimeError, ValueError):
        return None


def board_is_emulated(session: "RPCSession") -> bool:
    """Tell whether a board's server says that it is emulated, so that its time means nothing.

    Servers of emulated boards say so if `agq boards emulate start` started them; TVM's Python server cannot tell and
    is taken for a real board's.
    """
    try:
        return bool(session.get_function("agq.board.emulated")())
    except (AttributeError, RuntimeError, ValueError):
        return False


def _user() -> str:
    """Return who we are, for whoever wonders who uses a board: ``name@host:process``."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = "unknown"
    return re.sub(r"[^A-Za-z0-9.@:_-]", "_", f"{name}@{socket.gethostname()}:{os.getpid()}")[:60]


def _ask(host: str, port: int, request: list, timeout: float) -> object:
    """Send one request to a tracker and return its answer.

    Raises
    ------
    TimeoutError
        If it does not answer in time.
    AgqError
        If there is no tracker.
    """
    from tvm.rpc.base import RPC_TRACKER_MAGIC

    try:
        with socket.create_connection((host, port), timeout=min(timeout, 5.0)) as connection:
            connection.sendall(struct.pack("<i", RPC_TRACKER_MAGIC))
            if struct.unpack("<i", _receive(connection, 4))[0] != RPC_TRACKER_MAGIC:
                raise AgqError(f"{host}:{port} is not a TVM tracker")
            message = json.dumps(request).encode()
            connection.sendall(struct.pack("<i", len(message)) + message)
            connection.settimeout(timeout)
            return _read_answer(connection)
    except TimeoutError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise AgqError(f"no tracker answers at {host}:{port} ({reason}): start one, or correct --tracker") from error


def _read_answer(connection: socket.socket) -> object:
    size = struct.unpack("<i", _receive(connection, 4))[0]
    if not 0 < size <= _MAX_ANSWER:
        raise ConnectionError(f"an answer of {size} bytes")
    try:
        return json.loads(_receive(connection, size))
    except ValueError as error:
        raise ConnectionError("an answer that is not JSON") from error


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("the connection was closed")
        data += part
    return data
