"""Kernels carry their own description, so that passes need not guess it from loops."""

import dataclasses
import json
from typing import TypeVar

Kernel = TypeVar("Kernel")
ATTRIBUTE = "agq.kernel"


def describe(kernel) -> dict:
    """Return a kernel's description (a dataclass) as plain values, with the name of its class."""
    fields = {field.name: getattr(kernel, field.name) for field in dataclasses.fields(kernel)}
    plain = {name: value.describe() if hasattr(value, "describe") else value for name, value in fields.items()}
    return {"class": type(kernel).__name__, **plain}


def annotate(func, kernel):
    """Return the PrimFunc with the description of `kernel` written into its attributes."""
    return func.with_attr(ATTRIBUTE, json.dumps(describe(kernel)))


def description_of(func) -> dict | None:
    """Return what `annotate` wrote into a PrimFunc, if anything."""
    text = func.attrs.get(ATTRIBUTE) if func.attrs else None
    return None if text is None else json.loads(str(text))


def described_as(func, kind: type[Kernel]) -> Kernel | None:
    """Return the description of a PrimFunc if it is of that class."""
    value = description_of(func)
    return kind(**value) if value and value.pop("class") == kind.__name__ else None
