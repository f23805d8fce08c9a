"""The calls of kernels that a compiled decoder makes: what is tuned and what is profiled."""

from collections.abc import Collection

from agq_tvm.kernels.attention_form import AttentionForm
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.models.relax_decoder import build_decoder
from agq_tvm.passes import pipeline
from agq_tvm.passes.quantize_linears import LinearFormat
from agq_tvm.passes.schedule_kernels import Choose, default
from agq_tvm.quantize.checkpoint import Checkpoint
from agq_tvm.tvm_seam import relax, tvm


def decoder_until(
    phase: str,
    source: Checkpoint,
    format: LinearFormat,
    isa: InstructionSet,
    context: int,
    attention: AttentionForm,
    only: Collection[str] = (),
    choose: Choose = default,
):
    """Return a checkpoint's decoder as it is before a phase of the pipeline.

    Parameters
    ----------
    phase : str
        One of `agq_tvm.passes.pipeline.phases`.
    source : Checkpoint
    format : LinearFormat
    isa : InstructionSet
    context : int
        Length of the caches.
    attention : AttentionForm
    only : collection of str
        The functions wanted, see `agq_tvm.models.relax_decoder.function_names`; all by default.
    choose : callable
        See `agq_tvm.passes.pipeline.run`.
    """
    module = build_decoder(source.config, context, attention, source.scheme.pruning, only)
    for name, passes in pipeline.phases(format, isa, choose):
        if name == phase:
            break
        module = tvm.transform.Sequential(passes)(module)
    return module


def calls_of(module) -> dict[str, list]:
    """Return, for each Relax function, its calls of PrimFuncs in order."""
    return {
        gvar.name_hint: list(_calls(func))
        for gvar, func in module.functions_items()
        if isinstance(func, relax.Function)
    }


def _calls(func):
    for block in func.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Call) and call.args and isinstance(call.args[0], tvm.ir.GlobalVar):
                yield call
