"""The processors of a machine, the best for inference first, as Linux describes them.

Cores count, not hyperthreads: two on one core share its multipliers. Where cores differ, the fastest come first.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SYSTEM = Path("/sys/devices/system/cpu")
_BIG = 0.5
"""Cores below this share of the fastest one's speed would only be waited for."""
_ALIKE = 0.85
"""Those of one kind differ by less: makers allow some of them a higher frequency."""


@dataclass(frozen=True)
class Processor:
    """A logical processor.

    Attributes
    ----------
    number : int
        The kernel's.
    speed : int
        To be compared within a machine: ``cpu_capacity``, else the highest frequency in kHz, else 0.
    sibling : int
        Its place among the processors of its core that may be used; 0 is the first.
    """

    number: int
    speed: int
    sibling: int


def usable_processors(system: Path = SYSTEM, allowed: Iterable[int] | None = None) -> list[Processor]:
    """List the processors that this process may run on, best first.

    Parameters
    ----------
    system : Path
        Where Linux describes them; what it does not say counts as alike.
    allowed : iterable of int, optional
        By default those of the process's affinity.
    """
    numbers = sorted(os.sched_getaffinity(0) if allowed is None else allowed)
    return best_first(
        (
            number,
            _number(system / f"cpu{number}/cpu_capacity"),
            _number(system / f"cpu{number}/cpufreq/cpuinfo_max_freq"),
            _text(system / f"cpu{number}/topology/thread_siblings_list"),
        )
        for number in numbers
    )


def best_first(described: Iterable[tuple[int, int, int, str]]) -> list[Processor]:
    """Order processors: first one of each core, then their siblings; the faster ones first among either.

    Parameters
    ----------
    described : iterable of (number, capacity, frequency, siblings)
        All that may be used: as Linux has them, 0 and "" for what is not known.
    """
    described = list(described)
    numbers = {number for number, *_ in described}
    by_capacity = all(capacity for _, capacity, _, _ in described)
    processors = []
    for number, capacity, frequency, siblings in described:
        place = sum(other < number for other in parse_list(siblings) if other in numbers)
        processors.append(Processor(number, capacity if by_capacity else frequency, place))
    return sorted(processors, key=lambda each: (each.sibling, -each.speed, each.number))


def big_cores(processors: Sequence[Processor]) -> int:
    """Count the cores that inference should run on: those that are not much slower than the fastest."""
    fastest = max(each.speed for each in processors)
    return sum(each.sibling == 0 and each.speed >= _BIG * fastest for each in processors)


def alike(processors: Sequence[Processor], count: int) -> Sequence[Processor]:
    """Return the first `count` processors and, after them, those that are like the last of them.

    Parameters
    ----------
    processors : sequence of Processor
        In the order of `best_first`.
    count : int
        At most as many as there are.
    """
    last = processors[count - 1]
    return [
        each
        for place, each in enumerate(processors)
        if place < count or (each.sibling == last.sibling and each.speed >= _ALIKE * last.speed)
    ]


def processor_quota(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return how many processors' time the control groups of this process allow, at least 1; None for no limit.

    Parameters
    ----------
    groups : Path
        The process's groups, of versions 1 and 2.
    mount : Path
        Where both versions keep their files. In a container it may be the group itself, so all levels are read.
    """
    quotas = []
    for line in _text(groups).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mount / controllers if controllers else mount
        levels = [Path(path.lstrip("/")), *Path(path.lstrip("/")).parents]
        quotas += [_quota(root / level) for level in levels]
    limits = [quota for quota in quotas if quota is not None]
    return max(1, int(min(limits))) if limits else None


def _quota(group: Path) -> float | None:
    quota, period = (*_text(group / "cpu.max").split(), "", "")[:2]
    if not quota:
        quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
    known = quota.isdigit() and period.isdigit() and int(period)
    return int(quota) / int(period) if known else None


def parse_list(text: str) -> list[int]:
    """Return the numbers of a list like ``0-3,8``; none for one that is not well formed."""
    numbers = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            return []
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _number(path: Path) -> int:
    text = _text(path)
    return int(text) if text.isdigit() else 0


def cache_bytes() -> int:
    """Return the size of this machine's largest cache, 0 if Linux does not tell."""
    sizes = [_text(path) for path in SYSTEM.glob("cpu0/cache/index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if re.fullmatch(r"[0-9]+K", size)), default=0)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
