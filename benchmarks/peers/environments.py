"""Virtual environments of the engines: what is in them, where they are, how they are made."""

import subprocess
import sys
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

from agq_tvm.errors import AgqError
from benchmarks.tables import ROOT

OWN = ""
"""The environment of an engine that runs where we do."""
EXTRAS = {"shared": "peers", "executorch": "peers-executorch"}
"""The extra of pyproject.toml that each environment holds."""
_ASK_VERSION = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"


def requirements(environment: str) -> list[str]:
    """Return what an environment holds, as pyproject.toml pins it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"][EXTRAS[environment]]


def interpreter(work: Path, environment: str) -> str:
    """Return the Python of an environment: ours if it is our own, or if there is no such environment."""
    python = work.absolute() / environment / "bin" / "python"  # not resolved: the link is what makes the environment
    return str(python) if environment and python.exists() else sys.executable


def installed_version(work: Path, engine: ModuleType) -> str | None:
    """Return the version of an engine's package; None if it is not installed."""
    python = interpreter(work, engine.ENVIRONMENT)
    if python == sys.executable:
        try:
            return distribution(engine.PACKAGE).version
        except PackageNotFoundError:
            return None
    result = subprocess.run([python, "-c", _ASK_VERSION, engine.PACKAGE], capture_output=True, text=True, timeout=60)
    return result.stdout.strip() or None


def install(work: Path, environment: str) -> None:
    """Make an environment and install what it holds, each requirement by itself.

    Raises
    ------
    AgqError
        Naming what could not be installed, after everything else was.
    """
    path, failed = work / environment, []
    if not (path / "bin" / "python").exists():
        venv.create(path, with_pip=True)
    for requirement in requirements(environment):
        print(f"{environment}: installing {requirement}", file=sys.stderr)
        command = [path / "bin" / "python", "-m", "pip", "install", "--quiet", requirement]
        if subprocess.run(command).returncode:
            failed.append(requirement)
    if failed:
        raise AgqError(f"pip could not install {', '.join(failed)} into {path}: its messages say why")
