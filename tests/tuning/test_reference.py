"""What numpy says a product must be, against its unscheduled TIR."""

from dataclasses import replace

import numpy as np
import pytest

from agq_tvm.kernels import linear_grid
from agq_tvm.kernels.linear import LinearKernel, define
from agq_tvm.kernels.linear_grid import GridKernel
from agq_tvm.targets import load_device
from agq_tvm.tuning.operands import digest, operands_of
from agq_tvm.tuning.reference import arguments_of, is_exact
from agq_tvm.tuning.task import Task
from agq_tvm.tvm_seam import Target, tvm

KERNEL = LinearKernel(3, 64, 96, 4, 32, True, None, False)


@pytest.mark.parametrize("device", ["x86-64-avx512vnni", "x86-64-avx2", "raspberry-pi-4", "raspberry-pi-5"])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"rows": 1, "offsets": "float16"},
        {"offsets": "float32", "bias": True, "per_group": False},
        {"bits": 8, "group_size": 64},
        {"activation_bits": 4, "terms": 2},
    ],
    ids=str,
)
def test_expected_digest(device, form):
    check_digest(replace(KERNEL, **form), load_device(device), define)


@pytest.mark.parametrize("device", ["x86-64-avx512vnni", "x86-64-avxvnni"])
@pytest.mark.parametrize("form", [{}, {"rows": 1, "bias": True}, {"group_size": 64, "channels": 160}], ids=str)
def test_expected_digest_on_an_integer_grid(device, form):
    kernel = replace(GridKernel(3, 64, 96, 32, False), **form)
    check_digest(kernel, load_device(device), linear_grid.define)
    long = {"group_size": 128, "channels": 300, "per_group": False, "offsets": "grid"}
    check_digest(replace(KERNEL, **long), load_device(device), define)


def check_digest(kernel, device, define) -> None:
    """Compare what numpy expects with unscheduled TIR."""
    task = Task("", kernel, device.instruction_set, device, 1)
    func = define(kernel, task.instruction_set)
    operands = operands_of(kernel, func)
    tensors = [tvm.runtime.tensor(operand.array()) for operand in operands]
    plain = Target(load_device("generic-x86-64").tvm_target())
    tvm.compile(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), plain)["main"](*tensors)
    result = tensors[-1].numpy()
    assert np.abs(result).max() > 1
    assert is_exact(task)
    arguments = arguments_of(task)
    assert arguments[-1].digest == digest(result)
    assert [argument.written for argument in arguments] == [False] * (len(arguments) - 1) + [True]


@pytest.mark.parametrize("form", [{}, {"terms": 2, "group_size": 64, "channels": 160}, {"per_group": False}], ids=str)
def test_sums_of_codes_are_right_wherever_they_are_made(form):
    device = load_device("host")
    task = Task("", replace(KERNEL, **form), device.instruction_set, device, 1)
    operands = {each.name: each for each in operands_of(task.kernel, define(task.kernel, task.instruction_set))}
    codes, sums = operands["x"].array().astype("int32"), operands["xsum"]
    blocks = task.kernel.group_size // 32
    expected = np.zeros(sums.shape, "int32")
    for block, rows in enumerate(codes):
        expected[:, block // blocks] += rows.reshape(len(rows), -1).sum(1)
    np.testing.assert_array_equal(sums.array(), expected)
    made = tvm.runtime.tensor(np.zeros(sums.shape, "int32"))
    fill = sums.fill_function().with_attr("global_symbol", "main")
    tvm.compile(tvm.IRModule({"main": fill}), Target(device.tvm_target()))["main"](made)
    np.testing.assert_array_equal(made.numpy(), expected)
