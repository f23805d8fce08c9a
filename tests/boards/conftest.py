"""A real tracker and emulated boards, one set for each test process."""

import gc
import shutil
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from agq_tvm.boards import emulate, tracker
from agq_tvm.errors import AgqError
from agq_tvm.flow import compile as compile_flow
from agq_tvm.flow import library
from agq_tvm.models import relax_decoder
from agq_tvm.targets import load_device
from tests.compiled import FUNCTIONS, ROWS
from tests.missing import leave_out

DEVICES = ("raspberry-pi-4", "snapdragon-870")
BOARDS = (*DEVICES, "snapdragon-8-gen-1")
"""What is emulated; most whole models are run on `DEVICES`."""


@dataclass
class Session:
    """Stands for an RPC session, so that a test's variable does not keep that one open."""

    real: object

    def __getattr__(self, name):
        return getattr(self.real, name)


@dataclass
class Boards:
    """The boards of a test process; their keys are the names of their devices."""

    tracker: str

    @contextmanager
    def session(self, key: str, timeout: float = 120.0):
        """Open a session; what was made in it must be gone when the block ends."""
        session = Session(tracker.connect(self.tracker, key, timeout=timeout, wait=60))
        try:
            yield session
        finally:
            session.real = None
            gc.collect()


@pytest.fixture(scope="session")
def emulator():
    """Skip, or in CI fail, where boards cannot be emulated."""
    try:
        return emulate.find_emulator()
    except AgqError as error:
        leave_out("emulated boards", error)


@pytest.fixture(scope="session")
def boards(emulator, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        try:
            address = emulate.start_tracker().tracker
            for name in BOARDS:
                emulate.start_board(load_device(name), address)
            yield Boards(address)
        finally:
            emulate.stop_board("all")


@pytest.fixture
def own_state(emulator, tmp_path, monkeypatch):
    """A state folder for one test; what it started is stopped at its end."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield
    emulate.stop_board("all")


@pytest.fixture
def few_functions(monkeypatch):
    """Compile in this process, and only what the test calls."""

    def build(request: library.LibraryRequest):
        library._build(request)
        return library.read_tensors(request)

    monkeypatch.setattr(relax_decoder, "function_names", lambda: FUNCTIONS)
    monkeypatch.setattr(compile_flow, "PREFILL_BUCKETS", (ROWS,))
    monkeypatch.setattr(compile_flow, "build_library", build)


@pytest.fixture(scope="session")
def disassembler() -> str:
    """The name of a program that disassembles AArch64."""
    tool = shutil.which("aarch64-linux-gnu-objdump")
    if tool is None:
        leave_out("code for boards", "aarch64-linux-gnu-objdump is missing: install binutils-aarch64-linux-gnu")
    return tool
