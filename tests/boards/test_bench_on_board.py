"""Bundles through the tracker: bench, eval and generate, what the board keeps, and boards that are lost."""

import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agq_tvm.boards import emulate, processes
from agq_tvm.boards.tracker import connect, tracker_summary
from agq_tvm.cli.main import main
from agq_tvm.errors import AgqError
from agq_tvm.flow.bench_report import as_text
from agq_tvm.flow.compile import compile_checkpoint
from agq_tvm.flow.evaluate_bundle import evaluate
from agq_tvm.runtime import board_session
from agq_tvm.runtime.bench import bench
from agq_tvm.runtime.board_files import send_files
from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.generate import generate
from agq_tvm.targets import load_device
from tests.cli.test_cli import refused, result_of
from tests.conftest import once

pytestmark = pytest.mark.emulator

KEY, MINE = "raspberry-pi-4", "mine"
PROMPT = "It was a dark"


@pytest.fixture(scope="session")
def pi4_bundle(tmp_path_factory, tiny_checkpoint) -> Path:
    return once(tmp_path_factory, f"tiny-{KEY}", lambda path: compile_checkpoint(tiny_checkpoint, KEY, path))


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents. " * 3)
    return path


@pytest.fixture
def own_board(boards, own_state):
    """A board that a test may hurt: its process."""
    return emulate.start_board(load_device(KEY), boards.tracker, MINE)


@pytest.fixture
def agq(capsys):
    """Run `agq` in this process: where its sessions do not end with it."""

    def run(*arguments) -> subprocess.CompletedProcess:
        capsys.readouterr()
        code = main(list(map(str, arguments)))
        return subprocess.CompletedProcess([], code, *capsys.readouterr())

    return run


def kept(board) -> dict[str, bytes]:
    folder = emulate._cache(board.name)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def limit_files(board, size: int) -> None:
    """Let files of the board, and of its sessions from now on, grow up to a size: it stands for a full disk."""
    resource.prlimit(board.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_commands_on_an_emulated_board(agq, own_board, pi4_bundle, tiny_bundle, text, tmp_path):
    """The same words and, but for the rounding of floats, the same perplexity as here; no speeds; one upload."""
    place = ("--tracker", own_board.tracker, "--key", MINE)
    small = ("--prefill", "20", "--decode", "3")
    first = agq("bench", pi4_bundle, *small, *place, "-o", tmp_path / "r.json", "--picture")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("emulated: time means nothing") == 2 and "upload" in first.stdout
    assert "±" not in first.stdout and "µS" not in first.stdout
    assert not (tmp_path / "r.png").exists() and "no " in first.stderr
    read = json.loads((tmp_path / "r.json").read_text())
    assert read["emulated"] and read["uploaded_bytes"] == sum(len(data) for data in kept(own_board).values())
    assert all(test["mean"] is test["std"] is test["samples"] is None for test in read["tests"].values())
    decode = {each["name"]: each for each in read["tests"]["tg3"]["operations"]}
    layers = 2
    assert decode["linear_w4a8g64_group_asym_m1_n320_k96"] == {
        "name": "linear_w4a8g64_group_asym_m1_n320_k96",
        "calls": 3 * layers,
        "seconds": None,
    }
    again = agq("bench", pi4_bundle, *small, *place, "--markdown")
    assert "nothing: the board has the bundle" in again.stdout and "| pp20 | emulated" in again.stdout
    refused(agq("bench", "--compare", tmp_path / "r.json", tmp_path / "r.json"), "emulated")

    written = agq("generate", pi4_bundle, "--prompt", PROMPT, "--max-tokens", "5", *place)
    here = agq("generate", tiny_bundle, "--prompt", PROMPT, "--max-tokens", "5")
    assert written.stdout == here.stdout and written.returncode == here.returncode == 0
    there, here = (
        result_of(agq("eval", bundle, "--data", text, "--window", "64", "--json", *where))
        for bundle, where in ((pi4_bundle, place), (tiny_bundle, ()))
    )
    assert there["nll"] == pytest.approx(here["nll"], rel=1e-3) and there["tokens"] == here["tokens"]


def test_mistakes(agq, boards, pi4_bundle, tiny_bundle, tiny_checkpoint, text, tmp_path):
    ask = ("--prompt", "x", "--tracker", boards.tracker)
    refused(agq("generate", pi4_bundle, "--prompt", "x", "--tracker", "127.0.0.1:1"), "no tracker answers")
    refused(agq("bench", pi4_bundle, "--key", KEY), "--key names a board of a tracker")
    refused(agq("generate", pi4_bundle, *ask, "--key", "toaster"), "no board 'toaster'", "registered: " + KEY)
    refused(agq("generate", tiny_bundle, *ask), "no board 'x86", "registered: " + KEY)
    wrong = agq("generate", tiny_bundle, *ask, "--key", KEY)
    refused(wrong, "the board is aarch64: compile it for the board's device")
    refused(agq("eval", tiny_checkpoint, "--data", text, *ask[2:]), "is no bundle")
    assert tracker_summary("127.0.0.1", int(boards.tracker.rpartition(":")[2]))[KEY]["pending"] == 0


class Answers:
    """Runs a function while a board is hurt as soon as the function says a word on standard error."""

    def __init__(self, *command):
        words = [sys.executable, "-m", "agq_tvm", *map(str, command)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def first_output(self) -> str:
        timer = threading.Timer(120, self.process.kill)
        timer.start()
        output = self.process.stdout.read(1)
        timer.cancel()
        return output

    def end(self) -> subprocess.CompletedProcess:
        stdout, stderr = self.process.communicate(timeout=120)
        return subprocess.CompletedProcess([], self.process.returncode, stdout, stderr)


def test_board_lost_in_the_middle(own_board, pi4_bundle, tmp_path):
    arguments = ("generate", pi4_bundle, "--prompt", PROMPT, "--max-tokens", "230")
    running = Answers(*arguments, "--tracker", own_board.tracker, "--key", MINE)
    assert running.first_output() == PROMPT[0]
    os.killpg(own_board.pid, signal.SIGKILL)
    refused(running.end(), "the connection was lost", MINE)


def test_board_that_hangs(own_board, pi4_bundle, monkeypatch):
    """A board that neither answers nor hangs up costs the time-out and no more."""
    monkeypatch.setattr(board_session, "REPLY_SECONDS", 20.0)
    stopped = []

    def stop(_piece: str) -> None:
        if not stopped:
            os.killpg(own_board.pid, signal.SIGSTOP)
            stopped.append(time.monotonic())
            session.line.limit(1.0)

    real, session = board_session.connect, None

    def connecting(*arguments, **options):
        nonlocal session
        session = real(*arguments, **options)
        return session

    monkeypatch.setattr(board_session, "connect", connecting)
    try:
        with pytest.raises(AgqError, match="no answer within"):
            generate(pi4_bundle, PROMPT, 9, show=stop, tracker=own_board.tracker, key=MINE)
        assert time.monotonic() - stopped[0] < 15
    finally:
        session = None
        os.killpg(own_board.pid, signal.SIGCONT)


def test_full_disk_of_the_board(agq, own_board, pi4_bundle, tmp_path):
    limit_files(own_board, 100_000)
    arguments = ("bench", pi4_bundle, "--prefill", "8", "--decode", "1", "--tracker", own_board.tracker)
    arguments += ("--key", MINE)
    refused(agq(*arguments, "-o", tmp_path / "r.json"), "the disk of the board is full")
    assert kept(own_board) == {} and not (tmp_path / "r.json").exists()
    limit_files(own_board, resource.RLIM_INFINITY)
    assert agq(*arguments).returncode == 0
    assert len(kept(own_board)) == 2


class Files:
    """Sends files to a board in sessions of their own."""

    def __init__(self, board, folder: Path):
        self.board, self.folder = board, folder

    def path(self, data: bytes) -> tuple[Path, str]:
        path = self.folder / f"{len(data)}.bin"
        path.write_bytes(data)
        return path, hashlib.sha256(data).hexdigest()

    @contextlib.contextmanager
    def session(self):
        session = connect(self.board.tracker, MINE, timeout=60)
        try:
            yield session
        finally:
            session.line.cut()

    def send(self, *contents: bytes) -> int:
        with self.session() as session:
            files = [self.path(data) for data in contents]
            sent = send_files(session, files)
            for path, _ in files:
                assert bytes(session.download(path.name)) == path.read_bytes()
            return sent


def test_what_a_board_keeps(own_board, tmp_path):
    files = Files(own_board, tmp_path)
    sizes = (0, 1, 55, 56, 63, 64, 65, 119, 120, 100_000, 5 << 20)
    contents = [os.urandom(size) for size in sizes]
    assert files.send(*contents) == sum(sizes) and files.send(*contents) == 0
    assert sorted(kept(own_board)) == sorted(hashlib.sha256(data).hexdigest() for data in contents)
    folder = emulate._cache(own_board.name)
    damaged = folder / hashlib.sha256(contents[9]).hexdigest()
    for rotten in (contents[9][:-1], contents[9][:-1] + bytes([contents[9][-1] ^ 1]), b""):
        damaged.write_bytes(rotten)
        assert files.send(contents[9]) == sizes[9] and damaged.read_bytes() == contents[9]


def test_half_a_file_is_never_taken_for_a_whole_one(own_board, tmp_path):
    files, data = Files(own_board, tmp_path), os.urandom(70_000)
    path, sha256 = files.path(data)
    with files.session() as session:
        session.get_function("agq.board.receive")(sha256, len(data))
        session.get_function("agq.board.append")(bytearray(data[:5000]))
        with pytest.raises(RuntimeError, match="another file than was announced"):
            session.get_function("agq.board.keep")(path.name)
        session.get_function("agq.board.receive")(sha256, len(data))
        session.get_function("agq.board.append")(bytearray(data[:5000]))
        assert not session.get_function("agq.board.take")(sha256, len(data), path.name)
    assert [name[:5] for name in kept(own_board)] in ([], ["part-"])  # what a lost session leaves ...
    assert files.send(data) == len(data)
    assert list(kept(own_board)) == [sha256]  # ... is removed by the next one


def test_names_and_sizes_that_a_board_refuses(boards):
    with boards.session(KEY) as session:
        sha256 = "0" * 64
        for function, *arguments in (
            ("take", "../" + "0" * 61, 1, "a"),
            ("take", sha256, 1, "../a"),
            ("take", sha256, -1, "a"),
            ("receive", sha256[1:], 1),
            ("receive", "g" * 64, 1),
            ("append", bytearray(b"x")),
            ("keep", "a"),
        ):
            with pytest.raises(RuntimeError, match="the board "):
                session.get_function(f"agq.board.{function}")(*arguments)
        with pytest.raises(RuntimeError, match=r"disk of the board is full: [0-9]+ MB are free, 1000000001 MB"):
            session.get_function("agq.board.receive")(sha256, 10**15)
        assert session.listdir("") == ""


def test_cache_is_bounded(boards, own_state, tmp_path, monkeypatch):
    """What was used longest ago makes room; a file that is larger than the cache is the session's alone."""
    launch = processes.launch
    monkeypatch.setattr(
        processes,
        "launch",
        lambda command, log: launch([*command, *(["--cache-megabytes", "1"] if "--key" in command else [])], log),
    )
    board = emulate.start_board(load_device(KEY), boards.tracker, MINE)
    files = Files(board, tmp_path)
    first, second, third, large = (os.urandom(size) for size in (400_000, 400_001, 400_002, 2_000_000))
    assert files.send(first) and files.send(second) and files.send(first) == 0
    assert files.send(third) and len(kept(board)) == 2
    assert files.send(first) == 0 and files.send(second)
    assert files.send(large) and files.send(large)
    assert sum(map(len, kept(board).values())) <= 1_000_000


def test_figures_of_a_board(boards, own_state, pi4_bundle, monkeypatch):
    """As of a real one: this emulated board does not say what it is."""
    launch = processes.launch
    monkeypatch.setattr(
        processes, "launch", lambda command, log: launch([word for word in command if word != "--emulated"], log)
    )
    emulate.start_board(load_device(KEY), boards.tracker, MINE)
    result = bench(pi4_bundle, 1, 20, 2, 2, tracker=boards.tracker, key=MINE)
    assert (result["board"], result["threads"], result["emulated"]) == (MINE, 1, False)
    assert set(result["status"]) == {"before", "after"} and result["memory"]["peak"] > result["memory"]["weights"]
    for test in result["tests"].values():
        whole = test["tokens"] / test["mean"]
        assert len(test["samples"]) == 2 and 0 < sum(each["seconds"] for each in test["operations"]) < 3 * whole
    assert f"board {MINE}" in as_text(result) and f"{result['tests']['tg2']['mean']:.1f}"[:2] in as_text(result)


@pytest.fixture
def python_server(boards, tmp_path):
    """TVM's own server, in Python, on this machine: its tracker."""
    command = [sys.executable, "-m", "tvm.exec.rpc_server", "--host", "127.0.0.1", "--key", "python"]
    child, _ = processes.launch(
        [*command, "--tracker", boards.tracker, "--port", "19190", "--port-end", "19290"], tmp_path / "log"
    )
    try:
        deadline = time.monotonic() + 90
        while "python" not in tracker_summary("127.0.0.1", int(boards.tracker.rpartition(":")[2])):
            assert child.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield boards.tracker
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait(10)


def test_tvms_own_server(python_server, tiny_bundle, text):
    """Results of the same bundle are the same to the last bit; what the server cannot tell is said."""
    there, here = (
        evaluate(tiny_bundle, text, 64, tracker=tracker, key=tracker and "python", threads=1)
        for tracker in (python_server, None)
    )
    assert there == here
    place = {"tracker": python_server, "key": "python"}
    assert generate(tiny_bundle, PROMPT, 6, **place)["text"] == generate(tiny_bundle, PROMPT, 6)["text"]
    result = bench(tiny_bundle, 1, 16, 2, 2, **place)
    assert result["uploaded_bytes"] > 0 and result["status"] == {"before": None, "after": None}
    for test in result["tests"].values():
        assert test["operations"] is None and len(test["samples"]) == 2 and min(test["samples"]) > 0
    assert Bundle(tiny_bundle).nbytes == result["memory"]["bundle"]
