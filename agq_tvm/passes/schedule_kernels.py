"""Replace the definitions of matrix products by scheduled, tensorized ones."""

from agq_tvm.kernels import linear, linear_shifted
from agq_tvm.kernels.attrs import described_as
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_shifted import ShiftedKernel
from agq_tvm.tvm_seam import tirx, tvm

_PRODUCTS = {LinearKernel: linear, ShiftedKernel: linear_shifted}


@tvm.transform.module_pass(opt_level=0, name="ScheduleKernels")
class ScheduleKernels:
    """The pass: every matrix product gets the schedule of the instruction set."""

    def __init__(self, isa: InstructionSet):
        self.isa = isa

    def transform_module(self, mod, _context):
        """Schedule the module's PrimFuncs."""
        mod = mod.clone()
        for gvar, func in mod.functions_items():
            for kind, module in _PRODUCTS.items():
                kernel = described_as(func, kind) if isinstance(func, tirx.PrimFunc) else None
                if kernel is not None:
                    scheduled = module.schedule(func, kernel, self.isa).mod["main"]
                    mod.update_func(gvar, scheduled.with_attr("global_symbol", gvar.name_hint))
        return mod
