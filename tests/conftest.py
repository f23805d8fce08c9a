"""What tests of several parts share: a tiny checkpoint and its bundle for this machine, each made once."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from agq_tvm.flow.compile import compile_checkpoint
from agq_tvm.flow.quantize import quantize
from tests.tiny import write_tiny_llama

_PATIENCE = 300


def pytest_addoption(parser):
    """Let slow tests run on models that one has."""
    parser.addoption("--models", metavar="DIR", help="directory of trained Hugging Face models, for -m slow")


def pytest_generate_tests(metafunc):
    """Call tests that ask for a `trained` model with every one that there is."""
    if "trained" in metafunc.fixturenames:
        folder = metafunc.config.getoption("models")
        found = sorted(config.parent for config in Path(folder).glob("*/config.json")) if folder else []
        metafunc.parametrize("trained", found, ids=lambda path: path.name)


@pytest.fixture(scope="session", autouse=True)
def no_library_of_ones_own(tmp_path_factory):
    """Keep schedules that the user has tuned out of what tests compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


def once(tmp_path_factory, name: str, make) -> Path:
    """Call ``make(path)`` in the first process that asks, wait for it in the others, and return the path."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    path, lock, done = root / name, root / f"{name}.lock", root / f"{name}.done"
    try:
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        deadline = time.monotonic() + _PATIENCE
        while not done.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} was not made by the process that began it") from None
            time.sleep(0.1)
        return path
    make(path)
    done.touch()
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Two random layers, 4-bit groups of 64 with short last groups, per-token-group activations."""

    def make(path: Path) -> None:
        source = write_tiny_llama(path.with_name("source-of-" + path.name))
        quantize(str(source), path, method="rtn", group_size=64)

    return once(tmp_path_factory, "tiny-checkpoint", make)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory, tiny_checkpoint) -> Path:
    """The tiny checkpoint compiled for this machine, phases dumped beside it."""

    def make(path: Path) -> None:
        compile_checkpoint(tiny_checkpoint, "host", path, debug_dump=path.with_name(path.name + "-dump"))

    return once(tmp_path_factory, "tiny-bundle", make)


@pytest.fixture
def agq():
    """Run `agq` in a process of its own: ``agq("eval", …) -> CompletedProcess``."""
    import sys

    def run(*arguments: str, timeout: float = 300, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "agq_tvm", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)

    return run
