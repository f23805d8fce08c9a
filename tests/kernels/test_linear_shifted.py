"""Integer-only products: numpy, plain TIR and every tensorized kernel agree, bit for bit."""

import numpy as np
import pytest

from agq_tvm.kernels import linear_shifted
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.linear_shifted import ShiftedKernel
from tests.kernels.operands import compiled, runs_here
from tests.kernels.shifted_operands import random_shifted, shifted_corners

NATIVE = ("avx512vnni", "avx2", "generic")
# N is no multiple of any tile; K has a short last block, or is cut into chunks of 5, 6, 7 and 1 blocks.
FORMS = [
    ShiftedKernel(1, 100, 150, "float16"),
    ShiftedKernel(8, 100, 150, None),
    ShiftedKernel(6, 65, 384, "float32"),
    ShiftedKernel(1, 70, 448, None),
    ShiftedKernel(3, 33, 352, None),
    ShiftedKernel(1, 33, 20, "float16"),
    ShiftedKernel(4, 33, 160, None, activation_bits=4),
]


def native(isa: str):
    if not runs_here(isa):
        pytest.skip(f"this processor lacks what {isa} needs")
    return INSTRUCTION_SETS[isa]


@pytest.mark.parametrize("form", ["tensorized", "plain"])
@pytest.mark.parametrize("kernel", FORMS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("isa", NATIVE)
def test_exact_in_integers(isa, kernel, form):
    isa = native(isa)
    func = linear_shifted.define(kernel, isa) if form == "plain" else linear_shifted.build(kernel, isa)
    function = compiled(func, isa.name)
    for name, operands in {"random": random_shifted(kernel, 3, 1), **shifted_corners(kernel)}.items():
        operands = operands.integer_form()
        expected = operands.expected()
        np.testing.assert_array_equal(operands.run(function, isa), expected.astype("float32"), err_msg=name)


@pytest.mark.parametrize("kernel", FORMS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("isa", NATIVE)
def test_scaled_result(isa, kernel):
    isa = native(isa)
    operands = random_shifted(kernel, 4, 3)
    expected = operands.expected()
    got = operands.run(compiled(linear_shifted.build(kernel, isa), isa.name), isa)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * abs(expected).max())
