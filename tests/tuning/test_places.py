"""Where candidates run: this machine."""

import numpy as np
import pytest

from agq_tvm.runtime.virtual_machine import ALIGNMENT
from agq_tvm.tuning.places import Here


@pytest.mark.parametrize("shape, dtype", [((3, 5), "float16"), ((2, 64), "uint8"), ((1 << 21,), "int8")])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_copies_are_equal_apart_and_aligned(shape, dtype, count):
    original = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    copies = Here().copies(original, count)
    assert len(copies) == count
    for number, copy in enumerate(copies):
        assert copy.ctypes.data % ALIGNMENT == 0
        np.testing.assert_array_equal(copy, original)
        copy[...] = number  # would show in the others, if they shared memory
    assert [int(copy.flat[0]) for copy in copies] == list(range(count))
