"""The operations of one decoder block, and the kernels that compute them in each form.

A form is what the linears are stored as and multiplied in. Everything else is float32 in every form, as in compiled
models; what activations cost to quantize is an operation of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from agq_tvm.kernels import activation, attention, attention_append, linear, linear_dense
from agq_tvm.kernels.activation import QuantizeKernel
from agq_tvm.kernels.attention_form import AttentionKernel, attention_form
from agq_tvm.kernels.intrin.base import ACTIVATION_LIMIT, InstructionSet, stored_dtype
from agq_tvm.kernels.layout import K_BLOCK
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_dense import DenseKernel
from agq_tvm.models.decoder import DecoderConfig, Linear
from agq_tvm.quantize.codebooks import CODE_BOOKS
from agq_tvm.quantize.scheme import Scheme

FLOAT_FORMS = {"float32": "float32", "float16-weights": "float16"}
"""Form: type of the stored weights. Arithmetic is float32 in both."""
INTEGER_FORMS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4)}
"""Form: bits of weights and of activations."""
FORMS = (*FLOAT_FORMS, *INTEGER_FORMS)


@dataclass(frozen=True)
class Operand:
    """What a kernel reads or updates.

    Attributes
    ----------
    shape, dtype
    low, high : float
        Its values are drawn from there.
    values : tuple of int or None
        Instead: exactly these.
    cold : bool
        Whether every layer has its own, so that it is in no cache when it is read.
    updated : bool
        Whether the kernel writes into it.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    low: float = -1
    high: float = 1
    values: tuple[int, ...] | None = None
    cold: bool = False
    updated: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def array(self, rng: np.random.Generator) -> np.ndarray:
        """Make one."""
        if self.values is not None:
            return np.array(self.values, self.dtype).reshape(self.shape)
        if np.dtype(self.dtype).kind == "f":
            return rng.uniform(self.low, self.high, self.shape).astype(self.dtype)
        return rng.integers(int(self.low), int(self.high) + 1, self.shape).astype(self.dtype)


@dataclass(frozen=True)
class Kernel:
    """A PrimFunc with its operands; its outputs, shape and type, come after them."""

    func: object
    operands: tuple[Operand, ...]
    outputs: tuple[tuple[tuple[int, ...], str], ...]

    @property
    def name(self) -> str:
        """The PrimFunc's."""
        return str(self.func.attrs["global_symbol"])


@dataclass(frozen=True)
class Operation:
    """What a block does, once or several times.

    Attributes
    ----------
    name : str
        A linear's is its role.
    kind : str
        ``"linear"``, ``"attention"``, ``"nonlinear"`` or ``"quantization"``.
    kernels : dict of str to tuple of (str, int)
        For each form that has it, names of kernels and how often each counts; -1 takes a time off.
    """

    name: str
    kind: str
    kernels: dict[str, tuple[tuple[str, int], ...]]


class BlockOperations:
    """The operations of a block for some rows, with all their kernels.

    Parameters
    ----------
    config : DecoderConfig
    scheme : Scheme
        Group size, activations and attention are as there.
    offsets : str or None
        See `agq_tvm.flow.packing.offsets_dtype`.
    isa : InstructionSet
    rows : int
        M.
    context : int
        Length of the caches, a multiple of 16.
    cached : int
        Positions before these rows.

    Attributes
    ----------
    kernels : dict of str to Kernel
        By name; forms that take the same kernel share it.
    operations : list of Operation
        In the order in which a block runs them.
    """

    def __init__(
        self,
        config: DecoderConfig,
        scheme: Scheme,
        offsets: str | None,
        isa: InstructionSet,
        rows: int,
        context: int,
        cached: int,
    ):
        self.config, self.scheme, self.offsets, self.isa = config, scheme, offsets, isa
        self.rows, self.context, self.cached = rows, context, cached
        self.kernels: dict[str, Kernel] = {}
        self.operations = list(self._operations())

    def _operations(self) -> Iterator[Operation]:
        qkv, o, first, down = self.config.linears
        norm, norms = self._float(self._norm(qkv)), 2
        yield self._everywhere("norms", "nonlinear", (norm, norms))
        yield self._linear(qkv)
        append, attend = self._attention()
        name = "rotary, cache" if self.config.positions == "rotary" else "cache"
        yield Operation(name, "nonlinear", {form: ((append[form], 1),) for form in FORMS})
        yield Operation("attention", "attention", {form: ((attend[form], 1),) for form in FORMS})
        yield self._linear(o)
        yield self._everywhere("residuals", "nonlinear", (self._residual(), 2))
        yield self._linear(first)
        yield self._everywhere("activation", "nonlinear", (self._float(self._activation(down)), 1))
        yield self._linear(down)
        yield self._quantization()

    def _everywhere(self, name: str, kind: str, kernel: tuple[str, int]) -> Operation:
        return Operation(name, kind, dict.fromkeys(FORMS, (kernel,)))

    def _add(self, func, operands: list[Operand], outputs) -> str:
        kernel = Kernel(func, tuple(operands), tuple(outputs))
        self.kernels.setdefault(kernel.name, kernel)
        return kernel.name

    def _linear(self, role: Linear) -> Operation:
        kernels = {form: self._float_linear(role, storage) for form, storage in FLOAT_FORMS.items()}
        kernels |= {form: self._integer_linear(role, *bits) for form, bits in INTEGER_FORMS.items()}
        return Operation(role.name, "linear", {form: ((name, 1),) for form, name in kernels.items()})

    def _float_linear(self, role: Linear, storage: str) -> str:
        kernel = DenseKernel(self.rows, sum(role.rows), role.in_features, storage, role.bias)
        V, L = linear_dense.tile_of(self.isa)
        tiles, channels = -(-kernel.columns // (V * L)), kernel.padded_channels
        operands = [Operand((self.rows, channels)), Operand((tiles, channels, V, L), storage, cold=True)]
        operands += [Operand((tiles, V, L), cold=True)] * role.bias
        func = linear_dense.build(kernel, self.isa)
        return self._add(func, operands, [((self.rows, tiles * V * L), "float32")])

    def _integer_linear(self, role: Linear, bits: int, activation_bits: int) -> str:
        per_group = self.scheme.activation == "per-token-group"
        packed = bits == 4 and self.rows == 1
        if self.isa.multiply(bits, activation_bits, packed) is self.isa.multiply(bits, 8, packed):
            activation_bits = 8  # the same kernel, which is timed once
        kernel = LinearKernel(
            self.rows,
            sum(role.rows),
            role.in_features,
            bits,
            self.scheme.group_of(role.in_features),
            per_group,
            self.offsets if bits == 4 else None,
            role.bias or self.scheme.activation == "static",
            activation_bits,
        )
        layout, groups = self.isa.layout(bits), kernel.groups
        padded, tiles = groups * kernel.group_size, layout.tiles(kernel.columns)
        limit = ACTIVATION_LIMIT if activation_bits == 8 else 7
        codes = Operand((padded // K_BLOCK, self.rows, layout.steps, 2, layout.depth), "int8", -limit, limit)
        w_dtype = "uint8" if bits == 4 else stored_dtype(layout)
        low, high = np.iinfo(w_dtype).min, np.iinfo(w_dtype).max
        per_column = (tiles, groups, layout.vectors, layout.lanes)
        operands = [
            codes,
            Operand((self.rows, groups if per_group else 1)),
            Operand((self.rows, groups), "int32", -limit, limit),
            Operand(layout.packed_shape(kernel.columns, padded), w_dtype, low, high, cold=True),
            Operand(per_column, "float16", cold=True),
        ]
        operands += [Operand(per_column, kernel.offsets, cold=True)] if kernel.offsets else []
        operands += [Operand((tiles, layout.vectors, layout.lanes), cold=True)] if kernel.bias else []
        func = linear.build(kernel, self.isa)
        return self._add(func, operands, [((self.rows, tiles * layout.width), "float32")])

    def _norm(self, role: Linear) -> QuantizeKernel:
        """Describe a norm as what is fused with the quantization at the input of a linear."""
        source = {"rms": "rms_norm", "layer": "layer_norm"}[self.config.norm.kind]
        return self._quantize(role, source)

    def _activation(self, role: Linear) -> QuantizeKernel:
        name = self.config.activation
        return self._quantize(role, f"{name}_mul" if self.config.gated else name)

    def _quantize(self, role: Linear, source: str) -> QuantizeKernel:
        return QuantizeKernel(
            source,
            self.rows,
            role.in_features,
            self.scheme.group_of(role.in_features),
            self.scheme.activation,
            self.config.norm.epsilon,
            refined=self.scheme.max_refine > 0,
        )

    def _float(self, kernel: QuantizeKernel) -> str:
        return self._fused(replace(kernel, mode="none", refined=False))

    def _fused(self, kernel: QuantizeKernel) -> str:
        operands = [Operand(shape, low=0.5) for shape in kernel.input_shapes()]
        func = activation.build(kernel, self.isa.layout_4bit)
        return self._add(func, operands, kernel.output_shapes(self.isa.layout_4bit))

    def _quantization(self) -> Operation:
        """What quantizing adds to the kernels that it is fused with; codes of 4 bits take as long as those of 8."""
        qkv, o, first, down = self.config.linears
        fuses_norms = self.config.norm_placement == "before"  # else a residual needs the norm's result, too
        parts = [(self._fused(self._quantize(o, "plain")), 1)]
        for role in (qkv, first):
            if fuses_norms:
                norm = self._norm(role)
                parts += [(self._fused(norm), 1), (self._float(norm), -1)]
            else:
                parts.append((self._fused(self._quantize(role, "plain")), 1))
        function = self._activation(down)
        parts += [(self._fused(function), 1), (self._float(function), -1)]
        return Operation("quantization", "quantization", dict.fromkeys(INTEGER_FORMS, tuple(parts)))

    def _residual(self) -> str:
        from tvm import te

        shape = (self.rows, self.config.hidden_size)
        x, y = (te.placeholder(shape, "float32", name=name) for name in "xy")
        out = te.compute(shape, lambda m, k: x[m, k] + y[m, k], name="out")
        func = te.create_prim_func([x, y, out]).with_attr("global_symbol", f"residual_m{shape[0]}_k{shape[1]}")
        return self._add(func, [Operand(shape)] * 2, [(shape, "float32")])

    def _attention(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the kernels that fill the caches and that attend, by form."""
        book = CODE_BOOKS.get(self.scheme.attention)
        own = self._attention_pair(book)
        plain = self._attention_pair(None) if book else own
        pairs = dict.fromkeys(FLOAT_FORMS, plain) | dict.fromkeys(INTEGER_FORMS, own)
        return tuple({form: pair[i] for form, pair in pairs.items()} for i in (0, 1))

    def _attention_pair(self, book) -> tuple[str, str]:
        config, rows = self.config, self.rows
        kernel = AttentionKernel(
            rows,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            self.context,
            attention_form(self.isa, book=book),
            alibi=config.positions == "alibi",
        )
        values_limit = ACTIVATION_LIMIT if book else 1
        lengths = Operand((2,), "int32", values=(self.cached, rows))
        scale = [Operand((config.num_kv_heads,), low=0.5)] if book else []
        (_, keys, keys_type), (_, values, values_type) = kernel.caches
        keys = Operand(keys, keys_type, cold=True)
        values = Operand(values, values_type, -values_limit, values_limit, cold=True)
        (q,) = kernel.queries
        qkv = Operand((rows, sum(config.linears[0].rows)))
        updated = [replace(keys, updated=True, cold=False), replace(values, updated=True, cold=False)]
        if config.positions == "rotary":
            positions = tuple(range(self.cached, self.cached + rows))
            table = Operand((self.context, config.head_dim // 2))
            inputs = [qkv, table, table, Operand((rows,), "int32", values=positions), lengths]
        else:
            inputs = [qkv, lengths]
        func = attention_append.build_append(kernel, rotary=config.positions == "rotary")
        append = self._add(func, inputs + scale + updated, [q])
        inputs = [Operand(q[0]), keys, values, lengths, *scale]
        inputs += [Operand((config.num_heads,), low=0.5)] if kernel.alibi else []
        out = ((rows, config.num_heads * config.head_dim), "float32")
        return append, self._add(attention.build_attention(kernel), inputs, [out])
