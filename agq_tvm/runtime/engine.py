"""Running a bundle: chunks of prefill, decode, and the tokens between them."""

import resource
from collections.abc import Callable, Iterator
from functools import cache
from typing import Protocol

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.models.decoder import PREFILL_BUCKETS
from agq_tvm.quantize.pruning import read_schedule
from agq_tvm.runtime.bundle import LIBRARY, Bundle
from agq_tvm.runtime.operations import Operation, Watch
from agq_tvm.runtime.status import machine_status
from agq_tvm.runtime.threads import Threads
from agq_tvm.runtime.virtual_machine import VirtualMachine, aligned
from agq_tvm.targets import detect

CALL_ROWS = 4
"""What a call takes besides its rows, in rows: the time of SmolLM2's functions goes with rows + 4 on AVX-512."""


class Session(Protocol):
    """Where a bundle's functions run: this machine, or a board.

    Attributes
    ----------
    emulated : bool
        Whether it is an emulated board, whose time means nothing.
    threads : int
    """

    emulated: bool
    threads: int

    def run(self, function: str, tokens: np.ndarray, positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Call a function of the bundle: int32 arrays [M], [M] and its lengths in, float32 logits out."""


class LocalSession:
    """A bundle's functions on this machine.

    Parameters
    ----------
    bundle : Bundle
    threads : int, optional
        Those of the device by default.

    Attributes
    ----------
    threads : int
        As many of them as this machine has processors for, see `agq_tvm.runtime.threads.Threads`.
    emulated : bool
    """

    emulated = False

    def __init__(self, bundle: Bundle, threads: int | None = None):
        bundle.check_runs_on(detect.machine(), detect.cpu_features())
        self._threads = Threads(threads or bundle.manifest["device"]["threads"])
        self._threads.configure()
        self.threads = self._threads.count
        self._library, caches = bundle.path / LIBRARY, [aligned(shape, dtype) for _, shape, dtype in bundle.caches]
        self._state = [*caches, *bundle.arrays().values()]
        self._machine = VirtualMachine(self._library, self._state)

    def run(self, function: str, tokens: np.ndarray, positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """See `Session.run`."""
        with self._threads.running():
            return self._machine.run(function, (tokens, positions, lengths))

    def watch(self, work: Callable[[Callable[[], None]], None]) -> list[Operation]:
        """Time every kernel while `work` uses this session, on a machine of its own with the same caches and weights.

        Parameters
        ----------
        work : callable
            Gets a function that forgets what was counted so far.

        Returns
        -------
        list of Operation
            By falling time.
        """
        watch, before = Watch(), self._machine
        self._machine = VirtualMachine(self._library, self._state, watch)
        try:
            work(watch.forget)
        finally:
            self._machine = before
        return watch.operations()

    def status(self) -> dict[str, float] | None:
        """Return temperature and clock, see `agq_tvm.runtime.status`."""
        return machine_status()

    def peak_bytes(self) -> int | None:
        """Return the most memory that this process had."""
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def chunks(count: int, buckets: tuple[int, ...] | list[int]) -> list[tuple[int, int]]:
    """Cut a prompt into (rows of the compiled function, valid rows): a fixed function of its length.

    The largest bucket as often as the prompt fills it, then what is cheapest, a call costing as much as `CALL_ROWS`
    rows: buckets of falling size, of which the last may be padded. Of what costs the same, the fewer rows are taken.
    A single row is `decode`'s.

    Where a prompt is cut decides which of its tokens a model that prunes drops: the reference's cut, `prompt_chunks`,
    is that of a bundle with all of `PREFILL_BUCKETS`.

    Parameters
    ----------
    count : int
        Tokens of the prompt.
    buckets : sequence of int
        Rows of the compiled functions.
    """
    largest = max(buckets)
    full = [(largest, largest)] * (count // largest)
    return full + list(_cheapest_cut(count % largest, tuple(sorted(buckets))))


@cache
def _cheapest_cut(count: int, buckets: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if count < 2:
        return ((1, 1),) * count
    cuts = [
        ((bucket, min(bucket, count)), *_cheapest_cut(count - min(bucket, count), buckets)) for bucket in buckets[::-1]
    ]
    return min(cuts, key=lambda cut: (sum(rows + CALL_ROWS for rows, _ in cut), sum(rows for rows, _ in cut)))


def prompt_chunks(count: int) -> list[int]:
    """Return the valid rows of each chunk of a prompt, as compiled models cut it."""
    return [valid for _, valid in chunks(count, PREFILL_BUCKETS)]


class Engine:
    """A sequence of tokens in progress on a session.

    Parameters
    ----------
    bundle : Bundle
    session : Session, optional
        This machine by default.

    Attributes
    ----------
    length : int
        Positions read so far; the caches of models that prune hold fewer.
    pruning : PruningSchedule or None
        Which tokens of a prompt are dropped.
    stop : frozenset of int
        The tokens that end a text.
    """

    def __init__(self, bundle: Bundle, session: Session | None = None):
        self.session = session or LocalSession(bundle)
        self.context: int = bundle.manifest["context"]
        self.vocab_size: int = bundle.manifest["model"]["vocab_size"]
        self.buckets: list[int] = bundle.manifest["buckets"]
        self.stop = frozenset(bundle.manifest["model"]["eos_token_ids"])
        self.pruning = read_schedule(bundle.manifest.get("pruning"))
        places = np.arange(self.context + max(self.buckets), dtype="int32")
        self._positions = np.minimum(places, self.context - 1)  # those of padding are not used
        self.reset()

    def reset(self) -> None:
        """Start a new sequence."""
        self.length = 0
        self._cached = [0] * (1 + len(self.pruning.layers) if self.pruning else 1)

    def prefill(self, tokens: list[int], all_logits: bool = False) -> np.ndarray:
        """Append tokens in chunks; a model that prunes drops some of them, unless all logits are asked for.

        Parameters
        ----------
        tokens : list of int
        all_logits : bool
            Whether to return the logits of every token instead of the last one's.

        Returns
        -------
        float32 [V], or [T, V] with `all_logits`

        Raises
        ------
        AgqError
            If there is no token, one is out of range, or they do not fit the context.
        """
        self._check(tokens)
        rows_of_logits, start = [], 0
        for rows, valid in chunks(len(tokens), self.buckets):
            end = start + valid
            logits = self._step(tokens[start:end], rows, all_logits, end == len(tokens))
            rows_of_logits.append(logits[:valid])
            start = end
        return np.concatenate(rows_of_logits) if all_logits else rows_of_logits[-1][-1]

    def decode(self, token: int) -> np.ndarray:
        """Append one token and return its logits, float32 [V]."""
        self._check([token])
        return self._step([token], 1, True)[0]

    def generate(self, prompt: list[int], limit: int, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        """Yield the most likely continuation, at most `limit` tokens, up to a token in `stop`."""
        self.reset()
        logits = self.prefill(prompt)
        for produced in range(limit):
            token = int(logits.argmax())
            if token in stop:
                return
            yield token
            if produced + 1 < limit and self.length < self.context:
                logits = self.decode(token)
            else:
                return

    def _check(self, tokens: list[int]) -> None:
        if not tokens:
            raise AgqError("the prompt has no tokens: give some text")
        wrong = [token for token in tokens if not 0 <= token < self.vocab_size]
        if wrong:
            raise AgqError(f"token {wrong[0]} is not in the vocabulary of {self.vocab_size}")
        if self.length + len(tokens) > self.context:
            raise AgqError(
                f"{self.length + len(tokens)} tokens do not fit the context of {self.context} that the bundle was "
                "compiled for: shorten the prompt, or compile it with a larger --context"
            )

    def _step(self, tokens: list[int], rows: int, all_rows: bool, ends_prompt: bool = True) -> np.ndarray:
        valid = len(tokens)
        padded = np.zeros(rows, "int32")
        padded[:valid] = tokens
        positions = self._positions[self.length : self.length + rows]
        lengths, counts = self._lengths(valid, all_rows, ends_prompt)
        name = "decode" if rows == 1 else f"prefill_{rows}_all" if all_rows else f"prefill_{rows}"
        logits = self.session.run(name, padded, positions, lengths)
        self.length += valid
        self._cached = [cached + count for cached, count in zip(self._cached, counts, strict=True)]
        return logits

    def _lengths(self, valid: int, all_rows: bool, ends_prompt: bool) -> tuple[np.ndarray, tuple[int, ...]]:
        """Return the functions' `lengths`, and how many rows each segment is about to cache."""
        if self.pruning is None:
            return np.array([self._cached[0], valid], "int32"), (valid,)
        counts = (valid,) * len(self._cached) if all_rows else self.pruning.counts(valid)
        pairs = np.array([self._cached, counts], "int32").T
        return np.append(pairs.reshape(-1), np.int32(ends_prompt)), counts
