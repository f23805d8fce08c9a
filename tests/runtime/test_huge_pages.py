"""Huge pages: what they hold stays, and they are there where Linux says so."""

import mmap
import platform
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from agq_tvm.runtime.huge_pages import collapse, one_block
from agq_tvm.runtime.virtual_machine import ALIGNMENT

HUGE = 2 << 20


def huge_kilobytes(address: int) -> int:
    """Return what the mapping that holds an address has in huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    return 0


def kernel_collapses() -> bool:
    """Say whether this Linux knows the request, and has huge pages at all."""
    release = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    state = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return release >= (6, 1) and state.exists() and "[never]" not in state.read_text(encoding="ascii")


def small_pages(size: int) -> np.ndarray:
    """Make an array that nobody has asked huge pages for."""
    return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), "uint8")


@pytest.mark.skipif(sys.platform != "linux", reason="a request of Linux")
def test_what_is_collapsed_is_the_same_and_huge():
    array = small_pages(5 * HUGE)
    array[:] = np.random.default_rng(0).integers(0, 256, array.size, "uint8")
    expected = array.copy()
    done = collapse(array)
    np.testing.assert_array_equal(array, expected)
    assert done == kernel_collapses()
    if done:
        assert huge_kilobytes(array.ctypes.data + 2 * HUGE) >= 4 * HUGE >> 10


def test_less_than_a_huge_page_is_left_alone():
    array = np.arange(1000)
    assert not collapse(array)
    np.testing.assert_array_equal(array, np.arange(1000))


def test_arrays_in_one_block_are_equal_apart_and_aligned():
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 100, shape).astype(dtype) for shape, dtype in (((3, 5), "f2"), ((), "i8"), ((HUGE,), "u1"))
    ]
    arrays += arrays[:1] + [np.zeros((0, 4), "f4")]
    copies = one_block(arrays)
    for copy, array in zip(copies, arrays, strict=True):
        assert copy.ctypes.data % ALIGNMENT == 0 and copy.dtype == array.dtype
        np.testing.assert_array_equal(copy, array)
    for number, copy in enumerate(copies):
        copy[...] = number  # would show in the others, if they shared memory
    assert [int(copy.flat[0]) for copy in copies[:-1]] == [0, 1, 2, 3]
    assert one_block([]) == []
