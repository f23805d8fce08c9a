"""What a kernel is measured on: operands that a board makes by itself and that numpy makes just so.

A value is a function of its place: an integer hash of it, scaled. Scales are powers of two and products stay small,
so float sums of a matrix product are exact in any order, and all schedules give the same bits.
"""

import math
from dataclasses import dataclass

import numpy as np
from tvm import te

from agq_tvm.errors import AgqError
from agq_tvm.kernels.layout import K_BLOCK
from agq_tvm.tvm_seam import Schedule, T, tirx

_GOLDEN = 0x9E3779B1
_LANES = 16


@dataclass(frozen=True)
class Fill:
    """How values follow from places.

    Attributes
    ----------
    kind : str
        ``"integers"``: a hash between `low` and `high`, times 2^`exponent`; ``"powers"``: 2 to the power of such a
        hash; ``"affine"``: `low` at place 0, then `high` more at each place; ``"zeros"``; ``"sums"`` of the codes of a
        row and group, which must be right: kernels that center codes in different ways agree only then.
    low, high : float
    exponent : int
    """

    kind: str
    low: float = 0
    high: float = 0
    exponent: int = 0


@dataclass(frozen=True)
class Operand:
    """One argument of a kernel.

    Attributes
    ----------
    name : str
        Of its buffer.
    shape, dtype
    role : str
        ``"input"``; ``"cold"``, an input that each layer has its own of, so that no cache holds it; ``"updated"``,
        which the kernel writes into; or ``"output"``.
    fill : Fill
        What it holds before a call.
    seed : int
        Its place among the arguments.
    summed : Operand, optional
        For `fill` ``"sums"``: the codes whose sums it holds.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    fill: Fill
    seed: int
    summed: "Operand | None" = None

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * np.dtype(self.dtype).itemsize

    def array(self) -> np.ndarray:
        """Make the values on the host: bit for bit those of `fill_function`."""
        if self.summed:
            rows, groups = self.shape
            codes = self.summed.array().astype(self.dtype)  # by block, row, and place in a block
            return np.ascontiguousarray(codes.reshape(groups, -1, rows, K_BLOCK).sum((1, 3), dtype=self.dtype).T)
        places = np.arange(self.size, dtype="uint32")
        fill = self.fill
        if fill.kind == "zeros":
            values = np.zeros(self.size)
        elif fill.kind == "affine":
            values = fill.low + fill.high * places.astype("float64")
        else:
            values = fill.low + _reduced(_mixed(places + np.uint32(self._start)), fill).astype("float64")
            values = 2.0**values if fill.kind == "powers" else values * 2.0**fill.exponent
        return values.astype(self.dtype).reshape(self.shape)

    def fill_function(self):
        """Return a PrimFunc of one argument, this operand, that stores its values."""
        if self.summed:
            return te.create_prim_func([self._sums()])
        out = te.compute(self.shape, lambda *at: self._value(self._flat(at)), name="filled")
        sch = Schedule(te.create_prim_func([out]))
        place = sch.fuse(*sch.get_loops(sch.get_sblock("filled")))
        if self.size % _LANES == 0:
            sch.vectorize(sch.split(place, [None, _LANES])[1])
        return sch.mod["main"]

    def digest_function(self):
        """Return a PrimFunc that stores the digest of this operand, see `digest`, into an int64 [1]."""
        values = te.placeholder(self.shape, self.dtype, name="values")
        place = te.reduce_axis((0, self.size), "place")

        def term(_):
            mixed = _mixed(
                _bits(values(*self._indices(place)), self.dtype) ^ (T.Cast("uint32", place) * _uint(_GOLDEN))
            )
            return te.sum(T.Cast("int64", mixed), axis=[place])

        return te.create_prim_func([values, te.compute((1,), term, name="digest")])

    def _sums(self):
        """Compute sums of codes that are made once more, as functions see their own operand only."""
        codes, groups = self.summed, self.shape[1]
        blocks, _, *inner = codes.shape
        axes = [te.reduce_axis((0, extent), f"r{i}") for i, extent in enumerate((blocks // groups, *inner))]

        def sums(m, g):
            at = (g * (blocks // groups) + axes[0], m, *axes[1:])
            return te.sum(T.Cast(self.dtype, codes._value(codes._flat(at))), axis=axes)

        return te.compute(self.shape, sums, name="filled")

    @property
    def _start(self) -> int:
        return (self.seed + 1) * 0x85EBCA77 & 0xFFFFFFFF

    def _flat(self, at):
        place = at[0]
        for index, extent in zip(at[1:], self.shape[1:], strict=True):
            place = place * extent + index
        return place

    def _indices(self, place):
        indices = []
        for extent in reversed(self.shape):
            indices.append(place % extent)
            place = place // extent
        return indices[::-1]

    def _value(self, place):
        fill = self.fill
        if fill.kind == "zeros":
            return tirx.const(0, self.dtype)
        if fill.kind == "affine":
            value = tirx.const(fill.low, "float64") + tirx.const(fill.high, "float64") * T.Cast("float64", place)
            return T.Cast(self.dtype, value)
        value = T.Cast("int32", _reduced(_mixed(T.Cast("uint32", place) + _uint(self._start)), fill)) + int(fill.low)
        if fill.kind == "powers":
            bits = T.shift_left(value + 127, tirx.const(23, "int32"))
            return T.Cast(self.dtype, tirx.reinterpret("float32", bits))
        if fill.exponent:
            return T.Cast(self.dtype, T.Cast("float32", value) * tirx.const(2.0**fill.exponent, "float32"))
        return T.Cast(self.dtype, value)


def digest(array: np.ndarray) -> int:
    """Return the digest of an array: a sum over hashes of place and bits, so its order does not matter; -0 is 0."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype.kind == "f":
        flat = np.where(flat == 0, flat.dtype.type(0), flat)
        bits = flat.view(f"uint{8 * flat.itemsize}").astype("uint32")
    else:
        bits = flat.astype("int32").view("uint32")
    with np.errstate(over="ignore"):
        places = np.arange(flat.size, dtype="uint32") * np.uint32(_GOLDEN)
        return int(_mixed(bits ^ places).astype("int64").sum())


def operands_of(kernel, func) -> list[Operand]:
    """List the operands of a kernel, in the order of its PrimFunc's arguments.

    Raises
    ------
    AgqError
        If one is not known.
    """
    rules = _rules(kernel)
    operands = []
    for place, buffer in enumerate(func.params):
        name, shape = str(buffer.name), tuple(int(extent) for extent in buffer.shape)
        if name not in rules:
            raise AgqError(f"operand {name} of {kernel.name} is not known: it cannot be measured")
        role, fill = rules[name]
        if name == "w" and str(buffer.dtype) == "int8":  # codes that are stored as they are, without 128
            fill = Fill("integers", -127, 127)
        summed = next(each for each in operands if each.name == "x") if fill.kind == "sums" else None
        operands.append(Operand(name, shape, str(buffer.dtype), role, fill, place, summed))
    return operands


_OUTPUT = ("output", Fill("zeros"))


def _rules(kernel) -> dict[str, tuple[str, Fill]]:
    """Return role and fill of a kernel's operands by name."""
    if hasattr(kernel, "columns"):
        return _product_rules(kernel)
    if hasattr(kernel, "kv_heads"):
        return _attention_rules(kernel)
    return _row_rules(kernel)


def _product_rules(kernel) -> dict[str, tuple[str, Fill]]:
    """Operands of a matrix product: sums stay within the 24 bits of a float for any group and any K."""
    bits = kernel_bits(kernel)
    limit = 7 if getattr(kernel, "activation_bits", 8) == 4 else 127 if bits == 4 else 63
    integers = hasattr(kernel, "activation_bits")
    codes = {4: (0, 255), 8: (1, 255)}.get(bits, (-8, 8))
    power = Fill("powers", -1, 0)
    return {
        "x": ("input", Fill("integers", -limit, limit) if integers else Fill("integers", -8, 8)),
        "sx": ("input", power),
        "xsum": ("input", Fill("sums")),
        "w": ("cold", Fill("integers", *codes)),
        "shift": ("cold", Fill("zeros")),
        "step": ("cold", Fill("integers", 1, 8)),
        "low": ("cold", Fill("integers", 0, 255 - 8 * 15)),
        "ws": ("cold", power),
        "wo": ("cold", Fill("integers", -8, 8, -1)),
        "bias": ("cold", Fill("integers", -64, 64)),
        "out": _OUTPUT,
    }


def kernel_bits(kernel) -> int:
    """Return the bits of a product's weights; 32 or 16 where they are floats."""
    storage = getattr(kernel, "storage", None)
    return int(storage.removeprefix("float")) if storage else kernel.bits


def _attention_rules(kernel) -> dict[str, tuple[str, Fill]]:
    """Operands of attention: caches are full when the rows have been appended."""
    cached = kernel.context - kernel.rows
    floats = Fill("integers", -512, 512, -9)
    code = Fill("integers", -127, 127)
    return {
        "q": ("input", code if kernel.int8 else floats),
        "q_scales": ("input", Fill("powers", -9, -8)),
        "keys": ("cold", code if kernel.int8 else floats),
        "values": ("cold", code if kernel.int8 or kernel.form.book else floats),
        "key_scales": ("cold", Fill("powers", -9, -8)),
        "value_scales": ("cold", Fill("powers", -9, -8)),
        "lengths": ("input", Fill("affine", cached, kernel.rows - cached)),
        "value_scale": ("input", Fill("powers", -8, -7)),
        "slopes": ("input", Fill("powers", -8, -4)),
        "positions": ("input", Fill("affine", cached, 1)),
        "key_positions": ("input", Fill("affine", 0, 1)),
        "out": _OUTPUT,
        "importance": _OUTPUT,
    }


def _row_rules(kernel) -> dict[str, tuple[str, Fill]]:
    """Operands of norms, activation functions and quantization, which take rows."""
    floats, gain = Fill("integers", -2048, 2047, -9), Fill("integers", 64, 192, -7)
    rules = {name: ("input", floats) for name in ("x", "gain", "bias")}
    rules |= dict.fromkeys(("out", "codes", "scales", "sums", "y", "residual"), _OUTPUT)
    rules |= {"order": ("input", Fill("affine", 0, 1)), "shift": ("input", Fill("zeros"))}
    if not hasattr(kernel, "input_shapes"):
        return rules | {"gain": ("input", gain)}
    matrices, inputs = 1 + kernel.adds, len(kernel.input_shapes())
    rules |= {f"in{i}": ("input", floats if i < matrices else gain) for i in range(inputs)}
    if kernel.mixed:
        rules[f"in{inputs - 1}"] = ("input", Fill("powers", 0, 0))
    elif kernel.mode == "static":
        rules[f"in{inputs - 1}"] = ("input", Fill("affine", 2.0**-5, 3 - 2.0**-5))
    return rules


def _reduced(hashed, fill: Fill):
    """Bring a hash below the number of values between `low` and `high`, at most 65536."""
    span = int(fill.high) - int(fill.low) + 1
    if isinstance(hashed, np.ndarray):
        return (hashed >> np.uint32(16)) * np.uint32(span) >> np.uint32(16)
    return T.shift_right(T.shift_right(hashed, _uint(16)) * _uint(span), _uint(16))


def _mixed(value):
    """Hash uint32, of numpy or TIR.

    It begins with a rotation by LLVM, about which TVM assumes nothing; of products it assumes that none overflows.
    """
    array = isinstance(value, np.ndarray)
    if array:
        value = value << np.uint32(13) | value >> np.uint32(19)
    else:
        value = tirx.call_llvm_pure_intrin("uint32", "llvm.fshl", value, value, _uint(13))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None)):
        value = value ^ (value >> np.uint32(shift) if array else T.shift_right(value, _uint(shift)))
        if factor:
            value = value * (np.uint32(factor) if array else _uint(factor))
    return value


def _bits(value, dtype: str):
    """Return the bits of a value of TIR as uint32; those of 0 for -0."""
    if dtype.startswith("float"):
        value = T.Select(value == tirx.const(0, dtype), tirx.const(0, dtype), value)
        return T.Cast("uint32", tirx.reinterpret(dtype.replace("float", "uint"), value))
    return tirx.reinterpret("uint32", T.Cast("int32", value))


def _uint(value: int):
    return tirx.const(value, "uint32")
