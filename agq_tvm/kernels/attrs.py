"""Kernels carry their own description, so that passes need not guess it from loops."""

import dataclasses
import json
from typing import TypeVar

Kernel = TypeVar("Kernel")
ATTRIBUTE = "agq.kernel"


def annotate(func, kernel):
    """Return the PrimFunc with `kernel` (a dataclass) written into its attributes."""
    value = {"class": type(kernel).__name__, **dataclasses.asdict(kernel)}
    return func.with_attr(ATTRIBUTE, json.dumps(value))


def described_as(func, kind: type[Kernel]) -> Kernel | None:
    """Return the description of a PrimFunc if it is of that class."""
    text = func.attrs.get(ATTRIBUTE) if func.attrs else None
    if text is None:
        return None
    value = json.loads(str(text))
    return kind(**value) if value.pop("class") == kind.__name__ else None
