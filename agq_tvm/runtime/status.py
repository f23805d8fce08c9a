"""This machine's processor: its name, temperature and clock, as far as Linux tells."""

import platform
from pathlib import Path

_THERMAL = Path("/sys/class/thermal")
_PROCESSORS = Path("/sys/devices/system/cpu")


def processor_name() -> str:
    """Return what the processor is called, or at least its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine_status() -> dict[str, float] | None:
    """Return what is known of ``temperature_celsius`` (the hottest sensor's) and ``clock_hertz`` (the fastest
    processor's), None if nothing is: virtual machines do not tell."""
    temperatures = _numbers(_THERMAL, "thermal_zone*/temp", 1e-3)
    clocks = _numbers(_PROCESSORS, "cpu[0-9]*/cpufreq/scaling_cur_freq", 1e3)
    known = {"temperature_celsius": temperatures, "clock_hertz": clocks}
    return {name: max(values) for name, values in known.items() if values} or None


def _numbers(folder: Path, pattern: str, unit: float) -> list[float]:
    found = []
    for path in folder.glob(pattern):
        try:
            found.append(unit * float(path.read_text()))
        except (OSError, ValueError):  # a sensor that does not answer now
            continue
    return found
