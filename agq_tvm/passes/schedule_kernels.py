"""Replace the definitions of matrix products by scheduled, tensorized ones."""

from agq_tvm.kernels import linear
from agq_tvm.kernels.attrs import described_as
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.tvm_seam import tirx, tvm


@tvm.transform.module_pass(opt_level=0, name="ScheduleKernels")
class ScheduleKernels:
    """The pass: every `LinearKernel` gets the schedule of the instruction set."""

    def __init__(self, isa: InstructionSet):
        self.isa = isa

    def transform_module(self, mod, _context):
        """Schedule the module's PrimFuncs."""
        mod = mod.clone()
        for gvar, func in mod.functions_items():
            kernel = described_as(func, LinearKernel) if isinstance(func, tirx.PrimFunc) else None
            if kernel is not None:
                scheduled = linear.schedule(func, kernel, self.isa).mod["main"]
                mod.update_func(gvar, scheduled.with_attr("global_symbol", gvar.name_hint))
        return mod
