"""The connection behind a session: a limit for every wait, and a way to cut it.

TVM waits for a board's answer for as long as it takes. A board that lost its power never answers, and never hangs up.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_DESCRIPTORS = Path("/proc/self/fd")
_PROBING = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6}  # lost after 45 s without a sign of life


def sockets() -> set[int]:
    """Return the inodes of this process's sockets; none where the system does not tell."""
    return {_inode(each) for each in _each_socket()}


def cut_since(before: set[int], port: int) -> None:
    """End every connection to a port that was opened since `before`: it has said nothing for too long."""
    for each in _each_socket():
        if _inode(each) not in before and _peer_port(each) == port:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def _each_socket() -> Iterator[socket.socket]:
    """Give every socket of this process, under a number of its own that is closed again."""
    for entry in list(_DESCRIPTORS.iterdir()) if _DESCRIPTORS.is_dir() else ():
        try:
            is_socket = os.readlink(entry).startswith("socket:")
            duplicate = socket.socket(fileno=os.dup(int(entry.name))) if is_socket else None
        except OSError:  # it was closed meanwhile
            continue
        if duplicate is not None:
            with duplicate:
                yield duplicate


class Line:
    """The connection that was opened since `before`.

    Parameters
    ----------
    before : set of int
        From `sockets`, before the session began.
    port : int
        Where the board listens.
    reply : float
        Longest wait in seconds for an answer.
    """

    def __init__(self, before: set[int], port: int, reply: float):
        opened = ((_inode(each), _peer_port(each)) for each in _each_socket())
        self._inode = next((inode for inode, peer in opened if inode not in before and peer == port), None)
        self.limit(reply)

    def limit(self, reply: float) -> None:
        """Set the longest wait in seconds for an answer, and notice within a minute that the other side is gone."""
        for each in self._sockets():
            limit = struct.pack("@ll", int(reply), int(reply % 1 * 1e6))
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                each.setsockopt(socket.SOL_SOCKET, option, limit)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _PROBING.items():
                each.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def cut(self) -> None:
        """End the connection at once: what still belongs to the session no longer waits for the board."""
        for each in self._sockets():
            with contextlib.suppress(OSError):  # it has ended already
                each.shutdown(socket.SHUT_RDWR)

    def _sockets(self) -> Iterator[socket.socket]:
        """Give the connection, as long as it is open: TVM holds it, and closes it."""
        return (each for each in _each_socket() if _inode(each) == self._inode)


def _inode(connection: socket.socket) -> int:
    return os.fstat(connection.fileno()).st_ino


def _peer_port(connection: socket.socket) -> int | None:
    try:
        return connection.getpeername()[1]
    except (OSError, IndexError):
        return None
