"""The kernel that `agq doctor` sends around: a small matrix product with the instructions of a device."""

from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.targets import Device
from agq_tvm.tuning.task import Task

_SIZE = 64


def small_task(device: Device) -> Task:
    """Return the task of a product of 1 x 64 by 64 x 64."""
    kernel = LinearKernel(1, _SIZE, _SIZE, 4, 32, True, None, False)
    return Task(kernel.name, kernel, device.instruction_set, device, 1)
