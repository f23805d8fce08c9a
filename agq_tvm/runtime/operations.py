"""What a model's time goes to, by the kernels that TVM's virtual machine calls."""

import time
from dataclasses import dataclass

_BUILTIN = "vm."


@dataclass(frozen=True)
class Operation:
    """All calls of one kernel.

    Attributes
    ----------
    name : str
    calls : int
    seconds : float
        Of all calls together.
    """

    name: str
    calls: int
    seconds: float


class Watch:
    """What the virtual machine calls before and after each function, if it is set as its instrument.

    The clock is read last before a call and first after it. What is in between of our own is about a microsecond: too
    much to say what the machine's own functions take, which are not counted.
    """

    def __init__(self) -> None:
        self._totals: dict[str, list] = {}
        self._begun = 0.0

    def __call__(self, _function, name: str, before: bool, *_rest) -> None:
        """See TVM's ``VirtualMachine.set_instrument``."""
        now = time.perf_counter()
        if not before and is_kernel(name):
            total = self._totals.setdefault(name, [0, 0.0])
            total[0] += 1
            total[1] += now - self._begun
        self._begun = time.perf_counter()

    def forget(self) -> None:
        """Count anew."""
        self._totals.clear()

    def operations(self) -> list[Operation]:
        """Return what was counted, by falling time."""
        return by_time([Operation(name, *total) for name, total in self._totals.items()])


def is_kernel(name: str) -> bool:
    """Tell whether a function is a kernel, and none of the machine's own."""
    return not name.startswith(_BUILTIN)


def by_time(operations: list[Operation]) -> list[Operation]:
    """Return kernels by falling time."""
    return sorted((each for each in operations if is_kernel(each.name)), key=lambda each: (-each.seconds, each.name))
