"""Turn float linears into quantized ones, and the embedding into a look-up in the packed table.

    matmul(x, permute_dims(w))              ->  linear(quantize(x), w.w, w.ws, …)
    add(matmul(x, permute_dims(w)), bias)   ->  linear(quantize(x), w.w, w.ws, …, w.bias)
    take(embedding, tokens)                 ->  embedding(tokens, embedding.w, embedding.ws)

With float activations ``quantize`` only fills up the last group, and ``linear`` is a float product.

The parameter ``w`` of a function gives way to the packed ones: ``w.w`` codes, ``w.ws`` scales, ``w.wo`` offsets,
``w.bias`` (a linear's own, and what static activations add), ``w.refine`` (TRIP's inverse powers of two),
``w.act`` (scale and zero point of static activations), and ``w.powers`` (of activations of mixed bits). Exponents of
channels add ``w.order`` and ``w.shift``. On an integer grid ``w.ws`` has units of columns, and ``w.step`` and ``w.low``
have the groups' multiples.
"""

from dataclasses import dataclass, replace

from agq_tvm.kernels import activation, embedding, linear, linear_dense, linear_float, linear_grid, linear_shifted
from agq_tvm.kernels.activation import QuantizeKernel
from agq_tvm.kernels.attrs import annotate
from agq_tvm.kernels.functions import Functions
from agq_tvm.kernels.intrin.base import InstructionSet, stored_dtype
from agq_tvm.kernels.layout import K_BLOCK, Layout, k_blocks
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_dense import DenseKernel
from agq_tvm.kernels.linear_float import FloatLinearKernel
from agq_tvm.kernels.linear_grid import GridKernel
from agq_tvm.kernels.linear_shifted import ShiftedKernel
from agq_tvm.tvm_seam import relax, tvm

TABLE_GROUP = 32
"""Group size of the matrices outside the layers."""
_QUANTIZE_OPERANDS = ("refine", "act", "order", "shift", "powers")
"""What the quantization of a linear's input reads of its packed parameters, in order."""
TABLES = ("embedding", "project_in", "project_out", "head")


@dataclass(frozen=True)
class LinearFormat:
    """How weights and activations of a linear are stored.

    Attributes
    ----------
    bits : int
        Of the weights: 4 or 8, or 16 or 32 for floats.
    group_size : int or str
        Of the weights; ``"column"`` is the whole inner dimension.
    activation : str
        ``"per-token"``, ``"per-token-group"``, ``"static"`` or ``"none"``.
    offsets : str or None
        Type of the group offsets; None for symmetric weights.
    refined : bool
        Whether activations have TRIP's exponents.
    four_bit : tuple of str
        Roles of the linears whose inputs have 4-bit codes.
    terms : int
        Of the activations, 1 or 2.
    shifts : bool
        Whether exponents are those of channels, and shift integer accumulators.
    mixed : bool
        Whether each channel of an activation has a number of bits of its own.
    head_bits : int
        Of the weights outside the layers: 4, 8, 16 or 32.
    grid : bool
        Whether scales and offsets are those of an integer grid.
    """

    bits: int
    group_size: int | str
    activation: str
    offsets: str | None
    refined: bool = False
    four_bit: tuple[str, ...] = ()
    terms: int = 1
    shifts: bool = False
    mixed: bool = False
    head_bits: int = 8
    grid: bool = False

    def group_of(self, channels: int) -> int:
        """Return the size of the groups of a matrix, a multiple of a k-block."""
        return self.group_size if self.group_size != "column" else k_blocks(channels, K_BLOCK) * K_BLOCK


_TABLE_FORMATS = {
    # Outside the layers activations have two 8-bit terms: an error there is not softened by anything after it. Next
    # to the error of 4-bit weights it does not show.
    8: LinearFormat(8, TABLE_GROUP, "per-token-group", None, terms=2),
    4: LinearFormat(4, TABLE_GROUP, "per-token-group", "float16"),
    16: LinearFormat(16, TABLE_GROUP, "none", None),
    32: LinearFormat(32, TABLE_GROUP, "none", None),
}
_FLOATS = {16: "float16", 32: "float32"}


def packed_parameters(name: str, columns: int, channels: int, format: LinearFormat, isa: InstructionSet, bias: bool):
    """List (name, shape, dtype) of what a linear of [N, K] is packed into, in the order of its operands."""
    group_size = format.group_of(channels)
    padded = k_blocks(channels, group_size) * K_BLOCK
    if format.bits in _FLOATS:
        tiles, _, *tile = shape = linear_dense.packed_shape(columns, padded, isa)
        return [(f"{name}.w", shape, _FLOATS[format.bits])] + [(f"{name}.bias", (tiles, *tile), "float32")] * bias
    layout = isa.layout(format.bits)
    per_group = (layout.tiles(columns), padded // group_size, layout.vectors, layout.lanes)
    codes = "uint8" if format.bits == 4 else stored_dtype(layout)
    parameters = [(f"{name}.w", layout.packed_shape(columns, padded), codes)]
    if format.grid and isa.grids:
        parameters += [(f"{name}.{part}", per_group, "uint8") for part in ("step", "low")]
        parameters.append((f"{name}.ws", (per_group[0], 1, *per_group[2:]), "float16"))
    else:
        parameters.append((f"{name}.ws", per_group, "float16"))
        parameters += [(f"{name}.wo", per_group, format.offsets)] if format.offsets else []
    if bias or format.activation == "static":
        parameters.append((f"{name}.bias", (per_group[0], *per_group[2:]), "float32"))
    if format.refined:
        parameters.append((f"{name}.refine", (channels,), "float32"))
    if format.activation == "static":
        parameters.append((f"{name}.act", (2,), "float32"))
    if format.shifts:
        parameters.append((f"{name}.order", (channels,), "int32"))
        parameters.append((f"{name}.shift", (padded // K_BLOCK,), "int32"))
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
        self.functions = Functions(self.builder_)

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
        if weight.name not in TABLES:
            return self.format
        format = _TABLE_FORMATS[self.format.head_bits]
        return replace(format, activation="none", terms=1) if self.format.activation == "none" else format

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
        if format.activation == "none":
            return self._float_linear(x, weight, format)
        operands = {str(var.name).rpartition(".")[2]: var for var in self._packed(weight)}
        layout = self.isa.layout(format.bits)
        quantize, kernel = self._kernels(rows, columns, channels, weight)
        codes = self._call(
            self.functions.add(_quantization, quantize, layout),
            [x, *(operands[part] for part in _QUANTIZE_OPERANDS if part in operands)],
            quantize.output_shapes(layout),
        )
        module = _module_of(kernel)
        width = layout.tiles(columns) * layout.width
        y = self._call(
            self.functions.add(_definition, kernel, self.isa),
            [
                *(self.builder_.emit(relax.TupleGetItem(codes, i)) for i in range(3)),
                *(operands[part] for part in module.OPERANDS if part in operands),
            ],
            [((rows, width), "float32")],
        )
        return _first_columns(y, columns)

    def _kernels(self, rows: int, columns: int, channels: int, weight) -> tuple:
        """Return what quantizes the input of a linear, and what multiplies."""
        format, product = self._format(weight), self._product(rows, columns, channels, weight)
        group_size = format.group_of(channels)
        quantize = QuantizeKernel(
            "plain",
            rows,
            channels,
            # On an integer grid there are sums of rows, not of groups.
            k_blocks(channels, group_size) * K_BLOCK if isinstance(product, GridKernel) else group_size,
            format.activation,
            refined=format.refined,
            bits=product.activation_bits,
            terms=format.terms,
            shifted=format.shifts,
            mixed=format.mixed,
        )
        return quantize, product

    def _product(self, rows: int, columns: int, channels: int, weight) -> LinearKernel | GridKernel | ShiftedKernel:
        format = self._format(weight)
        bits, group_size = 4 if weight.name.rpartition(".")[2] in format.four_bit else 8, format.group_of(channels)
        if format.shifts:
            return ShiftedKernel(rows, columns, channels, format.offsets, bits)
        bias = format.activation == "static" or weight in self.biases
        if format.grid and self.isa.grids:
            return linear_grid.choose(self.isa, rows, columns, channels, group_size, bias, bits)
        return LinearKernel(
            rows,
            columns,
            channels,
            format.bits,
            group_size,
            per_group=format.activation == "per-token-group",
            offsets=format.offsets,
            bias=bias,
            activation_bits=bits,
            terms=format.terms,
        )

    def _float_linear(self, x, weight, format: LinearFormat):
        rows, channels = (int(extent) for extent in x.ty.shape)
        columns, group_size, bias = int(weight.ty.shape[0]), format.group_of(channels), weight in self.biases
        fill, layout = QuantizeKernel("plain", rows, channels, group_size, "none"), self.isa.layout(format.bits)
        ((_, padded), _), *_ = filled = fill.output_shapes(layout)
        if format.bits in _FLOATS:
            kernel = DenseKernel(rows, columns, padded, _FLOATS[format.bits], bias)
            product = self.functions.add(_dense, kernel, self.isa)
            vectors, lanes = linear_dense.tile_of(self.isa)
            width = vectors * lanes
        else:
            kernel = FloatLinearKernel(rows, columns, channels, format.bits, group_size, format.offsets, bias)
            product, width = self.functions.add(_float_product, kernel, self.isa), layout.width
        x = self._call(self.functions.add(_quantization, fill, layout), [x], filled)
        outputs = [((rows, -(-columns // width) * width), "float32")]
        return _first_columns(self._call(product, [x, *self._packed(weight)], outputs), columns)

    def _embedding(self, table, tokens):
        columns, channels = (int(extent) for extent in table.ty.shape)
        rows, packed, bits = int(tokens.ty.shape[0]), self._packed(table), self._format(table).bits
        if bits in _FLOATS:
            shape = tuple(int(extent) for extent in packed[0].ty.shape)
            look_up = self.functions.add(embedding.build_float_embedding, rows, columns, channels, shape, _FLOATS[bits])
        else:
            arguments = (rows, columns, channels, self.isa.layout(bits), len(packed) == 3)
            look_up = self.functions.add(embedding.build_embedding, *arguments)
        return self._call(look_up, [tokens, *packed], [((rows, channels), "float32")])

    def _call(self, kernel, arguments, outputs):
        types = [relax.TensorType(shape, dtype) for shape, dtype in outputs]
        return self.builder_.emit(relax.call_tir(kernel, arguments, types if len(types) > 1 else types[0]))


def _quantization(kernel: QuantizeKernel, layout: Layout):
    return annotate(activation.build(kernel, layout), kernel)


def _definition(kernel, isa: InstructionSet):
    return annotate(_module_of(kernel).define(kernel, isa), kernel)


def _module_of(kernel):
    """Return the module that has a product's definition and the order of its operands."""
    return {GridKernel: linear_grid, ShiftedKernel: linear_shifted}.get(type(kernel), linear)


def _float_product(kernel: FloatLinearKernel, isa: InstructionSet):
    return annotate(linear_float.build(kernel, isa), kernel)


def _dense(kernel: DenseKernel, isa: InstructionSet):
    return annotate(linear_dense.build(kernel, isa), kernel)


def _first_columns(y, columns: int):
    """Leave out the columns that fill up the last tile."""
    return y if int(y.ty.shape[1]) == columns else relax.op.strided_slice(y, [1], [0], [columns])


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
