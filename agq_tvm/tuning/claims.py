"""Which tuner works on which task, where several share a library: a lock for each task, which ends with its holder."""

import fcntl
import hashlib
import os
from pathlib import Path

from agq_tvm.files import write_error

_FOLDER = ".claims"


class Claims:
    """The tasks that this process works on.

    Parameters
    ----------
    directory : Path
        A device's, in a library.
    """

    def __init__(self, directory: Path):
        self._folder = directory / _FOLDER
        self._held: dict[str, int] = {}

    def claim(self, task: str) -> bool:
        """Take a task; return whether no other process has it."""
        path = self._folder / hashlib.sha256(task.encode()).hexdigest()[:24]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise write_error(error, path) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        self._held[task] = handle
        return True

    def release(self, task: str) -> None:
        """Leave a task to others."""
        os.close(self._held.pop(task))
