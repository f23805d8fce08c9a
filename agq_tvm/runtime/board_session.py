"""A bundle's functions on a board, through TVM's RPC: parameters stay there, tokens go and logits come."""

import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from agq_tvm.boards.status import board_status
from agq_tvm.boards.tracker import board_features, board_is_emulated, connect
from agq_tvm.errors import AgqError
from agq_tvm.progress import say
from agq_tvm.runtime.board_files import send_files
from agq_tvm.runtime.bundle import LIBRARY, PARAMETERS, Bundle
from agq_tvm.runtime.operations import Operation, by_time
from agq_tvm.runtime.threads import configure_board

SESSION_SECONDS = 6 * 3600.0
"""After so long a board ends a session, whatever it does."""
REPLY_SECONDS = 300.0
"""After so long without an answer a board counts as lost."""
_CPU = 1  # DLPack's device type
_PREFIX = "param"
_WATCH = "agq.board.watch"


@contextmanager
def open_board(bundle: Bundle, tracker: str, key: str | None, threads: int | None) -> Iterator["BoardSession"]:
    """Open a session with a board and load a bundle there; it ends with the block.

    Parameters
    ----------
    bundle : Bundle
    tracker : str
        ``"HOST:PORT"``.
    key : str, optional
        What the board is registered as; the name of the bundle's device by default.
    threads : int, optional
        Those of the device by default.

    Raises
    ------
    AgqError
        If there is no such board, it lacks what the bundle needs, or it is lost inside the block.
    """
    device = bundle.manifest["device"]["name"]
    connection = connect(tracker, key or device, timeout=SESSION_SECONDS, reply=REPLY_SECONDS)
    board = None
    try:
        say(f"board {key or device} at {tracker}: loading {bundle.path}")
        board = BoardSession(bundle, connection, threads)
        yield board
    except BaseException as error:
        connection.line.cut()  # else each handle, as it is dropped, would wait for a board that may be gone
        if isinstance(error, RuntimeError | OSError):
            raise AgqError(f"board {key or device} at {tracker}: {_reason(error)}") from None
        raise
    finally:
        if board is not None:
            board.close()
        del board, connection
        gc.collect()


def _reason(error: Exception) -> str:
    """Say in a line what TVM says about a call over RPC in many."""
    text = str(error).rpartition("Error caught from RPC call:")[2].strip()
    lost = ("kShutdown", "Connection reset", "Broken pipe", "SockChannel", "closed", "Transport endpoint")
    if "Resource temporarily unavailable" in text:
        return f"no answer within {REPLY_SECONDS:.0f} s: look whether it hangs, or has lost its power"
    if any(word in text for word in lost):
        return "the connection was lost: look whether it runs, and at its server's log"
    lines = text.splitlines() or [type(error).__name__]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


class BoardSession:
    """See `agq_tvm.runtime.engine.Session`.

    Parameters
    ----------
    bundle : Bundle
    session : tvm.rpc.RPCSession
        From `agq_tvm.boards.tracker.connect`; it stays open as long as this object lives.
    threads : int, optional
        Those of the device by default.

    Attributes
    ----------
    emulated : bool
        Whether the board says so: then its time means nothing.
    threads : int
    uploaded : int
        Bytes that were sent; the board server keeps them for the next time.

    Raises
    ------
    AgqError
        If the bundle is damaged, or the board's processor lacks what it needs (TVM's own Python server cannot tell).
    """

    def __init__(self, bundle: Bundle, session, threads: int | None = None):
        import tvm
        from tvm import relax

        self._rpc, self._device, self._tensor = session, session.cpu(0), tvm.runtime.tensor
        self._call = session.get_function
        bundle.arrays()  # checks what is about to be sent
        features = board_features(session)
        if features is not None:
            bundle.check_runs_on("aarch64" if "asimd" in features else "x86_64", features, "the board")
        self.emulated = board_is_emulated(session)
        configure_board(session.get_function, threads or bundle.manifest["device"]["threads"])
        self.threads = int(self._call("runtime.NumThreads")())
        files = bundle.manifest["files"]
        self.uploaded = send_files(session, [(bundle.path / n, files[n]["sha256"]) for n in (LIBRARY, PARAMETERS)])
        self.library = session.load_module(LIBRARY)
        self._machine = relax.VirtualMachine(self.library, self._device)
        self._evaluators: dict[str, Callable] = {}
        self._packed = self._load(bundle)

    def _load(self, bundle: Bundle):
        """Put caches and parameters into the board's own tensor cache and return them as one handle."""
        first = len(bundle.caches)
        records = [
            {
                "name": f"{_PREFIX}_{first + i}",
                "shape": list(p.shape),
                "dtype": p.dtype,
                "format": "raw",
                "nbytes": p.nbytes,
                "byteOffset": p.offset,
            }
            for i, p in enumerate(bundle.parameters)
        ]
        shard = {
            "dataPath": PARAMETERS,
            "format": "raw-shard",
            "nbytes": (bundle.path / PARAMETERS).stat().st_size,
            "records": records,
        }
        with tempfile.TemporaryDirectory() as scratch:
            index = Path(scratch) / "tensor-cache.json"
            index.write_text(json.dumps({"metadata": {}, "records": [shard]}))
            self._rpc.upload(str(index))
        self._call("vm.builtin.tensor_cache.clear")()
        self._call("vm.builtin.tensor_cache.load")(self._call("tvm.rpc.server.workpath")(""), _CPU, 0)
        update = self._call("vm.builtin.tensor_cache.update")
        for i, (_, shape, dtype) in enumerate(bundle.caches):
            update(f"{_PREFIX}_{i}", self._tensor(np.zeros(shape, dtype), self._device), True)
        count = first + len(bundle.parameters)
        return self._call("vm.builtin.param_array_from_cache")(_PREFIX, count)

    def run(self, function: str, tokens: np.ndarray, positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """See `Session.run`."""
        return self._machine[function](*self._inputs(tokens, positions, lengths), self._packed).numpy()

    def time(self, function: str, tokens: np.ndarray, positions: np.ndarray, lengths: np.ndarray) -> float:
        """Call a function twice and return the seconds of the second call by the board's own clock.

        What travels over the network is in neither: inputs are there before, and logits stay.
        """
        if function not in self._evaluators:
            evaluator = self._machine.time_evaluator(function, self._device, number=1, repeat=1)
            self._evaluators[function] = evaluator
        inputs = self._inputs(tokens, positions, lengths)
        return float(self._evaluators[function](*inputs, self._packed).results[0])

    def watch(self, work: Callable[[Callable[[], None]], None]) -> list[Operation] | None:
        """Time every kernel: see `LocalSession.watch`. TVM's own Python server cannot: None."""
        from tvm import relax

        machine, before = relax.VirtualMachine(self.library, self._device), self._machine
        try:
            machine.module["set_instrument"](_WATCH)
        except RuntimeError:
            return None
        self._machine = machine
        try:
            work(lambda: self._call(_WATCH)())
        finally:
            self._machine = before
        lines = (line.rsplit(" ", 2) for line in str(self._call("agq.board.watched")()).splitlines())
        return by_time([Operation(name, int(calls), 1e-9 * int(nanoseconds)) for name, calls, nanoseconds in lines])

    def status(self) -> dict[str, float] | None:
        """Return what `LocalSession.status` does; None if the board's server cannot tell, as TVM's own in Python."""
        told = board_status(self._rpc) or {}
        found = {
            name: unit * max(told[source].values())
            for name, source, unit in (("temperature_celsius", "millidegrees", 1e-3), ("clock_hertz", "kilohertz", 1e3))
            if told.get(source)
        }
        return found or None

    def peak_bytes(self) -> int | None:
        """Return the most memory that the session had on the board, None if its server cannot tell."""
        try:
            return None if self.emulated else int(self._call("agq.board.peak_bytes")())
        except (AttributeError, RuntimeError, ValueError):
            return None

    def close(self) -> None:
        """Drop everything of the board's: each handle would keep the session open."""
        self._packed = self._machine = self.library = self._call = self._device = self._rpc = None
        self._evaluators = {}

    def _inputs(self, *arrays: np.ndarray) -> list:
        return [self._tensor(array, self._device) for array in arrays]
