"""Sessions with emulated boards: real Arm code, the real tracker, TVM's own client."""

import contextlib
import gc
import os
import select
import socket
import struct
import time

import numpy as np
import pytest
import tvm

from agq_tvm.boards import emulate, processes, tracker
from agq_tvm.errors import AgqError
from agq_tvm.runtime.threads import configure_board
from agq_tvm.targets import detect, load_device
from tests.boards import kernels
from tests.boards.conftest import BOARDS

pytestmark = pytest.mark.emulator


def run_add(session, path) -> None:
    """Upload, run and check the kernel that runs everywhere."""
    session.upload(path)
    add = session.load_module(os.path.basename(path))["add"]
    a, b = np.arange(64, dtype="float32"), np.full(64, 0.5, "float32")
    on_board = [tvm.runtime.tensor(array, session.cpu(0)) for array in (a, b, np.zeros(64, "float32"))]
    add(*on_board)
    np.testing.assert_array_equal(on_board[2].numpy(), 2 * a + b)


def run_dot(session, path) -> None:
    session.upload(path)
    dot = session.load_module(os.path.basename(path))["dot"]
    a, b = np.arange(-8, 8, dtype="int8"), np.arange(1, 17, dtype="int8")
    on_board = [tvm.runtime.tensor(array, session.cpu(0)) for array in (a, b, np.zeros(4, "int32"))]
    dot(*on_board)
    expected = (a.astype("int32") * b).reshape(4, 4).sum(1)
    np.testing.assert_array_equal(on_board[2].numpy(), expected)


def message(call) -> str:
    """Return the text of the error that a call over a session raises."""
    with pytest.raises(Exception) as error:
        call()
    text = str(error.value)
    del error
    gc.collect()
    return text


@pytest.mark.parametrize("name", BOARDS)
def test_kernel_runs(boards, tmp_path, name):
    path = kernels.library(kernels.Add, name, tmp_path)
    for _ in range(2):
        with boards.session(name) as session:
            run_add(session, path)


@pytest.mark.parametrize("name", BOARDS)
def test_board_has_what_code_for_it_may_use(boards, name):
    with boards.session(name) as session:
        features = tracker.board_features(session)
    assert detect.missing_features(load_device(name), features, "aarch64") == []
    assert ("asimddp" in features) == (name != "raspberry-pi-4")


def test_sessions_do_not_share_files(boards):
    with boards.session("raspberry-pi-4") as session:
        session.upload(bytearray(b"hello"), "note.txt")
        assert session.listdir("") == "note.txt"
        assert bytes(session.download("note.txt")) == b"hello"
        folder = session.get_function("tvm.rpc.server.workpath")("")
    with boards.session("raspberry-pi-4") as session:
        assert session.listdir("") == ""
    assert not os.path.exists(folder)


@pytest.mark.parametrize("name", ["/etc/note", "../note", "a/b", ".", ".."])
def test_files_stay_in_the_folder_of_the_session(boards, name):
    with boards.session("raspberry-pi-4") as session:
        assert "plain file names only" in message(lambda: session.upload(bytearray(b"x"), name))
        assert session.listdir("") == ""


def test_missing_module_is_an_error_and_not_the_end(boards):
    with boards.session("raspberry-pi-4") as session:
        assert "none.so" in message(lambda: session.load_module("none.so"))
        assert session.listdir("") == ""


def test_wrong_instruction_is_told_in_words_and_the_board_lives_on(boards, tmp_path):
    dot = kernels.library(kernels.Dot, "snapdragon-870", tmp_path, "dot.so")
    with boards.session("snapdragon-870") as session:
        run_dot(session, dot)
    with boards.session("raspberry-pi-4") as session:
        assert "signal 4 (Illegal instruction)" in message(lambda: run_dot(session, dot))
    add = kernels.library(kernels.Add, "raspberry-pi-4", tmp_path, "add.so")
    with boards.session("raspberry-pi-4") as session:
        run_add(session, add)
    assert not list(tmp_path.glob("*core*"))


def test_session_ends_at_its_time_limit(boards):
    with boards.session("raspberry-pi-4", timeout=0.5) as session:
        deadline = time.monotonic() + 30

        def work():
            while time.monotonic() < deadline:
                session.listdir("")

        assert "Your 0.5s session has expired" in message(work)
    with boards.session("raspberry-pi-4") as session:
        assert session.listdir("") == ""


@contextlib.contextmanager
def greeted(boards, timeout: float):
    """Ask for a board and begin a session by hand; give the socket."""
    answer = tracker._ask(*tracker.parse_tracker(boards.tracker), [4, "raspberry-pi-4", "", 1], 30)
    host, port, match_key = answer[1]
    key = f"client:{match_key} -timeout={timeout}".encode()
    with socket.create_connection((host, port), timeout=30) as client:
        client.sendall(struct.pack("<ii", 0xFF271, len(key)) + key)
        yield client


def test_end_is_told_even_while_the_client_is_sending(boards):
    with greeted(boards, 0.5) as client:
        client.sendall(struct.pack("<Q", 1 << 30))  # a packet that never ends
        end, later = time.monotonic() + 30, 100
        while later and time.monotonic() < end:
            client.sendall(bytes(64))
            later -= bool(select.select([client], [], [], 0.001)[0])
        received = b"".join(iter(lambda: client.recv(4096), b""))
    assert b"Your 0.5s session has expired" in received


def test_parameters_and_caches_stay_on_the_board(boards, tmp_path):
    """As models run: parameters from a file there, caches updated in place, each as one handle."""
    from tvm.contrib import tvmjs

    weight, bias = np.array([1, 2, 3, 4], "float16"), np.array([0.5, 0, -0.5, 1], "float32")
    zeros = np.zeros((8, 4), "float32")
    stored = {"param_0": weight, "param_1": bias, "cache_0": zeros, "cache_1": zeros}
    tvmjs.dump_tensor_cache(stored, str(tmp_path), encode_format="raw", show_progress=False)
    path = kernels.library(kernels.Step, "raspberry-pi-4", tmp_path, "model.so")
    with boards.session("raspberry-pi-4") as session:
        for name in (path, tmp_path / "tensor-cache.json", tmp_path / "params_shard_0.bin"):
            session.upload(str(name))
        call = session.get_function
        call("vm.builtin.tensor_cache.load")(call("tvm.rpc.server.workpath")(""), 1, 0)
        caches = call("vm.builtin.param_array_from_cache")("cache", 2)
        params = call("vm.builtin.param_array_from_cache")("param", 2)
        vm = tvm.relax.VirtualMachine(session.load_module("model.so"), session.cpu(0))
        x, position = (tvm.runtime.empty(*form, session.cpu(0)) for form in (((4,), "float32"), ((1,), "int32")))
        expected = np.zeros(4, "float32")
        for step in range(3):
            value = np.arange(4, dtype="float32") + step
            x.copyfrom(value)
            position.copyfrom(np.array([step], "int32"))
            expected += value * weight.astype("float32") + bias
            np.testing.assert_allclose(vm["main"](x, position, caches, params).numpy(), expected, rtol=1e-6)
        assert not call("vm.builtin.tensor_cache.get")("cache_0").numpy().any()
        del vm, x, position, caches, params, call


def board_port(boards, key: str) -> int:
    return tracker.tracker_summary(*tracker.parse_tracker(boards.tracker))[key]["boards"][0][1]


@pytest.mark.parametrize(
    "rubbish",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<ii", 0xFF271, 1 << 30),
        struct.pack("<ii", 0xFF271, -1),
        struct.pack("<ii", 0xFF271, 9) + b"client:no",
        b"",
    ],
)
def test_rubbish_does_not_hurt_a_board(boards, rubbish):
    with socket.create_connection(("127.0.0.1", board_port(boards, "raspberry-pi-4")), timeout=30) as client:
        # The server may hang up before we are done.
        with contextlib.suppress(OSError):
            client.sendall(rubbish)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100) in (b"", struct.pack("<i", 0xFF271 + 2))
    with boards.session("raspberry-pi-4") as session:
        assert session.listdir("") == ""


def test_client_that_goes_away_frees_the_board(boards):
    with greeted(boards, 60) as client:
        assert client.recv(4) == struct.pack("<i", 0xFF271)
    with boards.session("raspberry-pi-4") as session:
        assert session.listdir("") == ""


def test_key_that_is_never_used_is_offered_again(boards):
    tracker._ask(*tracker.parse_tracker(boards.tracker), [4, "snapdragon-870", "", 1], 30)
    with boards.session("snapdragon-870") as session:
        assert session.listdir("") == ""


def test_busy_board_is_told(boards):
    with boards.session("raspberry-pi-4") as session:
        assert session.listdir("") == ""
        with pytest.raises(AgqError, match=r"'raspberry-pi-4' .* is still in use after 0\.2 s"):
            tracker.connect(boards.tracker, "raspberry-pi-4", wait=0.2)


def test_unknown_key_is_told_with_the_known_ones(boards):
    with pytest.raises(
        AgqError, match=r"no board 'pi' at .*; registered: raspberry-pi-4, snapdragon-8-gen-1, snapdragon-870"
    ):
        tracker.connect(boards.tracker, "pi")


def test_board_comes_back_after_a_restart_of_the_tracker(own_state, monkeypatch):
    first = emulate.start_tracker()
    board = emulate.start_board(load_device("raspberry-pi-4"), first.tracker)
    processes.stop(first)
    monkeypatch.setattr(emulate, "_free_port", lambda: int(first.tracker.rpartition(":")[2]))
    second = emulate.start_tracker()
    assert (second.tracker, second.pid != first.pid) == (first.tracker, True)
    deadline = time.monotonic() + 30
    while not emulate.is_registered(board):
        assert time.monotonic() < deadline, processes.last_line(board.log)
        time.sleep(0.05)
    session = tracker.connect(second.tracker, "raspberry-pi-4")
    assert session.listdir("") == ""


def test_stop_ends_every_process(own_state):
    started = [emulate.start_tracker()]
    started.append(emulate.start_board(load_device("raspberry-pi-4"), started[0].tracker, key="mine"))
    assert [process.name for process in emulate.list_boards()] == ["tracker", "mine"]
    session = tracker.connect(started[0].tracker, "mine")
    folder = session.get_function("tvm.rpc.server.workpath")("")
    assert [process.name for process in emulate.stop_board("all")] == ["mine", "tracker"]
    assert not any(processes._group_runs(process.pid) for process in started)
    assert emulate.list_boards() == []
    assert not os.path.exists(folder)
    assert message(lambda: session.listdir(""))


def test_wrong_tracker_and_device_are_told(own_state):
    with pytest.raises(AgqError, match=r"no tracker answers at 127\.0\.0\.1:1 "):
        emulate.start_board(load_device("raspberry-pi-4"), "127.0.0.1:1")
    with pytest.raises(AgqError, match="x86-64-avx2 cannot be emulated"):
        emulate.start_board(load_device("x86-64-avx2"), "127.0.0.1:1")
    with pytest.raises(AgqError, match="a key is up to 64 letters"):
        emulate.start_board(load_device("raspberry-pi-4"), "127.0.0.1:1", key='a"b')
    assert emulate.list_boards() == []


def test_threads_take_the_boards_own_processors(boards):
    with boards.session("raspberry-pi-4") as session:
        told = str(session.get_function("agq.board.processors")()).splitlines()
        assert {int(line.split(" ")[0]) for line in told} == os.sched_getaffinity(0)  # those of this machine
        configure_board(session.get_function, 2)
        assert session.get_function("runtime.NumThreads")() == min(2, len(told))
        for processors, words in (("first", "number"), (0, "one text")):
            assert words in message(lambda to=processors: session.get_function("agq.board.use_threads")(-2, 1, to))
