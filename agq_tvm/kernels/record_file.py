"""The file that holds a device's records, which several processes add to.

Lines are only ever added, each with one write while the file is locked, so that what a program had measured when it
was killed stays. A last line that was torn is not read, and cut off before the next one is added.
"""

import fcntl
import io
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.files import write_bytes, write_error
from agq_tvm.kernels.record import Record, parse_record

RECORDS = "records.jsonl"
_LONGEST_LINE = 1 << 20


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
        self._others: list[bytes] = []
        self._read_to, self._inode, self._lines = 0, None, 0
        self._let_go: Callable[[], object] = lambda: None

    def read(self) -> list[Record]:
        """Return all records; only what was added since the last call is read.

        Raises
        ------
        AgqError
            If there is a file that cannot be read.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                self._read_on(file)
        except FileNotFoundError:
            self._forget()
        except OSError as error:
            raise AgqError(f"cannot read {self.path}: {error.strerror}") from error
        return self._records

    def _forget(self) -> None:
        self._records, self._others, self.problems = [], [], []
        self._read_to, self._inode, self._lines = 0, None, 0
        self._let_go()

    def _hold(self, file) -> None:
        """Keep the file open that is read: while it is, none that replaces it gets the number of its inode."""
        held = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
        self._let_go = weakref.finalize(self, os.close, held)
        self._inode = os.fstat(held).st_ino

    def _read_on(self, file) -> None:
        status = os.fstat(file.fileno())
        if status.st_ino != self._inode or status.st_size < self._read_to:
            self._forget()
            self._hold(file)
        file.seek(self._read_to)
        lines = io.BufferedReader(file)
        try:
            self._read_lines(lines)
        finally:
            lines.detach()

    def _read_lines(self, lines: io.BufferedReader) -> None:
        while line := lines.readline(_LONGEST_LINE + 1):
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
            self._others.append(line.rstrip(b"\n") + b"\n")

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
        """Let `choose` say which records stay, and return how many went.

        Lines that are no records stay, at the end: a later version of this program may have written them.

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
                write_bytes(self.path, b"".join([*(record.line() for record in stay), *self._others]))
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
