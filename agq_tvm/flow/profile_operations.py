"""The operations of a decoder, from the calls of kernels that its compiled functions make, in each form.

Quantization is fused with what makes an activation. Here the maker has the time of the same kernel without it, and
what is left is that of an operation of its own.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from agq_tvm.flow.decoder_calls import calls_of, decoder_until
from agq_tvm.flow.profile_file import SECTIONS
from agq_tvm.flow.profile_forms import Form
from agq_tvm.flow.profile_operands import Kernel, Situation, operands_of, parameters_of, tensors, updated_of
from agq_tvm.kernels import tunable
from agq_tvm.kernels.activation import QuantizeKernel
from agq_tvm.kernels.attention_form import AttentionKernel
from agq_tvm.kernels.attrs import ATTRIBUTE, description_of
from agq_tvm.kernels.norm import LayerNormKernel
from agq_tvm.passes.schedule_kernels import Choose
from agq_tvm.quantize.checkpoint import Checkpoint
from agq_tvm.tvm_seam import StructuralKey

EMBEDDING, BLOCK, HEAD = SECTIONS
_HEAD = ("final_norm", "project_out", "head", "embedding")
_NORMS = ("rms_norm", "layer_norm")


@dataclass
class Operation:
    """What a decoder does, in every block or once.

    Attributes
    ----------
    name : str
        A linear's is its role.
    section : str
        One of `agq_tvm.flow.profile_file.SECTIONS`.
    kind : str
        ``"linear"``, ``"attention"``, ``"nonlinear"`` or ``"quantization"``.
    kernels : dict of str to Counter
        For each form that has it, how often a call of the decoder runs which kernels; a negative number takes a time
        off.
    """

    name: str
    section: str
    kind: str
    kernels: dict[str, Counter] = field(default_factory=dict)


class DecoderOperations:
    """The operations of a decoder for some rows, with all their kernels.

    Parameters
    ----------
    source : Checkpoint
    forms : iterable of Form
    rows : int
        1, or those of a bucket of prefill.
    context : int
        Length of the caches, a multiple of 16.
    cached : int
        Positions before these rows.
    choose : callable
        From a form to what returns its kernels' decisions, see `agq_tvm.passes.pipeline.run`.

    Attributes
    ----------
    rows : int
    kernels : dict of str to Kernel
        By name; forms that run the same code share it.
    operations : list of Operation
        In the order in which a decoder runs them, quantization after what it is fused with.
    """

    def __init__(
        self,
        source: Checkpoint,
        forms: Iterable[Form],
        rows: int,
        context: int,
        cached: int,
        choose: Callable[[Form], Choose],
    ):
        self.rows, self.kernels = rows, {}
        self._known: dict[tuple, str] = {}
        self._found: dict[tuple[str, str], Operation] = {}
        pruning = source.scheme.pruning
        segments = pruning.counts(rows) if pruning else (rows,)
        situation = Situation(cached, source.config.vocab_size, segments)
        name = "decode" if rows == 1 else f"prefill_{rows}"
        for form in forms:
            decide = choose(form)
            module = decoder_until(
                "bundle_parameters", source, form.format, form.isa, context, form.attention, (name,), decide
            )
            _Walk(self, form, module, situation, decide).over(calls_of(module)[name])
        order = {key: place for place, key in enumerate(self._found)}
        self.operations = sorted(
            self._found.values(),
            key=lambda each: (
                SECTIONS.index(each.section),
                each.kind == "quantization",
                order[each.section, each.name],
            ),
        )

    def count(self, section: str, name: str, kind: str, form: str, kernel: str, times: int = 1) -> None:
        """Add a kernel to an operation."""
        found = self._found.setdefault((section, name), Operation(name, section, kind))
        found.kernels.setdefault(form, Counter())[kernel] += times

    def add(self, func, operands, outputs, hint: str) -> str:
        """Add a kernel, once, and return its name.

        Codes of 4 bits without kernels of their own run those of 8 bits, under another name.
        """
        code = func.without_attr("global_symbol").without_attr(ATTRIBUTE)
        shapes = tuple((operand.shape, operand.dtype) for operand in operands)
        key = StructuralKey(code), shapes, tuple(outputs)
        if key not in self._known:
            name = hint if hint not in self.kernels else f"{hint}_{len(self.kernels)}"
            self._known[key] = name
            self.kernels[name] = Kernel(func.with_attr("global_symbol", name), tuple(operands), tuple(outputs))
        return self._known[key]


class _Walk:
    """Goes through the calls of one function in one form."""

    def __init__(self, operations: DecoderOperations, form: Form, module, situation: Situation, choose: Choose) -> None:
        self.operations, self.form, self.module, self.situation = operations, form, module, situation
        self.choose = choose

    def over(self, calls: list) -> None:
        sections, kernels = _sections(calls), [self._described(call) for call in calls]
        products = [sections[i] if hasattr(kernel, "columns") else None for i, kernel in enumerate(kernels)]
        fused = any(getattr(kernel, "adds", False) for kernel in kernels)
        for i, (call, kernel) in enumerate(zip(calls, kernels, strict=True)):
            name = self._add(call, kernel)
            if isinstance(kernel, QuantizeKernel):
                reader = next(section for section in products[i:] if section)
                self._quantizer(call, kernel, name, sections[i], reader, fused)
            else:
                self._count(sections[i], *_name(call, kernel), name)

    def _described(self, call):
        value = description_of(self.module[call.args[0]])
        return tunable.described(value, self.form.isa) if value else None

    def _count(self, section: str, name: str, kind: str, kernel: str, times: int = 1) -> None:
        if section == EMBEDDING and name in ("residuals", "copies"):
            name = EMBEDDING  # positions that are looked up and added
        if section != BLOCK and kind != "linear" and name != section:
            name = f"{section}: {name}"
        self.operations.count(section, name, kind, self.form.name, kernel, times)

    def _add(self, call, kernel) -> str:
        updated = updated_of(call)
        operands = operands_of(call, kernel, self.situation)
        func, hint = self.module[call.args[0]], call.args[0].name_hint
        return self.operations.add(func, operands, tensors(call.ty)[len(updated) :], hint)

    def _quantizer(self, call, kernel: QuantizeKernel, name: str, section: str, reader: str, fused: bool) -> None:
        """Count what makes an activation, and its quantization with the linear that reads it."""
        if kernel.source == "plain":
            what = ("copies", "nonlinear") if kernel.mode == "none" else ("quantization", "quantization")
            self._count(reader, *what, name)
            return
        norms = "residuals, norms" if fused else "norms"
        maker = norms if kernel.source in _NORMS else "activation"
        if kernel.mode == "none":
            self._count(section, maker, "nonlinear", name)
            return
        plain = self._without_codes(call, kernel)
        self._count(section, maker, "nonlinear", plain)
        self._count(reader, "quantization", "quantization", name)
        self._count(reader, "quantization", "quantization", plain, -1)

    def _without_codes(self, call, kernel: QuantizeKernel) -> str:
        kernel = replace(kernel, mode="none", refined=False, bits=8, terms=1, shifted=False, mixed=False)
        func = tunable.build(kernel, self.form.isa, self.choose(kernel))
        operands = operands_of(call, kernel, self.situation)[: len(kernel.input_shapes())]
        return self.operations.add(func, operands, kernel.output_shapes(self.form.isa.layout_4bit), kernel.name)


def _sections(calls: list) -> list[str]:
    """Return where in the decoder each call is: what reads nothing of its own is where the one before it is."""
    section, sections = EMBEDDING, []
    for call in calls:
        owners = {name.partition(".")[0] for name in parameters_of(call)}
        if "layers" in owners:
            section = BLOCK
        elif section == BLOCK and (owners.intersection(_HEAD) or call.args[0].name_hint.startswith("last_row")):
            section = HEAD
        sections.append(section)
    return sections


def _name(call, kernel) -> tuple[str, str]:
    """Return name and kind of the operation of a call that quantizes nothing."""
    hint, owners = call.args[0].name_hint, [name.split(".") for name in parameters_of(call)]
    if hasattr(kernel, "columns"):
        *_, role = next(name for name in owners if name[-1] == "w")[:-1]
        return "head" if role == "embedding" else role, "linear"
    if isinstance(kernel, AttentionKernel):
        return "attention", "attention"
    if isinstance(kernel, LayerNormKernel) or "norm" in hint:
        return "norms", "nonlinear"
    if hint.startswith("gather") or all(dtype == "int32" for _, dtype in tensors(call.ty)):
        return "pruning", "nonlinear"
    if "append" in hint:
        return "rotary, cache" if "rope" in hint else "cache", "nonlinear"
    if hint.startswith("add"):
        return "residuals", "nonlinear"
    return ("embedding" if hint.startswith("embedding") else "copies"), "nonlinear"
