"""The schedule of integer matrix products, `linear.py`, `linear_shifted.py` and `linear_grid.py`, from decisions."""

from dataclasses import dataclass, replace

from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.intrin.grid_intrin import grid_dot_intrinsic, grid_unpack_intrinsic
from agq_tvm.kernels.intrin.tensor_intrin import Tile, intrinsic
from agq_tvm.tvm_seam import Schedule


@dataclass(frozen=True)
class Plan:
    """How a matrix product is computed.

    Attributes
    ----------
    rows, vectors : int
        Of the register tile.
    panel : int
        Groups that a register tile goes through at a time; their codes are unpacked together.
    inline : bool
        Whether codes are unpacked and scales widened in registers, wherever they are multiplied, instead of once for
        all rows of a task.
    split : bool
        Whether a task takes the `vectors` of a tile of columns instead of all of them.
    blocks : int
        Tasks that share the rows.
    parallel : bool
        Whether threads share the tasks.
    unroll : int
        Groups that follow each other without a loop.
    columns_first : bool
        Whether a panel goes through the rows for some vectors of columns, then for the next.
    ahead : int
        How far ahead packed codes are fetched: see `Tile`; by one panel where they are unpacked once, see `fetches`.
    """

    rows: int
    vectors: int
    panel: int = 1
    inline: bool = False
    split: bool = False
    blocks: int = 1
    parallel: bool = True
    unroll: int = 1
    columns_first: bool = False
    ahead: int = 0

    @property
    def fetches(self) -> bool:
        """Whether there is the block of `linear_fetch.py`."""
        return self.ahead > 0 and not self.inline


def row_tile(rows: int, limit: int) -> int:
    """Return the largest number of rows up to `limit` that divides `rows`."""
    return next(r for r in range(min(rows, limit), 0, -1) if rows % r == 0)


def schedule(
    func,
    kernel,
    isa: InstructionSet,
    plan: Plan,
    total: str,
    conversions: list[str],
    shifted: bool = False,
    grid: bool = False,
) -> Schedule:
    """Tile, unpack, tensorize and vectorize a matrix product of the blocks `conversions`, ``dot``, `total`, ``out``.

    Tasks are tiles of columns or parts of them, and perhaps blocks of rows. Inside a task the groups run outermost:
    packed codes are read directly; others are unpacked once for each panel, and the next panel's are fetched meanwhile
    if there is a block ``fetch``. Scales are applied at group ends.

    Parameters
    ----------
    func : PrimFunc
    kernel : LinearKernel, or what has the same properties
    isa : InstructionSet
    plan : Plan
    total : str
        The block that puts the dot products of groups together; its reduction is over the groups.
    conversions : list of str
        Blocks that read weights and scales.
    shifted : bool
        See `Tile`.
    grid : bool
        Whether codes are put on an integer grid when they are unpacked.
    """
    layout = isa.layout(kernel.bits)
    sch = Schedule(func)
    dot, scaled, out = (sch.get_sblock(name) for name in ("dot", total, "out"))
    task = _tasks(sch, out, plan, layout)
    # total: inside a task, panels of groups outermost, then register tiles, which go through the groups of a panel.
    sch.compute_at(scaled, task, preserve_unit_loops=True)
    *_, m, v, j, g = sch.get_loops(scaled)
    m, r = sch.split(m, [None, plan.rows])
    vo, v = sch.split(v, [None, plan.vectors])
    g, gi = sch.split(g, [None, plan.panel])
    sch.reorder(g, *((vo, m) if plan.columns_first else (m, vo)), gi, r, v, j)
    _vector_tile(sch, r, v, j)
    if plan.fetches:
        sch.compute_at(sch.get_sblock("fetch"), m)
    if plan.unroll > 1:
        gi, inner = sch.split(gi, [None, plan.unroll])
        sch.unroll(inner)
        gi = inner
    # dot: one register tile at a time.
    sch.compute_at(dot, gi, preserve_unit_loops=True)
    packed = plan.inline and kernel.bits == 4
    stored = layout.vectors if plan.vectors < layout.vectors and (packed or kernel.bits == 8) else 0
    side_by_side, ahead = replace(layout, vectors=plan.vectors), plan.ahead if packed else 0
    tile = Tile(plan.rows, side_by_side, packed, 0, shifted, stored, ahead)
    if grid and not plan.inline:
        _unpack_grid(sch, isa, tile, layout, g)
    else:
        _place_conversions(sch, conversions, plan.inline, g)
    *_, r, v, j, kb, s, h, i = sch.get_loops(dot)
    sch.reorder(kb, *((r, v) if plan.vectors > 1 else (v, r)), j, s, h, i)
    name = grid_dot_intrinsic(isa, tile) if grid and packed else intrinsic(isa, tile, kernel.activation_bits)
    if name is None:
        sch.reorder(kb, s, h, i, r, v, j)
        _vector_tile(sch, r, v, j)
        sch.decompose_reduction(dot, kb)
    else:
        init = sch.decompose_reduction(dot, kb)
        _vector_tile(sch, *sch.get_loops(init)[-3:])
        sch.tensorize(r if plan.rows > 1 else v if plan.vectors > 1 else j, name)
    sch.decompose_reduction(scaled, g)
    return sch


def _tasks(sch: Schedule, out, plan: Plan, layout):
    """Split the result into tasks, and return their loop."""
    m, n = sch.get_loops(out)
    t, v, j = sch.split(n, [None, layout.vectors, layout.lanes])
    tasks = [t]
    if plan.split:
        part, v = sch.split(v, [None, plan.vectors])
        tasks.append(part)
    if plan.blocks > 1:
        block, m = sch.split(m, [plan.blocks, None])
        tasks.append(block)
    sch.reorder(*tasks, m, v, j)
    sch.vectorize(j)
    sch.unroll(v)
    task = sch.fuse(*tasks) if len(tasks) > 1 else t
    if plan.parallel:
        sch.parallel(task)
    return task


def _vector_tile(sch: Schedule, r, v, j) -> None:
    sch.unroll(r)
    sch.unroll(v)
    sch.vectorize(j)


def _place_conversions(sch: Schedule, names: list[str], inline: bool, g) -> None:
    """Unpack codes and widen scales once for each panel of a task, or where they are used."""
    for name in names:
        block = sch.get_sblock(name)
        if inline:
            sch.compute_inline(block)
            continue
        sch.compute_at(block, g, preserve_unit_loops=True)
        loops = sch.get_loops(block)
        lanes = sch.fuse(*loops[-2:]) if name == "unpack" else loops[-1]
        sch.vectorize(lanes)
        for loop in loops[-4:-2] if name == "unpack" else loops[-2:-1]:
            sch.unroll(loop)


def _unpack_grid(sch: Schedule, isa: InstructionSet, tile: Tile, layout, g) -> None:
    """Put the codes of a panel on their grid, the vectors of a register tile side by side."""
    block = sch.get_sblock("unpack")
    sch.compute_at(block, g, preserve_unit_loops=True)
    *_, s, h, v, j, i = sch.get_loops(block)
    sch.reorder(v, s, h, j, i)
    vectors = tile.layout.vectors
    tile = replace(tile, rows=1, packed=True, stored=layout.vectors if vectors < layout.vectors else 0)
    sch.tensorize(v if vectors > 1 else s, grid_unpack_intrinsic(isa, tile))
