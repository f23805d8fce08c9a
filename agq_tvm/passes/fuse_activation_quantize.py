"""Fuse what makes an activation with its quantization: one kernel, no float copy in between.

quantize(rms_norm(x, gain))            ->  rms_norm_quantize(x, gain)
quantize(layer_norm(x, gain, bias))    ->  layer_norm_quantize(x, gain, bias)
quantize(silu(split(x)[0]) * split(x)[1])  ->  silu_mul_quantize(x)
quantize(relu(x))                      ->  relu_quantize(x), and so for the forms of gelu
s = add(a, b), quantize(norm(s, …))    ->  add_norm_quantize(a, b, …), which returns s, too

A norm that something else needs too, a residual, stays by itself.
"""

import dataclasses

from agq_tvm.kernels import activation
from agq_tvm.kernels.activation import QuantizeKernel
from agq_tvm.kernels.attrs import annotate, described_as
from agq_tvm.kernels.functions import Functions
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.layout import Layout
from agq_tvm.tvm_seam import relax, tvm

_NORMS = {"relax.nn.rms_norm": "rms_norm", "relax.nn.layer_norm": "layer_norm"}
_ACTIVATIONS = {"relax.nn.relu": "relu", "relax.nn.gelu": "gelu", "relax.nn.gelu_tanh": "gelu_tanh"}


@tvm.transform.module_pass(opt_level=0, name="FuseActivationQuantize")
class FuseActivationQuantize:
    """The pass; the codes' order comes from the instruction set."""

    def __init__(self, isa: InstructionSet):
        self.isa = isa

    def transform_module(self, mod, _context):
        """Rewrite every function and drop what is left unused."""
        mutator = _Fuser(mod, self.isa)
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                mutator.builder_.update_func(gvar, mutator.fuse(func))
        return relax.transform.DeadCodeElimination()(mutator.builder_.get())


@relax.expr_functor.mutator
class _Fuser(relax.PyExprMutator):
    def __init__(self, mod, isa: InstructionSet):
        super().__init__(mod)
        self.mod, self.isa = mod, isa
        self.functions = Functions(self.builder_)

    def fuse(self, func):
        self.users = relax.analysis.udchain(func.body.blocks[0])
        self.values = {binding.var: binding.value for binding in func.body.blocks[0].bindings}
        return self.visit_expr(func)

    def visit_call_(self, original):
        call = self.visit_expr_post_order(original)
        if call.op != tvm.ir.Op.get("relax.call_tir"):
            return call
        kernel = described_as(self.mod[call.args[0].name_hint], QuantizeKernel)
        if kernel is None or kernel.source != "plain":
            return call
        x, *vectors = call.args[1]
        producer = self._producer(x)
        used_once = len(self.users[original.args[1][0]]) == 1
        if producer is None or (producer[0] in _NORMS.values() and not used_once):
            return call
        source, inputs, epsilon = producer
        residual = self._residual(original.args[1][0], source)
        if residual is not None:
            inputs = [*(self.visit_expr(argument) for argument in self.values[residual].args), *inputs[1:]]
        kernel = dataclasses.replace(kernel, source=source, epsilon=epsilon, adds=residual is not None)
        layout = self.isa.layout_4bit
        gvar = self.functions.add(_fused, kernel, layout)
        types = [relax.TensorType(shape, dtype) for shape, dtype in kernel.output_shapes(layout)]
        made = relax.call_tir(gvar, [*inputs, *vectors], types if len(types) > 1 else types[0])
        return made if residual is None else self._with_residual(made, residual, len(types))

    def _residual(self, normed, source: str):
        """Return the variable of the sum that a norm is of, None if it is of something else."""
        if source not in _NORMS.values():
            return None
        x = self.values[normed].args[0]
        total = self.values.get(x)
        is_sum = _is_call(total, "relax.add") and all(term.ty == x.ty for term in total.args)
        return x if is_sum else None

    def _with_residual(self, made, residual, outputs: int):
        """Let what reads the sum from here on read the kernel's last output; return the others."""
        made = self.builder_.emit(made)
        self.set_var_remap(residual, self.builder_.emit(relax.TupleGetItem(made, outputs - 1)))
        if outputs == 2:
            return relax.TupleGetItem(made, 0)
        return relax.Tuple([relax.TupleGetItem(made, i) for i in range(outputs - 1)])

    def _producer(self, x):
        """Recognize what makes x: (source, its inputs, epsilon), or None."""
        call = self.lookup_binding(x)
        name = call.op.name if isinstance(call, relax.Call) and isinstance(call.op, tvm.ir.Op) else None
        if name in _NORMS:
            return _NORMS[name], list(call.args), float(call.attrs.epsilon)
        if name in _ACTIVATIONS:
            return _ACTIVATIONS[name], list(call.args), 0.0
        if name != "relax.multiply":
            return None
        silu, up = (self.lookup_binding(arg) for arg in call.args)
        if not _is_call(silu, "relax.nn.silu"):
            return None
        gate = self.lookup_binding(silu.args[0])
        if not (isinstance(gate, relax.TupleGetItem) and isinstance(up, relax.TupleGetItem)):
            return None
        if gate.tuple_value != up.tuple_value or (gate.index, up.index) != (0, 1):
            return None
        split = self.lookup_binding(gate.tuple_value)
        return ("silu_mul", [split.args[0]], 0.0) if _is_call(split, "relax.split") else None


def _fused(kernel: QuantizeKernel, layout: Layout):
    return annotate(activation.build(kernel, layout), kernel)


def _is_call(expr, op: str) -> bool:
    return isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get(op)
