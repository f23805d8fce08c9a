"""Integer-only products on emulated boards: whole products, and their largest sums, exact in integers."""

import numpy as np
import pytest
import tvm

from agq_tvm.kernels import linear_shifted
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.linear_shifted import ShiftedKernel
from tests.boards import kernels
from tests.kernels.operands import DEVICES
from tests.kernels.shifted_operands import random_shifted, shifted_corners
from tests.kernels.test_linear_shifted import at_the_bound

pytestmark = pytest.mark.emulator

FORMS = [
    ShiftedKernel(1, 100, 150, "float16"),
    ShiftedKernel(8, 65, 352, None),
    ShiftedKernel(1, 33, 96, None, activation_bits=4),
    ShiftedKernel(6, 70, 150, "float32", activation_bits=4),
]
BOUND = [at_the_bound(rows)[0] for rows in (1, 2)]


@pytest.fixture(scope="module", params=["neon", "neon-paper", "dotprod", "i8mm"])
def library(request, tmp_path_factory):
    """The instruction set, and a library with all its products."""
    isa = INSTRUCTION_SETS[request.param]
    functions = {
        kernel.name: linear_shifted.build(kernel, isa) for kernel in [*FORMS, *(each.kernel for each in BOUND)]
    }
    folder = tmp_path_factory.mktemp("library")
    return isa, kernels.library(tvm.IRModule(functions), DEVICES[isa.name], folder, "shifted.so")


def test_whole_product_is_exact_in_integers(boards, library):
    isa, path = library
    cases = [("at the bound", operands) for operands in BOUND]
    for kernel in FORMS:
        cases += [("random", random_shifted(kernel, 3, 1)), *shifted_corners(kernel).items()]
    with boards.session(DEVICES[isa.name]) as session, kernels.loaded(session, path) as function:
        for case, operands in cases:
            operands, name = operands.integer_form(), operands.kernel.name
            got, expected = operands.run(function(name), isa), operands.expected().astype("float32")
            np.testing.assert_array_equal(got, expected, err_msg=f"{name}, {case}")
