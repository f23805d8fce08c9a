"""Turn float linears into quantized ones, and the embedding into a look-up in the packed table.

    matmul(x, permute_dims(w))              ->  linear(quantize(x), w.w, w.ws, …)
    add(matmul(x, permute_dims(w)), bias)   ->  linear(quantize(x), w.w, w.ws, …, w.bias)
    take(embedding, tokens)                 ->  embedding(tokens, embedding.w, embedding.ws)

The parameter ``w`` of a function gives way to the packed ones: ``w.w`` codes, ``w.ws`` scales, ``w.wo`` offsets,
``w.bias`` (a linear's own, and what static activations add), ``w.refine`` (TRIP's inverse powers of two),
``w.act`` (scale and zero point of static activations), and ``w.powers`` (of activations of mixed bits).
"""

from dataclasses import dataclass

from agq_tvm.kernels import activation, embedding, linear
from agq_tvm.kernels.activation import QuantizeKernel
from agq_tvm.kernels.attrs import annotate
from agq_tvm.kernels.intrin.base import InstructionSet, stored_dtype
from agq_tvm.kernels.layout import K_BLOCK, k_blocks
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.tvm_seam import relax, tvm

TABLE_GROUP = 32
"""Group size of the matrices outside the layers."""
TABLES = ("embedding", "project_in", "project_out", "head")


@dataclass(frozen=True)
class LinearFormat:
    """How weights and activations of a linear are stored.

    Attributes
    ----------
    bits, group_size : int
        Of the weights.
    activation : str
        ``"per-token"``, ``"per-token-group"`` or ``"static"``.
    offsets : str or None
        Type of the group offsets; None for symmetric weights.
    refined : bool
        Whether activations have TRIP's exponents.
    four_bit : tuple of str
        Roles of the linears whose inputs have 4-bit codes.
    terms : int
        Of the activations, 1 or 2.
    mixed : bool
        Whether each channel of an activation has a number of bits of its own.
    """

    bits: int
    group_size: int
    activation: str
    offsets: str | None
    refined: bool = False
    four_bit: tuple[str, ...] = ()
    terms: int = 1
    mixed: bool = False

    @property
    def quantizing(self) -> int:
        """Number of operands that the quantization reads, not the product."""
        return (self.activation == "static") + self.refined + self.mixed


TABLE_FORMAT = LinearFormat(8, TABLE_GROUP, "per-token-group", None, terms=2)
"""Outside the layers activations have two 8-bit terms: an error there is not softened by anything after it."""


def packed_parameters(name: str, columns: int, channels: int, format: LinearFormat, isa: InstructionSet, bias: bool):
    """List (name, shape, dtype) of what a linear of [N, K] is packed into, in the order of its operands."""
    layout = isa.layout(format.bits)
    padded = k_blocks(channels, format.group_size) * K_BLOCK
    per_group = (layout.tiles(columns), padded // format.group_size, layout.vectors, layout.lanes)
    codes = "uint8" if format.bits == 4 else stored_dtype(layout)
    parameters = [
        (f"{name}.w", layout.packed_shape(columns, padded), codes),
        (f"{name}.ws", per_group, "float16"),
    ]
    if format.offsets:
        parameters.append((f"{name}.wo", per_group, format.offsets))
    if bias or format.activation == "static":
        parameters.append((f"{name}.bias", (per_group[0], *per_group[2:]), "float32"))
    if format.refined:
        parameters.append((f"{name}.refine", (channels,), "float32"))
    if format.activation == "static":
        parameters.append((f"{name}.act", (2,), "float32"))
    if format.mixed:
        parameters.append((f"{name}.powers", (3, padded), "float32"))
    return parameters


@tvm.transform.module_pass(opt_level=0, name="QuantizeLinears")
class QuantizeLinears:
    """The pass; `format` is that of the layers' linears, tables have their own."""

    def __init__(self, format: LinearFormat, isa: InstructionSet):
        self.format, self.isa = format, isa

    def transform_module(self, mod, _context):
        """Rewrite every function."""
        mutator = _Quantizer(mod, self.format, self.isa)
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                mutator.builder_.update_func(gvar, mutator.quantize(func))
        return relax.transform.DeadCodeElimination()(mutator.builder_.get())


@relax.expr_functor.mutator
class _Quantizer(relax.PyExprMutator):
    def __init__(self, mod, format: LinearFormat, isa: InstructionSet):
        super().__init__(mod)
        self.format, self.isa = format, isa

    def quantize(self, func):
        self.biases = _biases(func)
        self.packed = {bias: [] for bias in self.biases.values()}
        body = self.visit_expr(func.body)
        params = []
        for param in func.params:
            params += self.packed.get(param, [param])
        return relax.Function(params, body, func.ret_ty, func.is_pure, func.attrs)

    def visit_call_(self, call):
        call = self.visit_expr_post_order(call)
        if call.op == tvm.ir.Op.get("relax.matmul"):
            weight = self.lookup_binding(call.args[1]).args[0]
            return self._linear(call.args[0], weight)
        if call.op == tvm.ir.Op.get("relax.add") and call.args[1] in self.packed:
            return call.args[0]  # a bias, which the linear has added
        if call.op == tvm.ir.Op.get("relax.take") and call.args[0].name in TABLES:
            return self._embedding(*call.args)
        return call

    def _format(self, weight) -> LinearFormat:
        return TABLE_FORMAT if weight.name in TABLES else self.format

    def _packed(self, weight):
        if weight not in self.packed:
            columns, channels = (int(extent) for extent in weight.ty.shape)
            parameters = packed_parameters(
                weight.name, columns, channels, self._format(weight), self.isa, weight in self.biases
            )
            self.packed[weight] = [relax.Var(name, relax.TensorType(shape, dtype)) for name, shape, dtype in parameters]
        return self.packed[weight]

    def _linear(self, x, weight):
        rows, channels = (int(extent) for extent in x.ty.shape)
        columns, format = int(weight.ty.shape[0]), self._format(weight)
        operands = self._packed(weight)
        static = format.activation == "static"
        layout = self.isa.layout(format.bits)
        bits = 4 if weight.name.rpartition(".")[2] in format.four_bit else 8
        quantize = QuantizeKernel(
            "plain",
            rows,
            channels,
            format.group_size,
            format.activation,
            refined=format.refined,
            bits=bits,
            terms=format.terms,
            mixed=format.mixed,
        )
        own = len(operands) - format.quantizing
        codes = self._call(
            annotate(activation.build(quantize, layout), quantize),
            [x, *operands[own:]],
            quantize.output_shapes(layout),
        )
        kernel = LinearKernel(
            rows,
            columns,
            channels,
            format.bits,
            format.group_size,
            per_group=format.activation == "per-token-group",
            offsets=format.offsets,
            bias=static or weight in self.biases,
            activation_bits=bits,
            terms=format.terms,
        )
        width = layout.tiles(columns) * layout.width
        y = self._call(
            annotate(linear.define(kernel, self.isa), kernel),
            [
                *(self.builder_.emit(relax.TupleGetItem(codes, i)) for i in range(3)),
                *operands[:own],
            ],
            [((rows, width), "float32")],
        )
        return y if width == columns else relax.op.strided_slice(y, [1], [0], [columns])

    def _embedding(self, table, tokens):
        columns, channels = (int(extent) for extent in table.ty.shape)
        rows = int(tokens.ty.shape[0])
        func = embedding.build_embedding(rows, columns, channels, self.isa.layout(8))
        return self._call(func, [tokens, *self._packed(table)], [((rows, channels), "float32")])

    def _call(self, func, arguments, outputs):
        gvar = self.builder_.add_func(func, str(func.attrs["global_symbol"]))
        types = [relax.TensorType(shape, dtype) for shape, dtype in outputs]
        return self.builder_.emit(relax.call_tir(gvar, arguments, types if len(types) > 1 else types[0]))


def _biases(func) -> dict:
    """Map the weights of a function's linears to the parameters that are added to their results."""
    weight_of, biases = {}, {}
    for block in func.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if not isinstance(call, relax.Call):
                continue
            if call.op == tvm.ir.Op.get("relax.permute_dims"):
                weight_of[binding.var] = call.args[0]
            elif call.op == tvm.ir.Op.get("relax.matmul"):
                weight_of[binding.var] = weight_of[call.args[1]]
            elif call.op == tvm.ir.Op.get("relax.add") and call.args[1] in func.params:
                biases[weight_of[call.args[0]]] = call.args[1]
    return biases
