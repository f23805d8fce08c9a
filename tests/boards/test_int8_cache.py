"""Attention over int8 caches on emulated boards: codes bit for bit, by `sdot` or by multiply-adds."""

import numpy as np
import pytest
import tvm

from agq_tvm.targets import load_device
from tests.boards import kernels
from tests.boards.conftest import DEVICES
from tests.kernels.test_attention_int8 import Case

pytestmark = pytest.mark.emulator


@pytest.mark.parametrize("device", DEVICES)
def test_codes_and_result(boards, tmp_path, device):
    with boards.session(device) as session:
        loaded = []

        def function(func, _isa):
            """Compile a kernel for the board, and return what calls it there."""
            name = str(func.attrs["global_symbol"])
            path = kernels.library(tvm.IRModule({name: func}), device, tmp_path, f"{name}.so")
            session.upload(path)
            loaded.append(session.load_module(f"{name}.so"))

            def call(*operands):
                there = [tvm.runtime.tensor(operand.numpy(), session.cpu(0)) for operand in operands]
                loaded[-1][name](*there)
                for here, result in zip(operands, there, strict=True):
                    here.copyfrom(result.numpy())

            return call

        isa = load_device(device).instruction_set
        for shape in ((8, 6, 2, 16, 48, 21, 5), (1, 4, 1, 64, 48, 40, 1)):
            case = Case(shape, isa, compiled=function)
            case.append()
            for found, expected in zip(case.caches, (*case.packed(), *case.scales), strict=True):
                np.testing.assert_array_equal(found, expected)
            out, _ = case.expected()
            np.testing.assert_allclose(case.out, out, rtol=0, atol=2e-4 * abs(out).max())
        loaded.clear()
