"""All kernels with a design space, by their descriptions: the spaces, and building a kernel from decisions."""

import dataclasses

from agq_tvm.errors import AgqError
from agq_tvm.kernels import linear, linear_panels, linear_shifted
from agq_tvm.kernels.attrs import annotate
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_shifted import ShiftedKernel
from agq_tvm.kernels.space import Space

KINDS = {kind.__name__: kind for kind in (LinearKernel, ShiftedKernel)}
"""Descriptions of kernels, by the name of their class."""
_VERSIONS = {"LinearKernel": 1, "ShiftedKernel": 1}
"""Raised whenever decisions come to mean something else, or a kernel's space or its default changes."""


def space_of(kernel, isa: InstructionSet, threads: int = 1) -> Space | None:
    """Return the design space of a kernel, None if there is nothing to decide.

    Parameters
    ----------
    kernel : one of `KINDS`
    isa : InstructionSet
    threads : int
        That it runs on.
    """
    if not isinstance(kernel, LinearKernel) or linear_panels.loop_for(kernel, isa):
        return None
    space = linear.space(kernel, isa, threads)
    return space if space.size > 1 else None


def build(kernel, isa: InstructionSet, decisions: dict[str, int] | None = None):
    """Return a kernel's PrimFunc, annotated with its description.

    Parameters
    ----------
    kernel : one of `KINDS`
    isa : InstructionSet
    decisions : dict, optional
        A point of the kernel's design space; the default if None.

    Raises
    ------
    AgqError
        If the decisions are no point of the space.
    """
    if decisions is not None:
        space = space_of(kernel, isa)
        if space is None:
            raise AgqError(f"{kernel.name} has nothing to decide on {isa.name}: leave the decisions out")
        space.check(decisions)
    if isinstance(kernel, ShiftedKernel):
        return annotate(linear_shifted.build(kernel, isa), kernel)
    return annotate(linear.build(kernel, isa, decisions), kernel)


def version_of(kernel) -> int:
    """Return the version of a kernel's design space: what was tuned with another one means nothing now."""
    return _VERSIONS[type(kernel).__name__]


def task_name(kernel, isa: InstructionSet, threads: int) -> str:
    """Return what tuning calls a kernel, e.g. ``linear_…_m128_n4096_k4096.avx512vnni.u4_v4x16_k4.t2.v1``."""
    layout = isa.layout(getattr(kernel, "bits", 8)).name
    return f"{kernel.name}.{isa.name}.{layout}.t{threads}.v{version_of(kernel)}"


def describe(kernel) -> dict:
    """Return a kernel's description as plain values, from which `described` makes it again."""
    return {"class": type(kernel).__name__, **dataclasses.asdict(kernel)}


def described(description: dict, isa: InstructionSet):
    """Return the kernel of a description.

    Raises
    ------
    AgqError
        If there is no such kernel.
    """
    fields = dict(description)
    name = fields.pop("class", None)
    try:
        return KINDS[name](**fields)
    except (KeyError, TypeError):
        raise AgqError(f"{description} describes no kernel that can be tuned") from None
