"""The matrix product in float32, for heads of float16 weights, and what profiles compare the quantized ones with.

    out[m, n] = Σ_k x[m, k] · w[n, k] + bias[n]

Weights are stored by tiles of columns, then channel, as float32 or float16; sums are float32.
"""

from dataclasses import dataclass

from tvm import te

from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.linear_schedule import row_tile
from agq_tvm.kernels.space import Space, divisors
from agq_tvm.tvm_seam import Schedule, T

CHANNEL_BLOCK = 8
"""Channels of one unrolled step; every tile of weights has a multiple of it."""
_ROWS = 4
_MOST_SUMS = 24
_TILES = {"avx512vnni": (4, 16), "avxvnni": (2, 8), "avx2": (2, 8), "generic": (2, 4)}
_ARM_TILE = (4, 4)


@dataclass(frozen=True)
class DenseKernel:
    """One float product.

    Attributes
    ----------
    rows, columns, channels : int
        M, N and K.
    storage : str
        Type of the stored weights, ``"float32"`` or ``"float16"``.
    bias : bool
        Whether a float32 vector is added to the result.
    """

    rows: int
    columns: int
    channels: int
    storage: str
    bias: bool

    @property
    def name(self) -> str:
        """E.g. ``linear_float16_m128_n960_k576``."""
        bias = "_bias" if self.bias else ""
        return f"linear_{self.storage}{bias}_m{self.rows}_n{self.columns}_k{self.channels}"

    @property
    def padded_channels(self) -> int:
        """K, filled up to whole blocks."""
        return -(-self.channels // CHANNEL_BLOCK) * CHANNEL_BLOCK


def default(kernel: DenseKernel) -> dict[str, int]:
    """Return the decisions made by hand."""
    return {"rows": row_tile(kernel.rows, _ROWS), "channels": CHANNEL_BLOCK, "parallel": 1}


def space(kernel: DenseKernel, isa: InstructionSet, threads: int = 1) -> Space:
    """Return the decisions of a float product.

    rows
        Of the register tile.
    channels
        Of one unrolled step.
    parallel
        Whether threads share the tiles of columns.
    """
    made, sums = default(kernel), _MOST_SUMS if isa.family == "avx512vnni" else _MOST_SUMS // 2
    rows = [rows for rows in divisors(kernel.rows, sums) if rows * tile_of(isa)[0] <= sums]
    choices = {
        "rows": tuple(sorted({made["rows"], *rows})),
        "channels": (2, 4, CHANNEL_BLOCK),
        "parallel": (0, 1) if threads > 1 else (1,),
    }
    return Space(choices, made)


def build(kernel: DenseKernel, isa: InstructionSet, decisions: dict[str, int] | None = None):
    """Return the scheduled PrimFunc.

    Buffers, in order (V vectors of L columns make one of NT tiles):
    x float32 [M, padded K]; w `storage` [NT, padded K, V, L]; bias float32 [NT, V, L], if any; out float32
    [M, NT * V * L].
    """
    V, L = tile_of(isa)
    M, K, NT = kernel.rows, kernel.padded_channels, -(-kernel.columns // (V * L))
    x = te.placeholder((M, K), "float32", name="x")
    w = te.placeholder((NT, K, V, L), kernel.storage, name="w")
    bias = te.placeholder((NT, V, L), "float32", name="bias") if kernel.bias else None
    k = te.reduce_axis((0, K), "k")
    total = te.compute(
        (NT, M, V, L),
        lambda t, m, v, j: te.sum(x[m, k] * T.Cast("float32", w[t, k, v, j]), axis=[k]),
        name="total",
    )

    def finish(m, n):
        t, v, j = n // (V * L), n % (V * L) // L, n % L
        return total[t, m, v, j] + bias[t, v, j] if kernel.bias else total[t, m, v, j]

    out = te.compute((M, NT * V * L), finish, name="out")
    operands = [operand for operand in (x, w, bias, out) if operand is not None]
    func = te.create_prim_func(operands).with_attr({"global_symbol": kernel.name, "tirx.noalias": True})
    return _schedule(func, decisions or default(kernel), isa).mod["main"].with_attr("global_symbol", kernel.name)


def tile_of(isa: InstructionSet) -> tuple[int, int]:
    """Return V and L, the vectors of a tile of columns and the floats of a vector: 4 rows fit the registers."""
    return _TILES.get(isa.family, _ARM_TILE)


def packed_shape(columns: int, channels: int, isa: InstructionSet) -> tuple[int, int, int, int]:
    """Shape of the weights of [columns, channels], a multiple of `CHANNEL_BLOCK` of these."""
    V, L = tile_of(isa)
    return -(-columns // (V * L)), channels, V, L


def _schedule(func, decisions: dict[str, int], isa: InstructionSet) -> Schedule:
    """Threads take tiles of columns; a register tile of rows sums over all channels."""
    sch = Schedule(func)
    total, out = sch.get_sblock("total"), sch.get_sblock("out")
    m, n = sch.get_loops(out)
    t, v, j = sch.split(n, [None, *tile_of(isa)])
    m, r = sch.split(m, [None, decisions["rows"]])
    sch.reorder(t, m, r, v, j)
    if decisions["parallel"]:
        sch.parallel(t)
    _vector_tile(sch, r, v, j)
    sch.compute_at(total, m, preserve_unit_loops=True)
    *_, r, v, j, k = sch.get_loops(total)
    outer, inner = sch.split(k, [None, decisions["channels"]])
    sch.reorder(outer, inner, r, v, j)
    sch.unroll(inner)
    _vector_tile(sch, r, v, j)
    init = sch.decompose_reduction(total, outer)
    _vector_tile(sch, *sch.get_loops(init)[-3:])
    return sch


def _vector_tile(sch: Schedule, r, v, j) -> None:
    sch.unroll(r)
    sch.unroll(v)
    sch.vectorize(j)
