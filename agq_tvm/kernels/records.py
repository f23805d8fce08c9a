"""The library of tuned schedules: what was measured, one line of JSON each, in a file for each device.

A library is a directory with a folder for each device, and ``records.jsonl`` in it. Lines are only ever added, each
with one write while the file is locked, so that what a program had measured when it was killed stays. A last line that
was torn is not read, and cut off before the next one is added. Nothing here needs TVM.
"""

import fcntl
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.files import write_error, write_text

RECORDS = "records.jsonl"
MEASURED, SIMULATED = "measured", "simulated"
_LONGEST_LINE = 1 << 20
_DEVICE = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_SIZES = ("rows", "columns", "channels", "context", "heads", "kv_heads")
"""Fields of a description in which the kernel of a nearest record may differ, rows only within decode or prefill."""
_FARTHEST = 3.0


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
        measured again, in turns with that.
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
        return self.task, tuple(sorted(self.decisions.items())), self.how, self.confirmed, self.emulated

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
        """Smaller is better: confirmed before measured before simulated, then the gain, or without one the time."""
        return not self.usable, self.how != MEASURED, not self.confirmed, 1 / self.gain if self.gain else self.time

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
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise AgqError("it is not JSON") from None
    names = {"task", "kernel", "instruction_set", "decisions", "seconds", "error", "how", "record", "provenance"}
    if not isinstance(value, dict) or set(value) != names:
        raise AgqError(f"it is not an object of {', '.join(sorted(names))}")
    _check_types(value)
    seconds = value["seconds"]
    return Record(**value | {"seconds": tuple(map(float, seconds)) if seconds else None})


def _check_types(value: dict) -> None:
    def require(condition: bool, what: str) -> None:
        if not condition:
            raise AgqError(what)

    for name in ("task", "instruction_set"):
        require(isinstance(value[name], str) and 0 < len(value[name]) <= 512, f"{name} is not a name")
    kernel, decisions, seconds = value["kernel"], value["decisions"], value["seconds"]
    require(isinstance(kernel, dict) and isinstance(kernel.get("class"), str), "kernel is no description")
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


class RecordFile:
    """One ``records.jsonl``.

    Parameters
    ----------
    path : path-like
        Need not exist.

    Attributes
    ----------
    problems : list of str
        Lines that were left out, and why; a torn last line is not among them.
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self.problems = Path(path), []
        self._records: list[Record] = []
        self._read_to, self._inode, self._lines = 0, None, 0

    def read(self) -> list[Record]:
        """Return all records; only what was added since the last call is read.

        Raises
        ------
        AgqError
            If there is a file that cannot be read.
        """
        try:
            with open(self.path, "rb") as file:
                self._read_on(file)
        except FileNotFoundError:
            self._forget(None)
        except OSError as error:
            raise AgqError(f"cannot read {self.path}: {error.strerror}") from error
        return self._records

    def _forget(self, inode) -> None:
        self._records, self.problems, self._read_to, self._inode, self._lines = [], [], 0, inode, 0

    def _read_on(self, file) -> None:
        status = os.fstat(file.fileno())
        if status.st_ino != self._inode or status.st_size < self._read_to:
            self._forget(status.st_ino)
            self._records = []
        file.seek(self._read_to)
        while line := file.readline(_LONGEST_LINE + 1):
            whole = line.endswith(b"\n")
            if not whole and len(line) > _LONGEST_LINE:
                raise AgqError(f"{self.path} has a line that is too long: it is none of ours")
            if not whole and not _is_record(line):
                return
            self._read_to += len(line)
            self._lines += 1
            self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            if line.strip():
                self._records.append(parse_record(line))
        except AgqError as error:
            self.problems.append(f"{self.path}, line {self._lines}: {error}")

    def append(self, record: Record) -> bool:
        """Add a record and return whether it was: one that is there already is not added again.

        Raises
        ------
        AgqError
            If it cannot be written; the file is as it was then.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as file:
                self._read_on(file)
                if any(record.key == other.key for other in self._records):
                    return False
                self._write(file, record.line())
                self._read_on(file)
                return True
        except OSError as error:
            raise write_error(error, self.path) from error

    def replace(self, choose) -> int:
        """Let `choose` say which records stay, and return how many went; lines that are no records go, too.

        Parameters
        ----------
        choose : callable
            ``f(records) -> records``.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as file:
                self._read_on(file)
                stay = list(choose(list(self._records)))
                gone = len(self._records) - len(stay)
                write_text(self.path, b"".join(record.line() for record in stay).decode())
        except OSError as error:
            raise write_error(error, self.path) from error
        self.read()
        return gone

    def _write(self, file, line: bytes) -> None:
        """Write one line where the whole lines end, or nothing."""
        start = self._read_to
        if start:
            file.seek(start - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        try:
            os.ftruncate(file.fileno(), start)
            os.lseek(file.fileno(), start, os.SEEK_SET)
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]
            os.fsync(file.fileno())
        except BaseException:
            os.ftruncate(file.fileno(), start)
            raise
        file.seek(start)

    @contextmanager
    def _locked(self) -> Iterator:
        """Open the file for reading and writing, no one else between; it may have been replaced while waiting."""
        while True:
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if self._is_current(file):
                    yield file
                    return

    def _is_current(self, file) -> bool:
        try:
            return os.fstat(file.fileno()).st_ino == os.stat(self.path).st_ino
        except FileNotFoundError:
            return False


def _is_record(line: bytes) -> bool:
    try:
        parse_record(line)
        return True
    except AgqError:
        return False


def _anything(_decisions: dict) -> bool:
    return True


class Library:
    """The records of one device, from several libraries; what is new goes into the first.

    Parameters
    ----------
    *directories : path-like
        Of libraries, the writable one first.
    device : str
    """

    def __init__(self, *directories: str | os.PathLike, device: str):
        if not _DEVICE.fullmatch(device):
            raise AgqError(f"{device!r} is no name of a device: lower-case letters, digits and dashes")
        self.device = device
        self.files = [RecordFile(Path(directory) / device / RECORDS) for directory in directories]

    @property
    def problems(self) -> list[str]:
        """Lines that were left out, and why."""
        return [problem for file in self.files for problem in file.problems]

    def read(self) -> list[Record]:
        """Return all records."""
        return [record for file in self.files for record in file.read()]

    def append(self, record: Record) -> bool:
        """Add a record to the first library, see `RecordFile.append`."""
        return self.files[0].append(record)

    def of_task(self, task: str) -> list[Record]:
        """Return the records of a task, failures among them."""
        return [record for record in self.read() if record.task == task]

    def best(self, task: str, allows: Callable[[dict], bool] = _anything) -> Record | None:
        """Return the best record of a task; measured ones come before simulated ones, failures never.

        Parameters
        ----------
        task : str
        allows : callable, optional
            ``f(decisions) -> bool``: whether the kernel's space has that point, which a file cannot be trusted with.
        """
        return best_of(record for record in self.of_task(task) if allows(record.decisions)).get(task)

    def nearest(
        self,
        kernel: dict,
        instruction_set: str,
        threads: int,
        version: int,
        allows: Callable[[dict], bool] = _anything,
    ) -> list[Record]:
        """Return the best records of the tasks most like a kernel, the nearest first.

        Parameters
        ----------
        kernel : dict
            Its description.
        instruction_set : str
        threads : int
        version : int
            Of the kernel's design space.
        allows : callable, optional
            As for `best`.
        """
        near = []
        for record in self.read():
            same = record.instruction_set == instruction_set and record.kernel_version == version
            if same and distance(record, kernel, threads) <= _FARTHEST and allows(record.decisions):
                near.append(record)
        best = best_of(near).values()
        return sorted(best, key=lambda record: (distance(record, kernel, threads), record.rank))


def distance(record: Record, kernel: dict, threads: int) -> float:
    """Return how far a record's kernel is from another: doublings of its sizes and threads; else infinity."""
    other, total = record.kernel, 0.0
    if other.keys() != kernel.keys():
        return math.inf
    for name, value in kernel.items():
        if name not in _SIZES or type(value) is not int or type(other[name]) is not int:
            if other[name] != value:
                return math.inf
        elif min(value, other[name]) < 1 or (name == "rows" and (value == 1) != (other[name] == 1)):
            return math.inf
        else:
            total += abs(math.log2(value / other[name]))
    measured_with = record.provenance.get("threads")
    if type(measured_with) is not int or measured_with < 1:
        return math.inf
    return total + abs(math.log2(threads / measured_with))


def best_of(records: Iterable[Record]) -> dict[str, Record]:
    """Return the best record of each task that has a usable one."""
    best: dict[str, Record] = {}
    for record in records:
        if record.usable and (record.task not in best or record.rank < best[record.task].rank):
            best[record.task] = record
    return best


def shipped_directory() -> Path:
    """Return the library that comes with the package: beside its modules in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "schedules"
    return inside if inside.is_dir() else package.parent / "schedules"


def user_directory() -> Path:
    """Return the user's own library, which need not exist."""
    root = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(root).expanduser() / "agq_tvm" / "schedules"


def open_library(device: str, directory: str | os.PathLike | None = None) -> Library:
    """Return a device's records: the library in `directory`, by default the user's, and with it the shipped one."""
    return Library(directory or user_directory(), shipped_directory(), device=device)


def devices_in(directory: str | os.PathLike) -> list[str]:
    """Return the names of the devices that a library has records for."""
    return sorted(path.parent.name for path in Path(directory).glob(f"*/{RECORDS}") if path.is_file())
