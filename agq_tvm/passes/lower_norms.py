"""Give norms that were not fused with a quantization our own kernel: LayerNorm rows in parallel, in vectors."""

from agq_tvm.kernels.attrs import annotate
from agq_tvm.kernels.norm import LayerNormKernel, build_layer_norm
from agq_tvm.tvm_seam import relax, tvm


@tvm.transform.module_pass(opt_level=0, name="LowerNorms")
class LowerNorms:
    """The pass."""

    def transform_module(self, mod, _context):
        """Rewrite every function."""
        mutator = _Lowerer(mod)
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                mutator.builder_.update_func(gvar, mutator.visit_expr(func))
        return mutator.builder_.get()


@relax.expr_functor.mutator
class _Lowerer(relax.PyExprMutator):
    def visit_call_(self, call):
        call = self.visit_expr_post_order(call)
        if call.op != tvm.ir.Op.get("relax.nn.layer_norm"):
            return call
        rows, channels = (int(extent) for extent in call.ty.shape)
        kernel = LayerNormKernel(rows, channels, float(call.attrs.epsilon))
        gvar = self.builder_.add_func(annotate(build_layer_norm(kernel), kernel), kernel.name)
        return relax.call_tir(gvar, list(call.args), call.ty)
