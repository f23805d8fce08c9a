"""The tracker's client against servers that are none."""

import contextlib
import socket
import struct
import threading

import pytest

from agq_tvm.boards.tracker import connect, parse_tracker, tracker_summary
from agq_tvm.errors import AgqError

MAGIC = struct.pack("<i", 0x2F271)


def sized(text: bytes) -> bytes:
    return struct.pack("<i", len(text)) + text


@pytest.fixture
def server():
    """Start a server that sends some bytes to each client and, if told so, hangs up."""
    sockets = []

    def start(answer: bytes, hang_up: bool = True) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)

        def serve():
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                sockets.append(client)
                with contextlib.suppress(OSError):  # the client may be gone already
                    client.sendall(answer)
                    if hang_up:
                        client.shutdown(socket.SHUT_WR)

        threading.Thread(target=serve, daemon=True).start()
        return listener.getsockname()[1]

    yield start
    for one in sockets:
        one.close()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "no tracker answers"),
        (b"HTTP/1.1 400", "is not a TVM tracker"),
        (MAGIC, "no tracker answers"),
        (MAGIC + struct.pack("<i", 1 << 30), "no tracker answers .*an answer of 1073741824 bytes"),
        (MAGIC + struct.pack("<i", -5), "no tracker answers"),
        (MAGIC + sized(b"\xff"), "no tracker answers .*not JSON"),
        (MAGIC + sized(b"[0, 5]"), "does not answer like TVM's tracker"),
        (MAGIC + sized(b'[0, {"server_info": [{"key": 1}], "queue_info": {}}]'), "does not answer like"),
        (MAGIC + sized(b"[-1, {}]"), "does not answer like"),
        (MAGIC + sized(b'[0, {"server_info": [], "queue_info": {}}]')[:-3], "no tracker answers"),
    ],
)
def test_other_servers_are_told(server, answer, told):
    with pytest.raises(AgqError, match=told):
        tracker_summary("127.0.0.1", server(answer))


def test_silent_server_is_not_waited_for(server):
    with pytest.raises(AgqError, match=r"within 0\.2 s"):
        tracker_summary("127.0.0.1", server(b"", hang_up=False), timeout=0.2)


def test_summary_of_a_tracker(server):
    info = (
        b'[0, {"queue_info": {"pi": {"free": 1, "pending": 0}, "gone": {"free": 0, "pending": 2}},'
        b' "server_info": [{"key": "server:pi", "addr": ["10.0.0.1", 9090]},'
        b' {"key": "server:pi", "addr": ["10.0.0.2", 9091]}]}]'
    )
    boards = [["10.0.0.1", 9090], ["10.0.0.2", 9091]]
    port = server(MAGIC + sized(info))
    assert tracker_summary("127.0.0.1", port) == {"pi": {"boards": boards, "free": 1, "pending": 0, "busy": []}}
    with pytest.raises(AgqError, match=r"no board 'gone' .*; registered: pi"):
        connect(f"127.0.0.1:{port}", "gone")


@pytest.mark.parametrize("text", ["", "host", "host:", ":9190", "host:0", "host:65536", "host:-1", "host:x", "host:²"])
def test_wrong_addresses(text):
    with pytest.raises(AgqError, match="HOST:PORT"):
        parse_tracker(text)


def test_right_address():
    assert parse_tracker("pi.local:9190") == ("pi.local", 9190)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_session_always_has_a_time_limit(timeout):
    with pytest.raises(AgqError, match="must be above 0 seconds"):
        connect("127.0.0.1:1", "pi", timeout=timeout)
