"""Leave out what the virtual machine need not do: a small model's decode has thousands of its instructions.

Planned memory is a few storages, but every intermediate result gets a tensor of its own on one of them. Those of the
same place, shape and type become one: alloc_tensor(storage, 0, s, t) twice  ->  once. Tuples that nothing reads go.
"""

from agq_tvm.tvm_seam import relax, tvm


@tvm.transform.module_pass(opt_level=0, name="ShareTensors")
class ShareTensors:
    """The pass; it follows the planning of memory, where a function is one straight line of bindings."""

    def transform_module(self, mod, _context):
        """Rewrite every function."""
        mod = relax.transform.CanonicalizeBindings()(mod)  # no more names for the same thing
        mutator = _Sharer(mod)
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                mutator.builder_.update_func(gvar, mutator.share(func))
        return relax.transform.CanonicalizeBindings()(mutator.builder_.get())


@relax.expr_functor.mutator
class _Sharer(relax.PyExprMutator):
    """Puts the variable of the first such value where another would be made."""

    def share(self, func):
        self.first, self.read = {}, {func.body.body}
        for block in func.body.blocks:
            for binding in block.bindings:
                self.read.update(relax.analysis.free_vars(binding.value))
                key = _key(binding.value)
                if key is not None:
                    self.first.setdefault(key, binding)
        return self.visit_expr(func)

    def visit_var_binding_(self, binding):
        if not isinstance(binding.value, relax.Tuple) or binding.var in self.read:
            super().visit_var_binding_(binding)

    def visit_call_(self, call):
        first = self.first.get(_key(call))
        if first is None or first.value.same_as(call):
            return self.visit_expr_post_order(call)
        return self.visit_expr(first.var)


def _key(value):
    """Return the place, shape and type of a tensor on planned memory; None for anything else."""
    if not isinstance(value, relax.Call) or value.op != tvm.ir.Op.get("relax.memory.alloc_tensor"):
        return None
    storage, *rest = value.args
    return storage, *(str(argument) for argument in rest)
