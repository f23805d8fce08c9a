"""Give every kernel with a design space its decisions, and definitions of matrix products their schedules."""

from collections.abc import Callable

from agq_tvm.kernels import tunable
from agq_tvm.kernels.attrs import description_of
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_grid import GridKernel
from agq_tvm.kernels.linear_shifted import ShiftedKernel
from agq_tvm.tvm_seam import tirx, tvm

Choose = Callable[[object], dict[str, int] | None]
"""Returns the decisions of a kernel, given by its description; None for the default."""
_DEFINITIONS = (LinearKernel, ShiftedKernel, GridKernel)


def default(_kernel) -> None:
    """Choose the default for every kernel."""


@tvm.transform.module_pass(opt_level=0, name="ScheduleKernels")
class ScheduleKernels:
    """The pass: kernels are built for the instruction set, from what `choose` returns."""

    def __init__(self, isa: InstructionSet, choose: Choose = default):
        self.isa, self.choose = isa, choose

    def transform_module(self, mod, _context):
        """Schedule the module's PrimFuncs."""
        mod = mod.clone()
        for gvar, func in mod.functions_items():
            kernel = self._kernel(func)
            if kernel is None:
                continue
            decisions = self.choose(kernel)
            if decisions is not None or isinstance(kernel, _DEFINITIONS):
                built = tunable.build(kernel, self.isa, decisions)
                mod.update_func(gvar, built.with_attr("global_symbol", gvar.name_hint))
        return mod

    def _kernel(self, func):
        """Return the description of a PrimFunc that can be tuned, None for anything else."""
        if not isinstance(func, tirx.PrimFunc):
            return None
        description = description_of(func)
        return tunable.described(description, self.isa) if description else None
