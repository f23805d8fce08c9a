"""Prefill's loops in assembly on emulated boards: whole products of all forms, and the ends of all ranges."""

from dataclasses import replace

import numpy as np
import pytest
import tvm

from agq_tvm.kernels import linear, linear_panels
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.targets import load_device
from tests.boards import kernels
from tests.boards.conftest import BOARDS
from tests.kernels.operands import corner_operands, random_operands

pytestmark = pytest.mark.emulator

# Groups: 5, 4 (a round of 4), 6 (of 2), 20 (more than one panel on a Cortex-A72), 69 (on every board).
FORMS = [
    LinearKernel(8, 100, 150, 4, 32, True, "float16", True),
    LinearKernel(4, 33, 128, 4, 32, True, None, False),
    LinearKernel(4, 33, 128, 4, 32, False, None, False),
    LinearKernel(12, 40, 190, 4, 32, False, "float32", True),
    LinearKernel(8, 65, 620, 4, 32, True, None, True, terms=2),
    LinearKernel(8, 65, 2200, 4, 32, False, "float16", False),
    LinearKernel(8, 65, 2200, 4, 32, True, "float32", False),
    LinearKernel(4, 65, 128, 4, 32, True, "float16", False, 4),
    LinearKernel(8, 33, 620, 4, 32, False, None, True, 4),
    LinearKernel(8, 65, 190, 4, 64, True, "float16", False),
    LinearKernel(8, 65, 300, 4, 128, True, None, False),
    LinearKernel(8, 65, 300, 4, 128, False, None, False),
]


@pytest.fixture
def product(boards, tmp_path, request):
    """Return a function that runs a form's kernel on given operands on the device."""
    device = request.param
    isa = instruction_set(load_device(device).instruction_set)
    functions = {kernel.name: linear.build(kernel, isa) for kernel in FORMS}
    path = kernels.library(tvm.IRModule(functions), device, tmp_path, "panels.so")
    with boards.session(device) as session, kernels.loaded(session, path) as function:
        yield lambda operands: operands.run(function(operands.kernel.name), isa)


@pytest.mark.parametrize("product", BOARDS, indirect=True)
def test_whole_products(product):
    for kernel in FORMS:
        whole = random_operands(kernel, 3)
        np.testing.assert_allclose(
            product(whole), whole.expected(), rtol=0, atol=2e-6 * abs(whole.expected()).max(), err_msg=kernel.name
        )
        for name, operands in {"random": random_operands(kernel, 1), **corner_operands(kernel)}.items():
            if abs(operands.dots()).sum(1).max() * kernel.terms < 1 << 24:
                operands = operands.integer_form()
                np.testing.assert_array_equal(product(operands), operands.expected(), err_msg=f"{kernel.name} {name}")


@pytest.mark.parametrize("product", BOARDS, indirect=True)
def test_each_group_has_its_own_sum(product):
    """With one group's scale at 1 and the others at 0, the kernel returns that group's dot product."""
    for kernel in (FORMS[0], FORMS[3], FORMS[9]):
        operands = random_operands(kernel)
        dots = operands.dots()
        for group in range(kernel.groups):
            one = operands.integer_form()
            one.scales[:] = np.arange(kernel.groups) == group
            np.testing.assert_array_equal(product(one), dots[:, group], err_msg=kernel.name)


def test_where_they_apply():
    dotprod, neon = instruction_set("dotprod"), instruction_set("neon")
    for kernel in FORMS:
        assert linear_panels.loop_for(kernel, dotprod) is dotprod.assembly
        own = neon.assembly_4x4 if kernel.activation_bits == 4 else neon.assembly
        assert linear_panels.loop_for(kernel, neon) is (own if kernel.group_size == 32 else None)
    form = FORMS[0]
    for other in (replace(form, rows=1), replace(form, rows=3), replace(form, bits=8), replace(form, group_size=256)):
        assert linear_panels.loop_for(other, dotprod) is None
    narrow = replace(form, activation_bits=4)
    assert linear_panels.loop_for(narrow, instruction_set("neon-paper")) is None
