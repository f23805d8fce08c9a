"""What is tuned: one kernel of a model, on one device, with one number of threads."""

import functools
from dataclasses import dataclass
from typing import Any

from agq_tvm.errors import AgqError
from agq_tvm.kernels import tunable
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.linear_float import FloatLinearKernel
from agq_tvm.kernels.space import Space
from agq_tvm.targets import Device
from agq_tvm.tuning.operands import operands_of


@dataclass(frozen=True)
class Task:
    """One kernel to tune.

    Attributes
    ----------
    name : str
        Ours, see `agq_tvm.kernels.tunable.task_name`: what records are kept under.
    kernel : dataclass
        The kernel's description.
    isa : str
        Name of the instruction set.
    device : Device
        What candidates are compiled for.
    threads : int
        Threads that the kernel is measured with.
    count : float
        How often a decode step and a prefill of 512 tokens run it, together.
    macs : int
        Multiply-accumulates of one call; 0 where nothing is multiplied.
    bytes : int
        Bytes that one call must read or write at least: each operand once.
    cold_bytes : int
        Those of them that come from memory in every call: weights and caches.
    """

    name: str
    kernel: Any
    isa: str
    device: Device
    threads: int
    count: float = 1
    macs: int = 0
    bytes: int = 0
    cold_bytes: int = 0

    @property
    def instruction_set(self) -> InstructionSet:
        """The instruction set itself; its float form where activations are floats."""
        return instruction_set(self.isa, "none" if isinstance(self.kernel, FloatLinearKernel) else "")

    @property
    def space(self) -> Space:
        """The design space."""
        return _space(self.kernel, self.isa, self.threads)


@functools.lru_cache(maxsize=1024)
def _space(kernel, isa: str, threads: int) -> Space:
    return tunable.space_of(kernel, instruction_set(isa), threads)


def make_task(kernel, isa: str, device: Device, threads: int, count: float = 1) -> Task:
    """Return the task of a kernel; `isa` is the name of its instruction set.

    Raises
    ------
    AgqError
        If there is nothing to tune, or the operands of such kernels are not known.
    """
    task = Task("", kernel, isa, device, threads)
    space = tunable.space_of(kernel, task.instruction_set, threads)
    if space is None:
        raise AgqError(f"nothing is to be decided about {kernel.name}: it cannot be tuned")
    func = tunable.build(kernel, task.instruction_set)
    operands = operands_of(kernel, func)
    size = sum(operand.nbytes for operand in operands)
    cold = sum(operand.nbytes for operand in operands if operand.role == "cold")
    name = tunable.task_name(kernel, task.instruction_set, threads)
    return Task(name, kernel, isa, device, threads, count, macs_of(kernel), size, cold)


def macs_of(kernel) -> int:
    """Return the multiply-accumulates of one call of a kernel."""
    if hasattr(kernel, "columns"):
        return kernel.rows * getattr(kernel, "terms", 1) * kernel.columns * kernel.channels
    if hasattr(kernel, "kv_heads"):
        return 2 * kernel.rows * kernel.heads * kernel.head_dim * kernel.context
    return 0
