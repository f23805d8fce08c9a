"""What the kernels of a profile read and update: like the operands of a compiled decoder, with random values."""

from dataclasses import dataclass

import numpy as np

from agq_tvm.kernels.attention_form import AttentionKernel
from agq_tvm.kernels.intrin.base import ACTIVATION_LIMIT
from agq_tvm.tvm_seam import relax

_RANDOM = 1 << 20
"""Random values of an operand; a larger one repeats them."""


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
        count = min(_RANDOM, int(np.prod(self.shape)))
        if np.dtype(self.dtype).kind == "f":
            drawn = rng.uniform(self.low, self.high, count)
        else:
            drawn = rng.integers(int(self.low), int(self.high) + 1, count)
        return np.resize(drawn.astype(self.dtype), self.shape)


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
class Situation:
    """The call of the decoder that kernels are taken from.

    Attributes
    ----------
    cached : int
        Positions before its rows.
    vocabulary : int
        Tokens are below it.
    segments : tuple of int
        Valid rows of each segment of a model that prunes, see `agq_tvm.kernels.prune`; else all rows, once.
    """

    cached: int
    vocabulary: int
    segments: tuple[int, ...]


def parameters_of(call) -> tuple[str, ...]:
    """Return the names of the decoder's parameters among the operands of a call, ``""`` for anything else."""
    return tuple("" if isinstance(each, relax.DataflowVar) else str(each.name) for each in call.args[1])


def tensors(types) -> tuple[tuple[tuple[int, ...], str], ...]:
    """Return shape and type of a tensor, or of the tensors of a tuple."""
    fields = types.fields if isinstance(types, relax.TupleType) else [types]
    return tuple((tuple(int(extent) for extent in each.shape), str(each.dtype)) for each in fields)


def operands_of(call, kernel, situation: Situation) -> tuple[Operand, ...]:
    """Return operands for the kernel of a call.

    Parameters
    ----------
    call : relax.Call
        Of a PrimFunc, before parameters are bundled.
    kernel : object
        The kernel's description, None if it has none.
    situation : Situation
    """
    maker = _Maker(call, kernel, situation)
    return tuple(maker.operand(i) for i in range(len(maker.shapes)))


def updated_of(call) -> tuple[int, ...]:
    """Return which operands a call updates."""
    if call.op.name != "relax.call_tir_inplace":
        return ()
    return tuple(int(i) for i in call.attrs.inplace_indices if int(i) >= 0)


class _Maker:
    def __init__(self, call, kernel, situation: Situation) -> None:
        self.kernel, self.situation = kernel, situation
        self.shapes = tuple(tensors(each.ty)[0] for each in call.args[1])
        self.parameters, self.updated = parameters_of(call), updated_of(call)
        first, (out, _) = self.shapes[0][0], tensors(call.ty)[-1]
        has_rows = first != (2,) or self.updated  # else it is the lengths
        self.rows = first[0] if has_rows else out[0]
        self.cold = self._cold()

    def _cold(self) -> frozenset[int]:
        """Return which operands every layer has its own of: weights of products, and the caches that are read."""
        if isinstance(self.kernel, AttentionKernel):
            queries = len(self.kernel.queries)
            return frozenset(range(queries, queries + len(self.kernel.caches)))
        parts = ("w", "step", "low", "ws", "wo", "bias")
        is_product = hasattr(self.kernel, "columns")
        return frozenset(i for i, name in enumerate(self.parameters) if is_product and name.rpartition(".")[2] in parts)

    def operand(self, i: int) -> Operand:
        (shape, dtype), options = self.shapes[i], {"cold": i in self.cold, "updated": i in self.updated}
        if dtype == "int32":
            return self._integers(i, shape)
        if np.dtype(dtype).kind == "f":
            return Operand(shape, dtype, 0.5 if self.parameters[i] else -1, **options)
        limit = 7 if i == 0 and getattr(self.kernel, "activation_bits", 8) == 4 else ACTIVATION_LIMIT
        return Operand(shape, dtype, *((0, 255) if dtype == "uint8" else (-limit, limit)), **options)

    def _integers(self, i: int, shape: tuple[int, ...]) -> Operand:
        name, cached, options = self.parameters[i], self.situation.cached, {"updated": i in self.updated}
        if name == "tokens":
            return Operand(shape, "int32", 0, self.situation.vocabulary - 1)
        if name.endswith(".shift"):
            return Operand(shape, "int32", 0, 0)
        if len(shape) > 1:
            return Operand(shape, "int32", -ACTIVATION_LIMIT, ACTIVATION_LIMIT)
        if name == "lengths" and len(self.situation.segments) > 1:
            values = [value for rows in self.situation.segments for value in (cached, rows)]
            return Operand(shape, "int32", values=(*values, 0))
        if shape == (2,):
            return Operand(shape, "int32", values=(cached, self.rows))
        # Positions, of rows or of all that is cached; but the order of channels and the rows that stay count from 0.
        start = cached if shape[0] == self.rows and not name.endswith(".order") else 0
        return Operand(shape, "int32", values=tuple(range(start, start + shape[0])), **options)
