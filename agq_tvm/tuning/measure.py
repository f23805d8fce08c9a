"""Measuring one candidate, on this machine or on a board: first whether it is right, then how fast.

The same steps run everywhere; `Place` is what differs. Operands are made where the candidate runs, by functions in its
own library, and what it writes is compared with what was expected before anything is timed.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from agq_tvm.tuning.helpers import FIXED, MAIN, SWEEP, digest_name, fill_name

_COPIES = 512
"""Of cold operands at most: each is named in a call."""
_LONGEST_SWEEP = 0.1
"""Seconds of a sweep through the copies of cold operands, about: a call that takes long has read them for little."""
_OUTLIER = 1.25
_FIXED_ROUNDS = 400_000
_FIXED_REPEATS = 3
_HOT = 1.05
_REPRIEVES = 2
_WAIT_FOR_COOL = 2.0

WRONG, CRASHED, HUNG, LOST, UNFIT, FAILED = "wrong", "crashed", "hung", "lost", "unfit", "failed"
NO_VERDICT = (LOST, UNFIT)
"""Kinds of errors that say nothing about the candidate: it has to be measured again."""


class MeasureError(Exception):
    """A candidate was not measured.

    Parameters
    ----------
    kind : str
        ``"wrong"`` results; ``"crashed"``, with the process that ran it; ``"hung"``, ended at its time-out;
        ``"failed"``, with an error of its own. And `NO_VERDICT`: ``"lost"``, the board went away; ``"unfit"``, the
        board cannot run what is compiled for the device.
    text : str
        What happened, in words.
    """

    def __init__(self, kind: str, text: str):
        super().__init__(f"{kind}: {text}")
        self.kind, self.text = kind, text


def kind_of(message: str) -> str:
    """Return the kind of an error from its message, for example that of a runner's result."""
    return message.partition(":")[0]


@dataclass(frozen=True)
class Effort:
    """How thoroughly candidates are timed.

    Attributes
    ----------
    repeats : int
        Of the measurement; their median counts.
    milliseconds : int
        Of one repeat, at least.
    cold_bytes : int
        Operands that a model does not find in a cache are read from copies that have so many bytes together, in turn.
        0: there is one copy.
    cooldown : float
        Seconds for which a board rests before each candidate.
    """

    repeats: int = 10
    milliseconds: int = 20
    cold_bytes: int = 16 << 20
    cooldown: float = 0.0


ONCE = Effort(repeats=1, milliseconds=0, cold_bytes=0)
"""Enough to see that a candidate is right."""


@dataclass(frozen=True)
class Argument:
    """An operand of the kernel, and what is known of it after a call.

    Attributes
    ----------
    shape, dtype
    role : str
        ``"input"``, ``"cold"``, ``"updated"`` or ``"output"``, see `agq_tvm.tuning.operands`.
    digest : int, optional
        Of what the kernel must have written.
    reference : str, optional
        File with that array (.npy), where results depend on the order of sums: compared with a tolerance.
    """

    shape: tuple[int, ...]
    dtype: str
    role: str
    digest: int | None = None
    reference: str | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def written(self) -> bool:
        """Whether the kernel writes it."""
        return self.role in ("updated", "output")


@dataclass
class Measurement:
    """What was measured.

    Attributes
    ----------
    seconds : list of float
        Of one call, for each repeat.
    outliers : int
        Repeats that took more than 1.25 times the median.
    spread : float
        Half the distance between the quartiles, as a share of the median.
    drift : float
        What a fixed computation took, before or after, as a multiple of the least that it ever took there.
    hot : bool
        Whether the processor was slow (see `drift`) in spite of longer rests: the figure is too high.
    board : str
        Where; "" for this machine.
    emulated : bool
        Whether the board is emulated: then the seconds mean nothing.
    status : dict
        What the board told of itself after the measurement, see `agq_tvm.boards.status`.
    """

    seconds: list[float]
    outliers: int = 0
    spread: float = 0.0
    drift: float = 1.0
    hot: bool = False
    board: str = ""
    emulated: bool = False
    status: dict = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def kept(self) -> list[float]:
        """The seconds without outliers."""
        return [second for second in self.seconds if second <= _OUTLIER * self.median]


class Place(Protocol):
    """Where a candidate runs.

    Attributes
    ----------
    keeps_time : bool
        Whether time means anything there; it does not under emulation.
    """

    keeps_time: bool

    def threads(self, count: int) -> AbstractContextManager:
        """Run the calls inside on so many threads, on the best processors."""

    def library(self, path: str) -> Callable[[str], Callable]:
        """Load a candidate; return a function that gives its functions by name, or raises."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Return a tensor there."""

    def copies(self, tensor: Any, count: int) -> list:
        """Return copies of a tensor there, made there, in memory like that of a model's weights."""

    def array(self, tensor: Any) -> np.ndarray:
        """Return a tensor's contents."""

    def time(self, name: str, arguments: Sequence, repeats: int, milliseconds: int) -> list[float]:
        """Return seconds of one call of a function of the library, by the clock there."""


def measure(
    place: Place,
    path: str,
    arguments: Sequence[Argument],
    threads: int,
    effort: Effort,
    deadline: float,
    fixed_best: float | None = None,
    waits: bool = True,
) -> tuple[Measurement, float | None]:
    """Check and time a candidate.

    Parameters
    ----------
    place : Place
    path : str
        The candidate's library.
    arguments : sequence of Argument
        The kernel's.
    threads : int
    effort : Effort
    deadline : float
        On `time.monotonic`: when a slow processor is not waited for any more.
    fixed_best : float, optional
        The least that the fixed computation ever took there, in seconds.
    waits : bool
        Whether a slow processor is given time to cool; it will not if that did not help the candidate before.

    Returns
    -------
    measurement : Measurement
    fixed : float or None
        The least that the fixed computation ever took there; None where time means nothing.

    Raises
    ------
    MeasureError
        If results are wrong. What crashes or hangs raises nothing here: the process or the session ends.
    """
    if not place.keeps_time:  # what makes time honest would be for nothing
        effort = replace(effort, milliseconds=0, cold_bytes=0)
    with place.threads(threads):
        function = place.library(path)
        operands = prepare(place, function, arguments)
        function(MAIN)(*operands)
        check(place, function, operands, arguments)
        sweep = _sweep(place, operands, arguments, effort)
        calls = (len(sweep) - 1) // len(operands)
        time.sleep(effort.cooldown)
        seconds, drift, fixed = _timed(place, sweep, effort, fixed_best)
        for attempt in range(1, _REPRIEVES + 1 if waits else 1):
            rest = attempt * max(_WAIT_FOR_COOL, effort.cooldown)
            if drift <= _HOT or time.monotonic() + 2 * rest > deadline:
                break
            time.sleep(rest)
            seconds, drift, fixed = _timed(place, sweep, effort, fixed)
        check(place, function, operands, arguments)
    return _summary([value / calls for value in seconds], drift), fixed


def prepare(place: Place, function: Callable[[str], Callable], arguments: Sequence[Argument]) -> list:
    """Return the operands of a candidate, made by its own functions."""
    operands = [place.empty(argument.shape, argument.dtype) for argument in arguments]
    for number, operand in enumerate(operands):
        function(fill_name(number))(operand)
    return operands


def check(place: Place, function: Callable[[str], Callable], operands: list, arguments: Sequence[Argument]) -> None:
    """Compare what a candidate wrote with what was expected.

    Raises
    ------
    MeasureError
        If it differs.
    """
    for number, (operand, argument) in enumerate(zip(operands, arguments, strict=True)):
        if argument.digest is not None:
            result = place.empty((1,), "int64")
            function(digest_name(number))(operand, result)
            if int(place.array(result)[0]) != argument.digest:
                raise MeasureError(WRONG, f"argument {number} differs from the reference")
        elif argument.reference is not None:
            difference = disagreement(place.array(operand), np.load(argument.reference))
            if difference:
                raise MeasureError(WRONG, f"argument {number} differs from the reference: {difference}")


def disagreement(found: np.ndarray, expected: np.ndarray) -> str | None:
    """Say how two results differ by more than sums in another order may; None if they agree.

    Floats agree within 1e-3 of the largest; so may a code that stands between two differ by one, in one place of a
    hundred, and with it sums of codes.
    """
    if found.dtype.kind == "f":
        if not np.isfinite(found).all():
            return "it is not finite everywhere"
        largest = max(float(np.abs(expected).max(initial=0)), 1e-30)
        error = float(np.abs(found.astype("float64") - expected).max(initial=0)) / largest
        return f"by {error:.1e} of the largest value" if error > 1e-3 else None
    distance = np.abs(found.astype("int64") - expected)
    if found.dtype.itemsize == 1 and distance.max(initial=0) > 1:
        return f"codes by {distance.max()}"
    share = float((distance > found.dtype.itemsize // 2).mean()) if distance.size else 0.0
    return f"{100 * share:.1f} % of its integers" if share > 0.01 else None


def _sweep(place: Place, operands: list, arguments: Sequence[Argument], effort: Effort) -> list:
    """Return the arguments of `SWEEP`: the operands of each call, where cold ones are copies of the first."""
    size = sum(argument.nbytes for argument in arguments if argument.role == "cold")
    calls = min(_COPIES, max(1, math.ceil(effort.cold_bytes / size))) if size else 1
    if calls > 1:
        (once,) = place.time(SWEEP, [len(operands), *operands], 1, 0)
        if calls * once > _LONGEST_SWEEP:
            calls = max(1, round(_LONGEST_SWEEP / once))
    columns = [
        [operand, *place.copies(operand, calls - 1)] if argument.role == "cold" else [operand] * calls
        for operand, argument in zip(operands, arguments, strict=True)
    ]
    return [len(operands), *(operand for call in zip(*columns, strict=True) for operand in call)]


def _timed(place: Place, sweep: list, effort: Effort, best: float | None) -> tuple[list[float], float, float | None]:
    """Return seconds of each repeat, how slow the processor was meanwhile, and the best it ever was."""
    if not place.keeps_time:
        return place.time(SWEEP, sweep, effort.repeats, effort.milliseconds), 1.0, None
    before = _fixed(place)
    seconds = place.time(SWEEP, sweep, effort.repeats, effort.milliseconds)
    after = _fixed(place)
    best = min(before, after, best or math.inf)
    return seconds, max(before, after) / best if best > 0 else 1.0, best


def _fixed(place: Place) -> float:
    return min(place.time(FIXED, [_FIXED_ROUNDS], _FIXED_REPEATS, 0))


def _summary(seconds: list[float], drift: float) -> Measurement:
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (0, 0, 0)
    outliers = sum(second > _OUTLIER * median for second in seconds)
    spread = (high - low) / 2 / median if median else 0.0
    return Measurement(seconds, outliers, spread, drift, drift > _HOT)
