"""Writing files so that a reader never sees half of one, and checking what is read."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agq_tvm.errors import AgqError


@contextmanager
def fresh_directory(path: str | os.PathLike, kind: str) -> Iterator[Path]:
    """Give an empty directory beside `path` that takes its name when the block ends without an error.

    An existing `path` is replaced only if it is empty or an earlier result of the same kind.

    Parameters
    ----------
    path : path-like
        The final name.
    kind : str
        What is written, e.g. ``"bundle"``; a file ``.agq-<kind>`` marks the result as ours to replace.

    Raises
    ------
    AgqError
        If `path` holds something else, or the disk is full or not writable.
    """
    final = Path(path).absolute()
    marker = f".agq-{kind}"
    if final.exists() and not (final.is_dir() and ((final / marker).exists() or not any(final.iterdir()))):
        raise AgqError(f"{path} exists and is not an earlier {kind}: choose another -o, or remove it")
    beside = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        beside.chmod(0o755)
        yield beside
        (beside / marker).touch()
        _replace_directory(beside, final)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _replace_directory(new: Path, final: Path) -> None:
    if not final.exists():
        new.rename(final)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.parent))
    try:
        final.rename(old / "replaced")
        try:
            new.rename(final)
        except OSError:
            (old / "replaced").rename(final)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def write_error(error: OSError, path: str | os.PathLike) -> AgqError:
    """Return an error of the system as one sentence for the user."""
    if error.errno == errno.ENOSPC:
        return AgqError(f"the disk is full while writing {path}: free some space and run it again")
    where = error.filename or path
    return AgqError(f"cannot write {path}: {error.strerror or error} ({where})")


def check_writable(path: str | os.PathLike) -> None:
    """Refuse a file that could not be written, before the work whose result it gets.

    Raises
    ------
    AgqError
    """
    path = Path(path).absolute()
    folder = next(parent for parent in path.parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise AgqError(f"cannot write {path}: it is a folder, or lies where this user may not write")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a small text file under a temporary name, then rename it."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a small file under a temporary name, then rename it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise write_error(error, path) from error


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write `value` as indented JSON under a temporary name, then rename it."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | os.PathLike, what: str) -> dict:
    """Read a JSON object, or say in one sentence why that cannot be done.

    Raises
    ------
    AgqError
        If the file is missing, unreadable, over 64 MiB, not JSON or not an object.
    """
    path = Path(path)
    try:
        if path.stat().st_size > 64 << 20:
            raise AgqError(f"{path} is too large for a {what}: it is not one of ours")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AgqError(f"{path} is missing: {path.parent} is not a {what}") from None
    except OSError as error:
        raise AgqError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise AgqError(f"{path} is not valid JSON ({error}): the {what} is damaged, make it again") from error
    if not isinstance(value, dict):
        raise AgqError(f"{path} is not a JSON object: the {what} is damaged, make it again")
    return value


def sha256_file(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
