"""8-bit weights of linears, and float activations, on emulated boards."""

import numpy as np
import pytest
import tvm

from agq_tvm.kernels import linear, linear_float
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_float import float_form
from agq_tvm.targets import load_device
from tests.boards import kernels
from tests.boards.conftest import BOARDS
from tests.kernels.operands import corner_operands, random_operands
from tests.kernels.test_linear_float import FORMS as FLOAT_FORMS
from tests.kernels.test_linear_float import check

pytestmark = pytest.mark.emulator

# K and N are no multiples of any tile or group.
FORMS = [
    LinearKernel(1, 65, 190, 8, 64, False, None, True),
    LinearKernel(1, 33, 300, 8, 128, True, None, False),
    LinearKernel(6, 65, 300, 8, 128, False, None, False, 4),
    LinearKernel(8, 70, 100, 8, 32, True, None, True),
]


@pytest.mark.parametrize("device", BOARDS)
def test_whole_products(boards, tmp_path, device):
    """Integers are exact at the ends of all ranges, too; float products are those of the dequantized weights."""
    isa = instruction_set(load_device(device).instruction_set)
    functions = {kernel.name: linear.build(kernel, isa) for kernel in FORMS}
    functions |= {kernel.name: linear_float.build(kernel, float_form(isa)) for kernel in FLOAT_FORMS}
    path = kernels.library(tvm.IRModule(functions), device, tmp_path, "weights.so")
    with boards.session(device) as session, kernels.loaded(session, path) as function:
        for kernel in FORMS:
            for name, operands in {"random": random_operands(kernel, 1), **corner_operands(kernel)}.items():
                operands = operands.integer_form()
                got = operands.run(function(kernel.name), isa)
                np.testing.assert_array_equal(got, operands.expected(), err_msg=name)
        for kernel in FLOAT_FORMS:
            check(kernel, isa.name, function(kernel.name))
