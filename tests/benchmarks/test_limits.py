"""The kernels at the limit do the work that they are credited with; how fast is not tested."""

import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.runtime.virtual_machine import aligned
from agq_tvm.targets import load_device
from agq_tvm.tuning import limits
from benchmarks import seconds
from tests.kernels.operands import device_here, native


def run(func, device, arrays) -> str:
    function, assembly = limits.compiled(func, device)
    function(*(limits.from_numpy(array) for array in arrays))
    return assembly


@pytest.mark.parametrize("threads", [1, 2])
def test_read_adds_up_every_byte(threads):
    device, size = load_device("host"), 1 << 16
    data = aligned((threads, size // threads // 512, limits.STREAMS, limits.LANES), "int32")
    data[:] = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, data.shape)
    sums = aligned((threads, limits.STREAMS, limits.LANES), "int32")
    run(limits.read_kernel(size, threads), device, [data, sums])
    assert data.nbytes == size
    np.testing.assert_array_equal(sums, data.sum(1, dtype="int32"))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ["avx512vnni", "avxvnni", "avx2"])
def test_multiply_does_every_product(isa, threads):
    isa, rounds = native(isa), 3
    device = device_here(isa.name)
    w, x, out = limits.multiply_arrays(isa, threads)
    assembly = run(limits.multiply_kernel(isa, rounds, threads), device, [w, x, out])
    _, at_once, _, lanes = out.shape
    # A lane of `out` sums this many neighbouring bytes of a product.
    products = np.einsum("isb,vb->ivb", x.reshape(-1, at_once, x.shape[1]).swapaxes(0, 1).astype("int64"), w)
    expected = rounds * products.reshape(*out.shape[1:3], lanes, -1).sum(-1)
    np.testing.assert_array_equal(out, np.broadcast_to(expected.astype(out.dtype), out.shape))
    assert isa.multiply_4bit.instruction in assembly


@pytest.mark.parametrize("name,register", [("x86-64-avx512vnni", "%zmm"), ("x86-64-avx2", "%ymm")])
def test_read_loads_whole_registers(name, register):
    _, assembly = limits.compiled(limits.read_kernel(1 << 16, 1), load_device(name))
    loads = [line for line in assembly.splitlines() if "vpaddd" in line and "(%r" in line and register in line]
    assert len(loads) >= limits.STREAMS


def test_multiply_keeps_its_totals_in_registers():
    device = load_device("x86-64-avx512vnni")
    _, assembly = limits.compiled(limits.multiply_kernel(instruction_set("avx512vnni"), 3), device)
    multiplies = [line for line in assembly.splitlines() if "vpdpbusd" in line]
    totals = {line.split(",")[-1].strip() for line in multiplies}
    assert len(totals) >= 16
    assert not any("(" in line for line in multiplies)


def test_limits_are_positive():
    assert limits.measure(limits.memory_limit(1, size=1 << 20), rounds=3)[0] > 0
    limit = limits.multiply_limit(rounds=10)
    assert limit is None or limits.measure(limit, rounds=3)[0] > 0


def test_limit_counts_its_work():
    assert limits.memory_limit(1, size=1 << 20).work == 1 << 20
    device = device_here(native("avx512vnni").name)
    # 64 activations of 64 bytes by 4 vectors of weights, ten times.
    assert limits.multiply_limit(rounds=10, device=device).work == 2 * 10 * 64 * 4 * 64


def test_seconds_does_not_count_waiting():
    assert seconds(lambda: time.sleep(0.2)) < 0.1


def test_measure_gives_median_and_best(monkeypatch):
    times = iter([9.0, 1.0, 2.0, 4.0])  # the first is not counted
    monkeypatch.setattr(limits, "seconds", lambda run: next(times))
    assert limits.measure(limits.Limit(lambda: None, 4e9), rounds=3) == (2.0, 4.0)


def test_limits_of_candidates_are_those_of_their_threads(monkeypatch):
    """TVM's pool, left alone, has a thread for every second processor: two threads would seem to be as slow as one."""
    counts, seen = [0], []

    class Pool:
        def __init__(self, count):
            self.count = count

        @contextmanager
        def running(self):
            counts.append(self.count)
            yield
            counts.pop()

    def measured(limit, rounds):
        seen.append((limit, counts[-1]))
        return 1.0, {"memory": 2.0, "multiply": 8.0}[limit]

    monkeypatch.setattr(limits, "Threads", Pool)
    monkeypatch.setattr(limits, "measure", measured)
    monkeypatch.setattr(limits, "memory_limit", lambda threads, device: "memory")
    monkeypatch.setattr(limits, "multiply_limit", lambda device, threads: "multiply")
    at_best = limits.Limits(load_device("host"))
    task = SimpleNamespace(threads=2, cold_bytes=4e9, macs=4e9, kernel=SimpleNamespace(activation_bits=8))
    assert at_best(task) == 2.0
    task.macs = 16e9
    assert at_best(task) == 4.0
    task.kernel = SimpleNamespace()
    assert at_best(task) == 2.0  # floats, 4 for each byte
    task.macs = 17e9
    assert at_best(task) is None
    assert sorted(seen) == [("memory", 2), ("multiply", 2)]  # once for each number of threads
