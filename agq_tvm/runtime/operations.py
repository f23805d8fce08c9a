"""What a model's time goes to, by the functions that TVM's virtual machine calls."""

from collections.abc import Iterable
from dataclasses import dataclass

VIRTUAL_MACHINE = "virtual machine"
_BUILTIN = "vm."


@dataclass(frozen=True)
class Operation:
    """One function, or several that are counted as one.

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


def kernels_first(operations: Iterable[Operation]) -> list[Operation]:
    """Return kernels by falling time, then as one what belongs to the virtual machine itself.

    Slices of one tensor for a head, and copies, have names of TVM's; they are listed as they are.
    """
    operations = list(operations)
    builtin = [each for each in operations if each.name.startswith(_BUILTIN)]
    kernels = [each for each in operations if not each.name.startswith(_BUILTIN)]
    rest = Operation(VIRTUAL_MACHINE, sum(each.calls for each in builtin), sum(each.seconds for each in builtin))
    ordered = sorted(kernels, key=lambda each: (-each.seconds, each.name))
    return [*ordered, *([rest] if builtin else [])]
