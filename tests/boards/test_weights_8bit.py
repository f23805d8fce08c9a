"""8-bit weights of linears on emulated boards: whole products, exact, at the ends of all ranges too."""

import numpy as np
import pytest
import tvm

from agq_tvm.kernels import linear
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.targets import load_device
from tests.boards import kernels
from tests.boards.conftest import DEVICES
from tests.kernels.operands import corner_operands, random_operands

pytestmark = pytest.mark.emulator

# K and N are no multiples of any tile or group.
FORMS = [
    LinearKernel(1, 65, 190, 8, 64, False, None, True),
    LinearKernel(1, 33, 300, 8, 128, True, None, False),
    LinearKernel(6, 65, 300, 8, 128, False, None, False, 4),
    LinearKernel(8, 70, 100, 8, 32, True, None, True),
]


@pytest.mark.parametrize("device", DEVICES)
def test_whole_product_is_exact_in_integers(boards, tmp_path, device):
    isa = instruction_set(load_device(device).instruction_set)
    module = tvm.IRModule({kernel.name: linear.build(kernel, isa) for kernel in FORMS})
    path = kernels.library(module, device, tmp_path, "weights.so")
    with boards.session(device) as session:
        session.upload(path)
        loaded = [session.load_module("weights.so")]
        for kernel in FORMS:

            def function(*operands, name=kernel.name):
                there = [tvm.runtime.tensor(operand.numpy(), session.cpu(0)) for operand in operands]
                loaded[0][name](*there)
                operands[-1].copyfrom(there[-1].numpy())

            for name, operands in {"random": random_operands(kernel, 1), **corner_operands(kernel)}.items():
                operands = operands.integer_form()
                np.testing.assert_array_equal(operands.run(function, isa), operands.expected(), err_msg=name)
        loaded.clear()
