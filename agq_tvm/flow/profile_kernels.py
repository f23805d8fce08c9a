"""Timing kernels on this machine or on a board, as a model calls them: by TVM's virtual machine, weights cold."""

import math
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agq_tvm.flow.profile_operands import Kernel
from agq_tvm.passes.pipeline import lowering
from agq_tvm.progress import progress
from agq_tvm.targets import Device
from agq_tvm.targets.link import exporter
from agq_tvm.tvm_seam import Target, relax, tvm

_LIBRARY = "profile.so"
_CALLS = 8
_GROUP = 32
_MOST_COPIES = 512


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes
    ----------
    seconds : float
        The median over repeats.
    spread : float
        Half the distance between the quartiles.
    """

    seconds: float
    spread: float


@dataclass(frozen=True)
class Effort:
    """How thoroughly kernels are timed.

    Attributes
    ----------
    repeats : int
        Their median counts.
    milliseconds : int
        Of one repeat, at least.
    cold_bytes : int
        Weights are read from copies that have so many bytes together, in turn: more than caches hold.
    """

    repeats: int = 9
    milliseconds: int = 20
    cold_bytes: int = 16 << 20


ONCE = Effort(repeats=1, milliseconds=0, cold_bytes=0)
"""Enough to see that kernels run."""


class Place:
    """Where kernels run.

    Parameters
    ----------
    device : Device
    session : tvm.rpc.RPCSession, optional
        A board's; by default kernels run on this machine.
    """

    def __init__(self, device: Device, session=None):
        self.device, self._session = device, session
        self.cpu = tvm.cpu() if session is None else session.cpu(0)
        self.function = tvm.get_global_func if session is None else session.get_function

    def load(self, executable):
        """Return the library of a built module, there."""
        if self._session is None:
            return executable.jit()
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / _LIBRARY
            executable.export_library(str(path), fcompile=exporter(self.device), workspace_dir=scratch)
            self._session.upload(str(path))
        return self._session.load_module(_LIBRARY)

    def forget(self) -> None:
        """Drop the operands of the last kernel."""
        self.function("vm.builtin.tensor_cache.clear")()


def time_kernels(kernels: Iterable[Kernel], place: Place, effort: Effort) -> dict[str, Timing]:
    """Time kernels and return, by their names, what one call takes.

    A function of several calls is timed, each with the next copy of what is cold. The first call of all, which is
    not counted, finds nothing in a cache.

    Parameters
    ----------
    kernels : iterable of Kernel
        Their names differ.
    place : Place
    effort : Effort
    """
    kernels = list(kernels)
    library = place.load(_build(kernels, place.device, effort))
    machine = relax.VirtualMachine(library, place.cpu)
    rng = np.random.default_rng(0)
    return {
        kernel.name: _time(kernel, machine, place, effort, rng) for kernel in progress(kernels, "timing", unit="kernel")
    }


def _copies(kernel: Kernel, effort: Effort) -> int:
    size = sum(operand.nbytes for operand in kernel.operands if operand.cold)
    return min(_MOST_COPIES, max(1, math.ceil(effort.cold_bytes / size))) if size else 1


def _groups(kernel: Kernel, effort: Effort) -> list[int]:
    """Return how many calls each inner function has: time of TVM's passes grows with the square of their number."""
    copies = _copies(kernel, effort)
    calls = copies if copies > 1 or not effort.milliseconds else _CALLS
    return [min(_GROUP, calls - start) for start in range(0, calls, _GROUP)]


def _build(kernels: list[Kernel], device: Device, effort: Effort):
    """Compile all kernels, each with a function ``time_<name>`` that calls it several times."""
    builder = relax.BlockBuilder()
    for kernel in kernels:
        _add_function(builder, kernel, _groups(kernel, effort))
    with Target(device.tvm_target()) as target:
        lowered = tvm.transform.Sequential(lowering())(builder.get())
        return relax.build(lowered, target, relax_pipeline=None)


def _add_function(builder, kernel: Kernel, groups: list[int]) -> None:
    """Add a function of the operands that all calls share, and of a tuple of cold ones for each group of calls."""
    gvar = builder.add_func(kernel.func, kernel.name)
    inner = {calls: _add_group(builder, gvar, kernel, calls) for calls in set(groups)}
    shared = _shared_variables(kernel)
    cold = [relax.Var(f"cold{i}", _cold_type(kernel, calls)) for i, calls in enumerate(groups)]
    with builder.function(f"time_{kernel.name}", [*shared, *cold]):
        for calls, group in zip(groups, cold, strict=True):
            result = builder.emit(relax.Call(inner[calls], [*shared, group]))
        builder.emit_func_output(result)


def _add_group(builder, gvar, kernel: Kernel, calls: int):
    """Add a function of the shared operands and one tuple of cold ones: for each call those that it takes."""
    shared, cold = _shared_variables(kernel), relax.Var("cold", _cold_type(kernel, calls))
    with builder.function(f"group{calls}_{kernel.name}", [*shared, cold]):
        taken = 0
        for _ in range(calls):
            plain, operands = iter(shared), []
            for operand in kernel.operands:
                if operand.cold:
                    operands.append(builder.emit(relax.TupleGetItem(cold, taken)))
                    taken += 1
                else:
                    operands.append(next(plain))
            result = builder.emit(_call(gvar, kernel, operands))
        return builder.emit_func_output(result)


def _tensor_type(operand):
    return relax.TensorType(operand.shape, operand.dtype)


def _shared_variables(kernel: Kernel) -> list:
    shared = [operand for operand in kernel.operands if not operand.cold]
    return [relax.Var(f"x{i}", _tensor_type(operand)) for i, operand in enumerate(shared)]


def _cold_type(kernel: Kernel, calls: int):
    return relax.TupleType([_tensor_type(operand) for operand in kernel.operands if operand.cold] * calls)


def _call(gvar, kernel: Kernel, operands: list):
    types = [relax.TensorType(shape, dtype) for shape, dtype in kernel.outputs]
    updated = [i for i, operand in enumerate(kernel.operands) if operand.updated]
    if not updated:
        return relax.call_tir(gvar, operands, types if len(types) > 1 else types[0])
    indices, all_types = [*updated, *[-1] * len(types)], [*(operands[i].ty for i in updated), *types]
    return relax.op.call_tir_inplace(gvar, operands, indices, all_types)


def _time(kernel: Kernel, machine, place: Place, effort: Effort, rng: np.random.Generator) -> Timing:
    groups = _groups(kernel, effort)
    arguments = _arguments(kernel, place, groups, rng)
    evaluator = machine.time_evaluator(
        f"time_{kernel.name}", place.cpu, number=1, repeat=effort.repeats, min_repeat_ms=effort.milliseconds
    )
    seconds = [value / sum(groups) for value in evaluator(*arguments).results]
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (0, 0, 0)
    return Timing(statistics.median(seconds), (high - low) / 2)


def _arguments(kernel: Kernel, place: Place, groups: list[int], rng: np.random.Generator) -> list:
    """Put a kernel's operands where it runs; copies of cold ones are made there, a tuple for each group of calls."""
    tensors = [tvm.runtime.tensor(operand.array(rng), place.cpu) for operand in kernel.operands]
    shared = [tensor for tensor, operand in zip(tensors, kernel.operands, strict=True) if not operand.cold]
    originals = [tensor for tensor, operand in zip(tensors, kernel.operands, strict=True) if operand.cold]
    place.forget()
    update, as_array = (
        place.function(f"vm.builtin.{name}") for name in ("tensor_cache.update", "param_array_from_cache")
    )
    for group, calls in enumerate(groups):
        for i in range(calls * len(originals)):
            update(f"cold{group}_{i}", originals[i % len(originals)].copyto(place.cpu), True)
    counts = [calls * len(originals) for calls in groups]
    return [*shared, *(as_array(f"cold{group}", count) for group, count in enumerate(counts))]
