"""What this machine can do at best: reading memory, and multiplying bytes in registers.

Both are kernels that TVM compiles for the same target as what is compared with them, so that nothing but the
processor is measured. They are timed in short rounds between the rounds of the kernels under test.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from agq_tvm.kernels.emit import task_loop
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.runtime.huge_pages import collapse
from agq_tvm.runtime.threads import Threads
from agq_tvm.runtime.virtual_machine import aligned
from agq_tvm.targets import Device, load_device
from agq_tvm.tuning.clock import seconds
from agq_tvm.tvm_seam import IRBuilder, T, Target, tirx, tvm

READ_BYTES = 256 << 20
"""Eight times a large last-level cache."""
LANES = 16
"""int32 values of one load: 64 bytes, which LLVM splits where registers are narrower."""
STREAMS = 8
"""Loads, each with a sum of its own, in one step of a loop."""
STEPS = 64
"""Vectors of activations that the multiply loop goes through: they stay in the first cache."""
WEIGHTS = 4
"""Vectors of weights that it keeps in registers."""
_OFTEN = 4
"""Multiply-accumulates of floats for each byte out of memory beyond which memory is not what bounds them."""
_ROUNDS = 15
"""Of which the best is taken as the limit of candidates: other programs only ever make a round slower."""


def read_kernel(size: int, threads: int):
    """Return a PrimFunc that reads `size` bytes once and adds them up.

    Buffers: data int32 [threads, steps, STREAMS, LANES]; sums int32 [threads, STREAMS, LANES] (output), the sums
    over the steps, which wrap around.
    """
    steps = size // (threads * STREAMS * LANES * 4)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("read")
            T.func_attr({"global_symbol": "read", "tirx.noalias": True})
            data = T.arg("data", T.buffer((threads, steps, STREAMS, LANES), "int32"))
            sums = T.arg("sums", T.buffer((threads, STREAMS, LANES), "int32"))
            with task_loop("read_part", threads, [data], [sums]) as part:
                totals = T.sblock_alloc_buffer((STREAMS, LANES), "int32", scope="local")
                for j in range(STREAMS):
                    _store(totals, [j], LANES, T.broadcast(T.int32(0), LANES))
                with T.serial(steps) as step:
                    for j in range(STREAMS):
                        value = data.vload([part, step, j, 0], f"int32x{LANES}")
                        _store(totals, [j], LANES, totals.vload([j, 0], f"int32x{LANES}") + value)
                for j in range(STREAMS):
                    _store(sums, [part, j], LANES, totals.vload([j, 0], f"int32x{LANES}"))
    return builder.get()


def multiply_kernel(isa: InstructionSet, rounds: int, threads: int = 1):
    """Return a PrimFunc that does nothing but the multiply-accumulates of an instruction set, on each thread.

    Sixteen independent totals (eight where there are 16 registers), as a Xeon has two units that take five cycles:
    weights stay in registers, activations come from the first cache, one load for four multiplies.

    Buffers: w uint8 or int8 [WEIGHTS, B], x int8 [STEPS, B], B the bytes of a vector; totals of the multiply's type
    [threads, X, WEIGHTS, lanes] (output), where total [t, i, v] gets the products of w[v] with every X-th x from i
    on.
    """
    multiply, layout = isa.multiply_4bit, isa.layout_4bit
    size, at_once = layout.lanes * layout.depth, activations_at_once(isa)
    lanes = multiply.total_lanes or layout.lanes
    kind = f"{multiply.total}x{lanes}"
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("multiply")
            T.func_attr({"global_symbol": "multiply", "tirx.noalias": True})
            w = T.arg("w", T.buffer((WEIGHTS, size), "uint8"))
            x = T.arg("x", T.buffer((STEPS // at_once * at_once, size), "int8"))
            out = T.arg("out", T.buffer((threads, at_once, WEIGHTS, lanes), multiply.total))
            with task_loop("multiply_all", threads, [w, x], [out]) as part:
                totals = T.sblock_alloc_buffer((at_once, WEIGHTS, lanes), multiply.total, scope="local")
                tile = [(i, v) for i in range(at_once) for v in range(WEIGHTS)]
                for i, v in tile:
                    _store(totals, [i, v], lanes, T.broadcast(tirx.const(0, multiply.total), lanes))
                with T.serial(rounds), T.serial(STEPS // at_once) as step:
                    for i, v in tile:
                        value = multiply.accumulate(
                            totals.vload([i, v, 0], kind),
                            w.vload([v, 0], f"uint8x{size}"),
                            x.vload([step * at_once + i, 0], f"int8x{size}"),
                        )
                        _store(totals, [i, v], lanes, value)
                for i, v in tile:
                    _store(out, [part, i, v], lanes, totals.vload([i, v, 0], kind))
    return builder.get()


def activations_at_once(isa: InstructionSet) -> int:
    """Return X, how many vectors of activations the multiply loop handles together."""
    return 2 if isa.name in ("avx2", "avxvnni") else 4


def _store(buffer, index: list, lanes: int, value) -> None:
    T.buffer_store(buffer, value, [*index, slice(0, lanes)])


def compiled(func, device: Device) -> tuple[Callable, str]:
    """Compile one PrimFunc: something to call, and its assembly."""
    name = str(func.attrs["global_symbol"])
    library = tvm.compile(tvm.IRModule({name: func}), target=Target(device.tvm_target()))
    return library[name], library.mod.inspect_source("asm")


@dataclass(frozen=True)
class Limit:
    """A kernel at the limit, ready to be timed.

    Attributes
    ----------
    run : callable
        Runs it once.
    work : float
        Bytes read, or operations (two for a multiply-accumulate), in one run.
    """

    run: Callable[[], None]
    work: float

    def rate(self) -> float:
        """Time one run: GB/s or GOP/s."""
        return self.work / seconds(self.run) / 1e9


def from_numpy(array: np.ndarray):
    """Give TVM a view of an array."""
    return tvm.runtime.from_dlpack(array)


def memory_limit(threads: int = 1, size: int = READ_BYTES, device: Device | None = None) -> Limit:
    """Prepare reading `size` bytes of distinct memory with `threads` threads of TVM's pool."""
    function, _ = compiled(read_kernel(size, threads), device or load_device("host"))
    shape = (threads, size // (threads * STREAMS * LANES * 4), STREAMS, LANES)
    data = aligned(shape, "int32")
    data.reshape(-1)[:] = np.arange(data.size, dtype="int32")
    collapse(data)
    tensors = from_numpy(data), from_numpy(aligned((threads, STREAMS, LANES), "int32"))
    return Limit(lambda: function(*tensors), data.nbytes)


def multiply_limit(rounds: int = 16000, device: Device | None = None, threads: int = 1) -> Limit | None:
    """Prepare the multiply loop on each thread; None where an instruction set has no multiply of its own."""
    device = device or load_device("host")
    isa = instruction_set(device.instruction_set)
    if isa.multiply_4bit is None:
        return None
    function, _ = compiled(multiply_kernel(isa, rounds, threads), device)
    w, x, out = multiply_arrays(isa, threads)
    tensors = [from_numpy(array) for array in (w, x, out)]
    return Limit(lambda: function(*tensors), 2.0 * threads * rounds * len(x) * WEIGHTS * x.shape[1])


def multiply_arrays(isa: InstructionSet, threads: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make the operands of `multiply_kernel`: codes 0..15, activations -127..127, totals."""
    layout, multiply, at_once = isa.layout_4bit, isa.multiply_4bit, activations_at_once(isa)
    size, lanes = layout.lanes * layout.depth, multiply.total_lanes or layout.lanes
    rng = np.random.default_rng(0)
    w = aligned((WEIGHTS, size), "uint8")
    x = aligned((STEPS // at_once * at_once, size), "int8")
    w[:] = rng.integers(0, 16, w.shape)
    x[:] = rng.integers(-127, 128, x.shape)
    return w, x, aligned((threads, at_once, WEIGHTS, lanes), multiply.total)


def measure(limit: Limit, rounds: int = 25) -> tuple[float, float]:
    """Return the median and the best rate of many rounds, after one that is not counted."""
    rates = [limit.rate() for _ in range(rounds + 1)][1:]
    return statistics.median(rates), max(rates)


class Limits:
    """The least that calls of kernels can take on this machine: what it reads and multiplies at best.

    Parameters
    ----------
    device : Device
    """

    def __init__(self, device: Device):
        self._device = device
        self._rates: dict[int, tuple[float, float | None]] = {}

    def __call__(self, task) -> float | None:
        """Return seconds of a `Task`; None where neither memory nor integer products bound it."""
        memory, multiply = self._measured(task.threads)
        integers = hasattr(task.kernel, "activation_bits")
        if not integers and task.macs > _OFTEN * task.cold_bytes:
            return None  # the rate of floats is not measured
        bounds = [task.cold_bytes / memory / 1e9] if task.cold_bytes else []
        if integers and multiply:
            bounds.append(2 * task.macs / multiply / 1e9)
        return max(bounds, default=None)

    def _measured(self, threads: int) -> tuple[float, float | None]:
        """Return GB/s and GOP/s of so many threads, of a pool that has them, as candidates do."""
        if threads not in self._rates:
            memory = memory_limit(threads, device=self._device)
            multiply = multiply_limit(device=self._device, threads=threads)
            with Threads(threads).running():
                best = measure(multiply, _ROUNDS)[1] if multiply else None
                self._rates[threads] = measure(memory, _ROUNDS)[1], best
        return self._rates[threads]
