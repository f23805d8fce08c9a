"""A record: what was measured of one candidate, one line of JSON in a library. Nothing here needs TVM."""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from agq_tvm.errors import AgqError

MEASURED, SIMULATED = "measured", "simulated"
_LARGEST_SIZE = 1 << 20
"""Of anything in the description of a kernel."""
_DIGITS, _DEEPEST = 18, 64
"""Of an integer in a line, and of lists and objects in each other: more is none of ours."""


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes
    ----------
    task : str
        See `agq_tvm.kernels.tunable.task_name`.
    kernel : dict
        The kernel's description, ``"class"`` among it.
    instruction_set : str
    decisions : dict of str to int
    seconds : tuple of float or None
        Of one call, in every repeat; None if it failed.
    error : str or None
        Why it failed.
    how : str
        ``"measured"`` or ``"simulated"``.
    record : list or None
        MetaSchedule's own tuning record.
    provenance : dict
        When, on what, and with which versions. ``"default_seconds"``, what the default took meanwhile, if it was
        measured again, in turns with that; ``"doubtful"`` then tells whether it was not faster in every turn.
    """

    task: str
    kernel: dict
    instruction_set: str
    decisions: dict
    seconds: tuple[float, ...] | None
    error: str | None
    how: str
    record: list | None = None
    provenance: dict = field(default_factory=dict)

    @property
    def time(self) -> float:
        """Seconds of one call: the median, infinite for a failure."""
        return statistics.median(self.seconds) if self.seconds else math.inf

    @property
    def confirmed(self) -> bool:
        """Whether it was measured again, in turns with the default."""
        return self.gain is not None

    @property
    def gain(self) -> float | None:
        """How many times as fast as the default it was, measured in turns; None if it was not.

        Times of two runs do not compare: a machine is slower in one hour than in another.
        """
        default = self.provenance.get("default_seconds")
        sound = type(default) in (int, float) and math.isfinite(default) and default > 0 and self.seconds
        return default / self.time if sound else None

    @property
    def key(self) -> tuple:
        """What is never measured twice."""
        return self.task, tuple(sorted(self.decisions.items())), self.how, self.confirmed, self.emulated, self.cpu

    @property
    def cpu(self) -> str:
        """The processor that measured it, or that it is simulated for."""
        return str(self.provenance.get("cpu"))

    @property
    def emulated(self) -> bool:
        """Whether it was measured on an emulated board, whose time means nothing."""
        return bool(self.provenance.get("emulated"))

    @property
    def usable(self) -> bool:
        """Whether it can be the best of its task: failures and emulated boards never are."""
        return bool(self.seconds) and not self.emulated

    @property
    def rank(self) -> tuple:
        """Smaller is better: confirmed before measured before simulated, then the gain, or without one the time.

        The default, whose gain is 1, comes before those that were not faster than it in every turn.
        """
        order = 1 / self.gain if self.gain else self.time
        return not self.usable, self.how != MEASURED, not self.confirmed, bool(self.provenance.get("doubtful")), order

    @property
    def kernel_version(self) -> int:
        """Of the kernel's design space, 0 if it is not known."""
        version = self.provenance.get("kernel_version")
        return version if type(version) is int else 0

    def line(self) -> bytes:
        """Return the record as it stands in a file."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def parse_record(line: bytes | str) -> Record:
    """Read a record.

    Raises
    ------
    AgqError
        That says in a few words what is wrong with it.
    """
    try:
        value = json.loads(line, parse_int=_integer)
    except (ValueError, RecursionError):
        raise AgqError("it is not JSON") from None
    names = {"task", "kernel", "instruction_set", "decisions", "seconds", "error", "how", "record", "provenance"}
    if not isinstance(value, dict) or set(value) != names:
        raise AgqError(f"it is not an object of {', '.join(sorted(names))}")
    _check_types(value)
    seconds = value["seconds"]
    return Record(**value | {"seconds": tuple(map(float, seconds)) if seconds else None})


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise AgqError(f"a number in it has more than {_DIGITS} digits")
    return int(text)


def _is_flat(value, levels: int = _DEEPEST) -> bool:
    """Tell whether lists and objects are in each other no deeper than so many levels."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(each, levels - 1) for each in inside)


def _check_types(value: dict) -> None:
    def require(condition: bool, what: str) -> None:
        if not condition:
            raise AgqError(what)

    for name in ("task", "instruction_set"):
        text = value[name]
        require(isinstance(text, str) and 0 < len(text) <= 512, f"{name} is not a name")
        require(text.isascii() and text.isprintable(), f"{name} has letters that no name has")
    require(_is_flat(value), "it is too deep")
    kernel, decisions, seconds = value["kernel"], value["decisions"], value["seconds"]
    require(isinstance(kernel, dict) and isinstance(kernel.get("class"), str), "kernel is no description")
    sizes = [each for each in kernel.values() if type(each) in (int, float)]
    require(all(abs(each) <= _LARGEST_SIZE for each in sizes), "kernel has sizes that no kernel has")
    pairs = decisions.items() if isinstance(decisions, dict) else [(0, 0)]
    require(all(isinstance(key, str) and type(number) is int for key, number in pairs), "decisions are no integers")
    require(value["how"] in (MEASURED, SIMULATED), f"how is neither {MEASURED} nor {SIMULATED}")
    require((seconds is None) == isinstance(value["error"], str), "it has neither seconds nor an error, or both")
    if seconds is not None:
        require(value["error"] is None, "error is no text")
        require(isinstance(seconds, list) and bool(seconds), "seconds are no list")
        numbers = all(type(each) in (int, float) and math.isfinite(each) and each > 0 for each in seconds)
        require(numbers, "seconds are no positive numbers")
    require(value["record"] is None or isinstance(value["record"], list), "record is none of MetaSchedule's")
    require(isinstance(value["provenance"], dict), "provenance is no object")


def best_of(records: Iterable[Record]) -> dict[str, Record]:
    """Return the best record of each task that has a usable one."""
    best: dict[str, Record] = {}
    for record in records:
        if record.usable and (record.task not in best or record.rank < best[record.task].rank):
            best[record.task] = record
    return best
