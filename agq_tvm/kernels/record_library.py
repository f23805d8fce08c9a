"""The library of tuned schedules: a directory with a folder for each device, and a file of records in that.

Nothing here needs TVM.
"""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.kernels.record import MEASURED, Record, best_of
from agq_tvm.kernels.record_file import RECORDS, RecordFile

_DEVICE = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_SIZES = ("rows", "columns", "channels", "context", "heads", "kv_heads")
"""Fields of a description in which the kernel of a nearest record may differ, rows only within decode or prefill."""
_FARTHEST = 3.0


def _anything(_) -> bool:
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

        What was measured on a processor that the first library has measurements of comes before the rest: it is of
        one's own devices, and devices of one name may have different processors.

        Parameters
        ----------
        task : str
        allows : callable, optional
            ``f(decisions) -> bool``: whether the kernel's space has that point, which a file cannot be trusted with.
        """
        return self._best_of_each(lambda each: each.task == task and allows(each.decisions)).get(task)

    def nearest(
        self,
        kernel: dict,
        instruction_set: str,
        threads: int,
        version: int,
        accepts: Callable[[Record], bool] = _anything,
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
        accepts : callable, optional
            ``f(record) -> bool``: asked of those alone that are near.
        """

        def is_near(record: Record) -> bool:
            same = record.instruction_set == instruction_set and record.kernel_version == version
            return same and distance(record, kernel, threads) <= _FARTHEST and accepts(record)

        best = self._best_of_each(is_near).values()
        return sorted(best, key=lambda record: (distance(record, kernel, threads), record.rank))

    def _best_of_each(self, accepts: Callable[[Record], bool]) -> dict[str, Record]:
        """Return the best of the accepted records of each task; what one's own processors have measured comes first."""
        own = {record.cpu for record in self.files[0].read() if record.how == MEASURED}
        accepted = [record for record in self.read() if record.usable and accepts(record)]
        return best_of(accepted) | best_of(each for each in accepted if each.how == MEASURED and each.cpu in own)


def distance(record: Record, kernel: dict, threads: int) -> float:
    """Return how far a record's kernel is from another: doublings of its sizes and threads; else infinity."""
    other, total = record.kernel, 0.0
    if other.keys() != kernel.keys():
        return math.inf
    for name, value in kernel.items():
        if type(value) is not type(other[name]):
            return math.inf
        if name not in _SIZES or type(value) is not int:
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
