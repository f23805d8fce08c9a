"""Speed of a bundle, here or on a board: tokens per second of prefill and decode, and where the time goes."""

import math
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.progress import progress
from agq_tvm.runtime.board_session import BoardSession
from agq_tvm.runtime.bundle import LIBRARY, Bundle, versions
from agq_tvm.runtime.engine import Engine, Session
from agq_tvm.runtime.sessions import open_session
from agq_tvm.runtime.status import processor_name

FORMAT_VERSION = 1
_WATCHED = 3


def bench(
    bundle: str | Path,
    threads: int | None = None,
    prefill_tokens: int = 512,
    decode_tokens: int = 64,
    rounds: int = 5,
    tracker: str | None = None,
    key: str | None = None,
) -> dict:
    """Time a bundle.

    On this machine a round is timed as a whole. On a board each call is timed by the board's own clock, so that the
    network is in no figure. On an emulated board everything runs once, and nothing is timed.

    Parameters
    ----------
    bundle : path-like
    threads : int, optional
        Those of the device by default.
    prefill_tokens : int
        Prompt length; cut to what fits the context.
    decode_tokens : int
        Tokens decoded after a prompt of one token.
    rounds : int
        Timed repetitions, after one that is not.
    tracker, key : str, optional
        A board, see `agq_tvm.runtime.sessions.open_session`.

    Returns
    -------
    dict
        Plain values for JSON. ``tests`` has for ``pp512``, ``tg64`` and the like: ``tokens``, ``samples`` (tokens per
        second of each round), their ``mean`` and ``std`` (None for one round), and ``operations``, the kernels by
        falling time; all but ``tokens`` and the kernels' ``calls`` are None on an emulated board.

    Raises
    ------
    AgqError
        If the bundle does not run there.
    """
    loaded = Bundle(bundle)
    context = loaded.manifest["context"]
    prefill_tokens, decode_tokens = min(prefill_tokens, context), min(decode_tokens, context - 1)
    if min(prefill_tokens, decode_tokens, rounds) < 1:
        raise AgqError("bench needs at least one token and one round")
    load = os.getloadavg()[0] if tracker is None else None
    with open_session(loaded, threads, tracker, key) as session:
        works = {
            f"pp{prefill_tokens}": (prefill_tokens, _prefill(prefill_tokens)),
            f"tg{decode_tokens}": (decode_tokens, _decode(decode_tokens)),
        }
        before = session.status()
        seconds = _check(loaded, session, works) if session.emulated else _time(loaded, session, works, rounds)
        result = {
            "format_version": FORMAT_VERSION,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": _model(loaded),
            "device": loaded.manifest["device"]["name"],
            "instruction_set": loaded.manifest["device"]["instruction_set"],
            "processor": processor_name() if tracker is None else None,
            "board": None if tracker is None else key or loaded.manifest["device"]["name"],
            "emulated": session.emulated,
            "threads": session.threads,
            "rounds": None if session.emulated else rounds,
            "load": load,
            "tests": {
                name: {"tokens": tokens} | _figures(tokens, seconds[name]) | _operations(loaded, session, work)
                for name, (tokens, work) in progress(works.items(), "profiling", unit="test")
            },
            "memory": _memory(loaded, session),
            "status": None if session.emulated else {"before": before, "after": session.status()},
            "uploaded_bytes": None if tracker is None else session.uploaded,
            "versions": versions(),
        }
    return result


def _prefill(tokens: int) -> Callable[[Engine, Callable], None]:
    """Return the work of a test, which calls ``begin()`` where its time begins."""

    def work(engine: Engine, begin: Callable[[], None]) -> None:
        begin()
        engine.prefill(_prompt(engine, tokens))

    return work


def _decode(tokens: int) -> Callable[[Engine, Callable], None]:
    def work(engine: Engine, begin: Callable[[], None]) -> None:
        engine.prefill(_prompt(engine, 1))
        begin()
        for token in _prompt(engine, tokens):
            engine.decode(token)

    return work


def _prompt(engine: Engine, tokens: int) -> list[int]:
    return [(7 * i + 1) % engine.vocab_size for i in range(tokens)]


class _Clock:
    """Times one round at a time: this machine's clock around all of it, or a board's around each call."""

    def __init__(self, bundle: Bundle, session: Session):
        self._calls = _TimedCalls(session) if isinstance(session, BoardSession) else None
        self._engine, self._begun = Engine(bundle, self._calls or session), 0.0

    def seconds(self, work: Callable) -> float:
        self._engine.reset()
        work(self._engine, self._begin)
        return self._now() - self._begun

    def _now(self) -> float:
        return self._calls.seconds if self._calls else time.perf_counter()

    def _begin(self) -> None:
        self._begun = self._now()


class _TimedCalls:
    """Stands for a board's session and adds up the seconds that its calls take there; logits stay there."""

    def __init__(self, board: BoardSession):
        self._board, self.seconds = board, 0.0

    def run(self, function: str, tokens: np.ndarray, positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self.seconds += self._board.time(function, tokens, positions, lengths)
        return np.zeros((len(tokens), 1), "float32")


def _time(bundle: Bundle, session: Session, works: dict, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round of each test, tests in turns."""
    clock, found = _Clock(bundle, session), {name: [] for name in works}
    for _ in progress(range(rounds + 1), "timing", unit="round"):
        for name, (_, work) in works.items():
            found[name].append(clock.seconds(work))
    return {name: seconds[1:] for name, seconds in found.items()}


def _check(bundle: Bundle, session: Session, works: dict) -> dict[str, None]:
    """Run every test once where time means nothing; refuse logits that are not finite."""

    class Finite:
        def run(self, function: str, *arrays: np.ndarray) -> np.ndarray:
            logits = session.run(function, *arrays)
            if not np.isfinite(logits).all():
                raise AgqError(f"{function} of {bundle.path} gives logits that are not finite on the board")
            return logits

    for _, work in progress(works.values(), "running", unit="test"):
        work(Engine(bundle, Finite()), lambda: None)
    return dict.fromkeys(works)


def _figures(tokens: int, seconds: list[float] | None) -> dict:
    if seconds is None:
        return {"mean": None, "std": None, "samples": None}
    samples = [tokens / each for each in seconds]
    std = statistics.stdev(samples) if len(samples) > 1 else None
    return {"mean": statistics.mean(samples), "std": std, "samples": samples}


def _operations(bundle: Bundle, session: Session, work: Callable) -> dict:
    """Return the kernels, timed one by one in rounds of their own: the median over these of each one's seconds."""
    rounds = [
        session.watch(lambda forget: work(Engine(bundle, session), forget))
        for _ in range(1 if session.emulated else _WATCHED)
    ]
    if None in rounds:
        return {"operations": None}
    listed = []
    for name, calls in sorted((each.name, each.calls) for each in rounds[0]):
        seconds = statistics.median(each.seconds for found in rounds for each in found if each.name == name)
        listed.append({"name": name, "calls": calls, "seconds": None if session.emulated else seconds})
    return {"operations": listed if session.emulated else sorted(listed, key=lambda each: -each["seconds"])}


def _model(bundle: Bundle) -> dict:
    """Say which model it is: the same checkpoint has the same sha256, whatever it was compiled for."""
    return {"name": bundle.path.absolute().name, "checkpoint_sha256": bundle.manifest["checkpoint_sha256"]} | {
        name: bundle.manifest["model"][name] for name in ("family", "layers", "hidden_size")
    }


def _memory(bundle: Bundle, session: Session) -> dict:
    """Return sizes in bytes; ``peak`` is the most memory that the process had, None if that is unknown."""
    return {
        "weights": sum(each.nbytes for each in bundle.parameters),
        "caches": sum(math.prod(shape) * np.dtype(dtype).itemsize for _, shape, dtype in bundle.caches),
        "library": bundle.manifest["files"][LIBRARY]["bytes"],
        "bundle": bundle.nbytes,
        "peak": session.peak_bytes(),
    }


def compare_prefill(first: Bundle, second: Bundle, tokens: int, rounds: int = 7) -> tuple[float, float]:
    """Time prefill of two bundles in turns, so that what else the machine does meets both.

    Parameters
    ----------
    first, second : Bundle
    tokens : int
        Length of the prompt.
    rounds : int
        Timed repetitions, after one that is not.

    Returns
    -------
    pair of float
        Medians in tokens per second.

    Raises
    ------
    AgqError
        If a bundle does not run here, or the prompt does not fit.
    """
    engines = [Engine(bundle) for bundle in (first, second)]
    times: tuple[list[float], list[float]] = ([], [])
    prompt = [(7 * i + 1) % engines[0].vocab_size for i in range(tokens)]
    for _ in progress(range(rounds + 1), "timing", unit="round"):
        for engine, spent in zip(engines, times, strict=True):
            engine.reset()
            start = time.perf_counter()
            engine.prefill(prompt)
            spent.append(time.perf_counter() - start)
    return tokens / statistics.median(times[0][1:]), tokens / statistics.median(times[1][1:])
