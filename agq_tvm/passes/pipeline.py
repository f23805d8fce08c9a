"""The phases from the float decoder to what TVM builds, in order."""

from collections.abc import Callable
from pathlib import Path

from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.passes.fuse_activation_quantize import FuseActivationQuantize
from agq_tvm.passes.lower_norms import LowerNorms
from agq_tvm.passes.quantize_linears import LinearFormat, QuantizeLinears
from agq_tvm.passes.schedule_kernels import Choose, ScheduleKernels, default
from agq_tvm.passes.share_tensors import ShareTensors
from agq_tvm.tvm_seam import relax, tvm


def phases(format: LinearFormat, isa: InstructionSet, choose: Choose = default) -> list[tuple[str, list]]:
    """List (name, passes) in the order in which they run."""
    transform = relax.transform
    return [
        ("quantize_linears", [QuantizeLinears(format, isa)]),
        ("fuse_activation_quantize", [FuseActivationQuantize(isa)]),
        ("lower_norms", [LowerNorms()]),
        ("legalize", [transform.LegalizeOps()]),
        ("schedule_kernels", [ScheduleKernels(isa, choose)]),
        ("bundle_parameters", [transform.BundleModelParams("packed")]),
        ("lower", lowering()),
    ]


def lowering() -> list:
    """List the passes from calls of PrimFuncs to what `relax.build` takes without a pipeline of its own."""
    transform = relax.transform
    return [
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
        ShareTensors(),
        transform.LowerAllocTensor(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
    ]


def run(
    mod,
    target,
    format: LinearFormat,
    isa: InstructionSet,
    dump: Path | None = None,
    step: Callable[[str], None] = lambda name: None,
    choose: Choose = default,
):
    """Run all phases.

    Parameters
    ----------
    mod : IRModule
        From `models.relax_decoder.build_decoder`.
    target : tvm.target.Target
    dump : Path, optional
        A directory where the module is written as TVMScript after each phase.
    step : callable, optional
        Called with the name of each phase before it runs.
    choose : callable, optional
        Returns the decisions of a kernel, see `agq_tvm.kernels.tunable`; by default all are built as by hand.

    Returns
    -------
    lowered : IRModule
        Ready for `relax.build` without a pipeline of its own.
    parameters : list of (name, shape, dtype)
        Caches and packed parameters in the order of the bundled tuple.
    """
    _dump(mod, dump, 0, "decoder")
    parameters = []
    for number, (name, passes) in enumerate(phases(format, isa, choose), 1):
        step(name)
        if name == "bundle_parameters":
            parameters = _parameters(mod["decode"])
        with target:
            mod = tvm.transform.Sequential(passes)(mod)
        _dump(mod, dump, number, name)
    return mod, parameters


def _parameters(func) -> list[tuple[str, tuple[int, ...], str]]:
    first = int(func.attrs["num_input"])
    return [
        (str(param.name), tuple(int(extent) for extent in param.ty.shape), str(param.ty.dtype))
        for param in func.params[first:]
    ]


def _dump(mod, directory: Path | None, number: int, name: str) -> None:
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{number:02d}_{name}.py").write_text(mod.script(show_meta=False))
