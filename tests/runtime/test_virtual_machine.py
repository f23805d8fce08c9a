"""Calling compiled functions without TVM's compiler and without copies."""

import subprocess
import sys

import numpy as np
import pytest

from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.engine import Engine, LocalSession
from agq_tvm.runtime.virtual_machine import ALIGNMENT, aligned

RUN = """
import sys
from agq_tvm.runtime.generate import generate
text = generate(sys.argv[1], "Once upon a time", limit=3, threads=1)
loaded = {"torch", "tvm", "safetensors", "transformers"} & set(sys.modules)
assert not loaded, loaded
assert text["generated_tokens"] == 3
import tvm
assert tvm.target.Target("llvm") and tvm.get_global_func("runtime.config_threadpool")
"""


def test_generating_loads_neither_the_compiler_nor_torch(tiny_bundle):
    done = subprocess.run([sys.executable, "-c", RUN, str(tiny_bundle)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_logits_stay_when_the_next_ones_come(tiny_bundle):
    bundle = Bundle(tiny_bundle)
    engine = Engine(bundle, LocalSession(bundle, threads=1))
    first = engine.decode(3)
    copy = first.copy()
    others = [engine.decode(token) for token in (4, 5)]
    np.testing.assert_array_equal(first, copy)
    assert not np.array_equal(others[0], others[1])


@pytest.mark.parametrize("shape, dtype", [((1,), "int32"), ((3, 5), "float16"), ((2, 64), "int8")])
def test_aligned_arrays(shape, dtype):
    array = aligned(shape, dtype)
    assert array.shape == shape and array.dtype == dtype and not array.any()
    assert array.ctypes.data % ALIGNMENT == 0
