"""What `agq doctor` looks at: this installation, then the way to boards, each step with what to do about it."""

import dataclasses
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from agq_tvm import __version__
from agq_tvm.errors import AgqError
from agq_tvm.flow.doctor_boards import look_at_boards
from agq_tvm.targets import Device, device_names, load_device
from agq_tvm.targets.link import check_elf, link_shared

_PINNED = ("apache-tvm", "apache-tvm-ffi")
_DISK = 1 << 30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes
    ----------
    name : str
    state : str
        ``"ok"``; ``"wrong"``; ``"note"``, what is worth knowing; or ``"skipped"``.
    found : str
        What is there.
    advice : str
        What to do, if it is wrong.
    """

    name: str
    state: str
    found: str
    advice: str = ""


def diagnose(tracker: str | None = None, key: str | None = None, target: str | None = None) -> Iterator[Check]:
    """Look at everything, one thing after the other.

    Parameters
    ----------
    tracker : str, optional
        ``"HOST:PORT"``; without one only this machine is looked at.
    key : str, optional
        Whose boards are looked at.
    target : str, optional
        The device that the boards should be; by default the one that the key names.

    Yields
    ------
    Check
    """
    yield _versions()
    host = load_device("host")
    yield _try("kernel here", lambda: _kernel_here(host), "install the pinned versions again: pip install -e .")
    yield _try("linker", lambda: _link(load_device("generic-aarch64")), "install ziglang again: pip install ziglang")
    yield _emulator()
    yield _tuning()
    yield _disk()
    if tracker is None:
        yield Check("tracker", "skipped", "no --tracker HOST:PORT was given")
        return
    device = load_device(target or key) if target or key in device_names() else None
    yield from (Check(**check) for check in look_at_boards(tracker, key, device))


def summary_of(checks: list[Check]) -> dict:
    """Return what was found as plain values: ``ok``, and all checks."""
    return {"ok": all(check.state != "wrong" for check in checks), "checks": [dataclasses.asdict(c) for c in checks]}


def _try(name: str, look: Callable[[], str], advice: str) -> Check:
    try:
        return Check(name, "ok", look())
    except AgqError as error:
        return Check(name, "wrong", str(error), advice)
    except Exception as error:  # whatever an installation that is wrong may raise
        first = (str(error).strip().splitlines() or [""])[0]
        return Check(name, "wrong", f"{type(error).__name__}: {first}", advice)


def _versions() -> Check:
    """Compare the two distributions that move together with what this package asks for."""
    pins = dict(
        match.groups()
        for text in metadata.requires("agq_tvm") or []
        if (match := re.fullmatch(r"([\w-]+)==([\w.]+)", text.strip()))
    )
    found, wrong = [f"agq {__version__}"], []
    for name in _PINNED:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = "missing"
        found.append(f"{name} {version}")
        if version != pins.get(name, version):
            wrong.append(f"{name}=={pins[name]}")
    advice = f"pip install {' '.join(wrong)}: other pairs crash when kernels are scheduled" if wrong else ""
    return Check("versions", "wrong" if wrong else "ok", ", ".join(found), advice)


def _kernel_here(device: Device) -> str:
    from agq_tvm.flow.doctor_kernel import small_task
    from agq_tvm.tuning.candidate import export_candidate, make_candidate
    from agq_tvm.tuning.local_measurer import LocalMeasurer
    from agq_tvm.tuning.measure import ONCE

    task = small_task(device)
    with tempfile.TemporaryDirectory() as folder, LocalMeasurer(task, ONCE) as measurer:
        path = Path(folder) / "kernel.so"
        export_candidate(make_candidate(task, None), device, path)
        outcome = measurer.submit(str(path)).result()
    if outcome.message:
        raise AgqError(f"a {device.instruction_set} kernel {outcome.message}")
    return f"a kernel for {device.instruction_set} was compiled and computes the right thing"


def _link(device: Device) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "empty.c", Path(folder) / "empty.so"
        source.write_text("int empty(void) { return 0; }\n")
        link_shared(library, [source], device)
        check_elf(library, device)
    return f"links for {device.machine}"


def _emulator() -> Check:
    from agq_tvm.boards.emulate import find_emulator

    try:
        return Check("emulator", "ok", find_emulator())
    except AgqError as error:
        return Check("emulator", "note", str(error))


def _tuning() -> Check:
    try:
        return Check("tuning", "ok", f"xgboost-cpu {metadata.version('xgboost-cpu')}")
    except metadata.PackageNotFoundError:
        return Check("tuning", "note", "without xgboost only --strategy random tunes: pip install -e '.[tune]'")


def _disk() -> Check:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    found = f"{free >> 20} MB free in {folder}"
    if free < _DISK:
        return Check("disk", "wrong", found, "make room there, or set TMPDIR to a folder that has 1 GB")
    return Check("disk", "ok", found)
