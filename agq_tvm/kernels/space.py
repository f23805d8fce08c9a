"""Design spaces: named integer decisions that build the same kernel in different ways.

A kernel's module has a function that makes the space from the kernel's description, and another that builds the kernel
from decisions. What the decisions are called and mean is said there.
"""

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass

from agq_tvm.errors import AgqError


def _anything(_decisions: dict[str, int]) -> bool:
    return True


@dataclass(frozen=True)
class Space:
    """The decisions of one kernel.

    Attributes
    ----------
    choices : dict of str to tuple of int
        What each decision may be.
    default : dict of str to int
        The hand-made point.
    rule : callable
        ``f(decisions) -> bool``: whether choices go together.
    """

    choices: dict[str, tuple[int, ...]]
    default: dict[str, int]
    rule: Callable[[dict[str, int]], bool] = _anything

    def __post_init__(self) -> None:
        self.check(self.default)

    @property
    def size(self) -> int:
        """How many points there are."""
        return len(self.points())

    def allows(self, decisions: dict[str, int]) -> bool:
        """Tell whether decisions are a point of the space."""
        return self._complaint(decisions) is None

    def check(self, decisions: dict[str, int]) -> None:
        """Refuse decisions that are no point of the space.

        Raises
        ------
        AgqError
        """
        complaint = self._complaint(decisions)
        if complaint:
            raise AgqError(f"{complaint}: tune the kernel again, or leave the decisions out to have the default")

    def points(self) -> list[dict[str, int]]:
        """List all points, in the order of the choices."""
        products = itertools.product(*self.choices.values())
        points = (dict(zip(self.choices, values, strict=True)) for values in products)
        return [point for point in points if self.rule(point)]

    def checksum(self) -> str:
        """Return what two spaces have in common if they have the same points, whichever is the default."""
        text = json.dumps(self.points(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _complaint(self, decisions: dict[str, int]) -> str | None:
        missing, unknown = self.choices.keys() - decisions.keys(), decisions.keys() - self.choices.keys()
        if missing or unknown:
            parts = [f"{', '.join(sorted(missing))} missing"] if missing else []
            parts += [f"{', '.join(sorted(unknown))} unknown"] if unknown else []
            return f"decisions do not fit the design space ({'; '.join(parts)})"
        for name, value in decisions.items():
            if value not in self.choices[name]:
                return f"decision {name} = {value} is not one of {', '.join(map(str, self.choices[name]))}"
        if not self.rule(decisions):
            return f"decisions {', '.join(f'{name} = {value}' for name, value in decisions.items())} do not go together"
        return None


def rows_of_task(rows: int) -> tuple[int, ...]:
    """List how many rows of a kernel a thread may take at a time: few or all."""
    return tuple(sorted({*divisors(rows, 8), rows}))


def divisors(number: int, limit: int) -> tuple[int, ...]:
    """List the divisors of a number up to a limit, rising."""
    return tuple(d for d in range(1, min(number, limit) + 1) if number % d == 0)
