"""What this machine's processor can do."""

import platform
from collections.abc import Iterable
from pathlib import Path

from agq_tvm.errors import AgqError

# Best first. Names of the device files; the features that they need are in the files.
_CANDIDATES = {
    "x86_64": ("x86-64-xeon", "x86-64-avx512vnni", "x86-64-avxvnni", "x86-64-avx2", "generic-x86-64"),
    "aarch64": ("snapdragon-8-gen-1", "raspberry-pi-5", "raspberry-pi-4", "generic-aarch64"),
}

_VENDORS = {"x86-64-xeon": "GenuineIntel"}
"""Whose processors a device stands for, where others run its code, but another device's faster."""


def machine() -> str:
    """Return this machine's architecture: ``"x86_64"``, ``"aarch64"``, or what ``uname -m`` says."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def parse_cpuinfo(text: str) -> frozenset[str]:
    """Return the CPU features that every core has.

    Parameters
    ----------
    text : str
        Contents of ``/proc/cpuinfo``: ``flags`` lines (x86-64) or ``Features`` lines (AArch64).
    """
    cores = []
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() in ("flags", "Features"):
            cores.append(frozenset(value.split()))
    return frozenset.intersection(*cores) if cores else frozenset()


def cpu_features() -> frozenset[str]:
    """Return the features of this machine's processor, in Linux's names; none if they cannot be read."""
    return parse_cpuinfo(_cpuinfo())


def cpu_vendor() -> str:
    """Return who made this machine's processor, as ``/proc/cpuinfo`` says; "" if it does not."""
    lines = (line.partition(":") for line in _cpuinfo().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "vendor_id"), "")


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def missing_features(device, features: Iterable[str], machine: str) -> list[str]:
    """Return what a machine lacks to run code that was compiled for a device.

    Parameters
    ----------
    device : Device
        The device that the code was compiled for.
    features : iterable of str
        The machine's features, in Linux's names.
    machine : str
        The machine's architecture.

    Returns
    -------
    list[str]
        Names of the missing features, sorted; only the architecture if that is another one; empty if the code
        can run.
    """
    if machine != device.machine:
        return [device.machine]
    return sorted(set(device.required_features) - set(features))


def best_device(machine: str, features: Iterable[str], vendor: str = "") -> str:
    """Return the name of the fastest device whose code runs on a machine.

    Parameters
    ----------
    machine : str
        The machine's architecture.
    features : iterable of str
        Its features, in Linux's names.
    vendor : str
        Who made its processor, if that is known.

    Raises
    ------
    AgqError
        If the architecture is not supported.
    """
    from agq_tvm.targets.device import load_device

    if machine not in _CANDIDATES:
        raise AgqError(f"this machine's architecture {machine!r} is not supported: only {', '.join(_CANDIDATES)}")
    features = frozenset(features)
    for name in _CANDIDATES[machine]:
        others = _VENDORS.get(name, vendor) != vendor
        if not others and not missing_features(load_device(name), features, machine):
            return name
    return _CANDIDATES[machine][-1]
