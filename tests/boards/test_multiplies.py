"""All pairs of codes, and sums at their bounds and beyond, on emulated boards."""

import numpy as np
import pytest
import tvm

from tests.boards import kernels
from tests.kernels.multiplies import build_all, check_bounds, check_pairs
from tests.kernels.operands import DEVICES

pytestmark = pytest.mark.emulator


@pytest.mark.parametrize("isa", ["neon", "dotprod", "i8mm"])
def test_every_pair_is_right_and_overflow_is_real(boards, tmp_path, isa):
    path = kernels.library(tvm.IRModule(build_all(isa)), DEVICES[isa], tmp_path, "multiplies.so")
    with boards.session(DEVICES[isa]) as session:
        session.upload(path)
        loaded = [session.load_module("multiplies.so")]

        def tensor(array: np.ndarray):
            return tvm.runtime.tensor(array, session.cpu(0))

        def function(name: str):
            def call(*operands):
                there = [tensor(operand.numpy()) for operand in operands]
                loaded[0][name](*there)
                operands[-1].copyfrom(there[-1].numpy())

            return call

        check_pairs(isa, lambda name: loaded[0][name], tensor)
        check_bounds(isa, function)
        loaded.clear()
