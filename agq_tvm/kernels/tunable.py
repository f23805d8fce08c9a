"""All kernels with a design space, by their descriptions: the spaces, and building a kernel from decisions."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from agq_tvm.errors import AgqError
from agq_tvm.kernels import (
    activation,
    attention,
    attention_space,
    linear,
    linear_dense,
    linear_float,
    linear_grid,
    linear_panels,
    linear_shifted,
    linear_space,
    norm,
)
from agq_tvm.kernels.activation import QuantizeKernel
from agq_tvm.kernels.attention_form import AttentionKernel, described_form
from agq_tvm.kernels.attrs import annotate
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_dense import DenseKernel
from agq_tvm.kernels.linear_float import FloatLinearKernel, float_form
from agq_tvm.kernels.linear_grid import GridKernel
from agq_tvm.kernels.linear_shifted import ShiftedKernel
from agq_tvm.kernels.norm import LayerNormKernel
from agq_tvm.kernels.space import Space

CONTEXTS = (256, 1024, 4096)
"""Lengths of the context that attention is tuned for."""
_MANY = 2
"""Threads with which all decisions are open."""


@dataclass(frozen=True)
class _Kind:
    """One class of kernels.

    Attributes
    ----------
    description : type
    space : callable
        ``f(kernel, isa, threads) -> Space``
    build : callable
        ``f(kernel, isa, decisions) -> PrimFunc``
    version : int
        Raised whenever decisions come to mean something else, or the space or its default changes.
    """

    description: type
    space: Callable
    build: Callable
    version: int


def _linear_space(kernel: LinearKernel, isa: InstructionSet, threads: int) -> Space:
    module = linear_panels if linear_panels.loop_for(kernel, isa) else linear_space
    return module.space(kernel, isa, threads)


_ALL = (
    _Kind(LinearKernel, _linear_space, linear.build, 4),
    _Kind(ShiftedKernel, linear_shifted.space, linear_shifted.build, 2),
    _Kind(GridKernel, linear_grid.space, linear_grid.build, 3),
    _Kind(DenseKernel, linear_dense.space, linear_dense.build, 1),
    _Kind(
        FloatLinearKernel,
        lambda kernel, isa, threads: linear_float.space(kernel, float_form(isa), threads),
        lambda kernel, isa, decisions: linear_float.build(kernel, float_form(isa), decisions),
        1,
    ),
    _Kind(
        QuantizeKernel,
        lambda kernel, isa, threads: activation.space(kernel),
        lambda kernel, isa, decisions: activation.build(kernel, isa.layout_4bit, decisions),
        1,
    ),
    _Kind(
        LayerNormKernel,
        lambda kernel, isa, threads: norm.space(kernel),
        lambda kernel, isa, decisions: norm.build_layer_norm(kernel, decisions),
        1,
    ),
    _Kind(
        AttentionKernel,
        lambda kernel, isa, threads: attention_space.space(kernel, threads),
        lambda kernel, isa, decisions: attention.build_attention(kernel, decisions),
        2,
    ),
)
_KINDS = {kind.description.__name__: kind for kind in _ALL}
KINDS = {name: kind.description for name, kind in _KINDS.items()}
"""Descriptions of kernels, by the name of their class."""
VERSIONS = {name: kind.version for name, kind in _KINDS.items()}
"""Of their design spaces."""


def space_of(kernel, isa: InstructionSet, threads: int = 1) -> Space | None:
    """Return the design space of a kernel, None if there is nothing to decide.

    Parameters
    ----------
    kernel : dataclass
        A description; only those of `KINDS` have spaces.
    isa : InstructionSet
    threads : int
        That it runs on.
    """
    if type(kernel).__name__ not in KINDS:
        return None
    space = _kind(kernel).space(kernel, isa, threads)
    return space if any(len(values) > 1 for values in space.choices.values()) else None


def space_described(description: dict, isa: InstructionSet, threads: int) -> Space | None:
    """Return the design space of a description out of a file; None if it describes nothing that has one."""
    try:
        return space_of(described(description, isa), isa, threads)
    except (AgqError, ArithmeticError, TypeError, ValueError):  # sizes of no kernel: nothing there checks them all
        return None


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
        space = space_of(kernel, isa, _MANY)
        if space is None:
            raise AgqError(f"{kernel.name} has nothing to decide on {isa.name}: leave the decisions out")
        space.check(decisions)
    return annotate(_kind(kernel).build(kernel, isa, decisions), kernel)


def version_of(kernel) -> int:
    """Return the version of a kernel's design space: what was tuned with another one means nothing now."""
    return _kind(kernel).version


def task_name(kernel, isa: InstructionSet, threads: int) -> str:
    """Return what tuning calls a kernel, e.g. ``linear_…_m128_n4096_k4096.avx512vnni.u4_v4x16_k4.t2.v2``."""
    layout = [isa.layout(kernel.bits).name] if isinstance(kernel, LinearKernel | ShiftedKernel | GridKernel) else []
    return ".".join([kernel.name, isa.name, *layout, f"t{threads}", f"v{version_of(kernel)}"])


def specialized(kernel: AttentionKernel, context: int) -> AttentionKernel:
    """Return attention over full caches of that length: it is tuned like this, and has the same decisions."""
    return replace(kernel, context=context, fixed=True)


def described(description: dict, isa: InstructionSet):
    """Return the kernel of a description that `agq_tvm.kernels.attrs.describe` made.

    Raises
    ------
    AgqError
        If there is no such kernel.
    """
    fields = dict(description)
    name = fields.pop("class", None)
    try:
        if "form" in fields:
            fields["form"] = described_form(fields["form"], isa)
        return KINDS[name](**fields)
    except (KeyError, TypeError):
        raise AgqError(f"{description} describes no kernel that can be tuned") from None


def _kind(kernel) -> _Kind:
    return _KINDS[type(kernel).__name__]
