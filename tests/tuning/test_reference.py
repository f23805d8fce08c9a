"""What numpy says a product must be, against its unscheduled TIR."""

from dataclasses import replace

import numpy as np
import pytest

from agq_tvm.kernels.linear import LinearKernel, define
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
    device = load_device(device)
    kernel = replace(KERNEL, **form)
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
