"""The design space of integer matrix products: `linear_schedule.Plan` says what the decisions mean."""

import math

from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.layout import K_BLOCK
from agq_tvm.kernels.linear_schedule import row_tile
from agq_tvm.kernels.space import Space, divisors

_SUMS = {"avx512vnni": 24, "generic": 8}
_OTHER_SUMS = 12
_MOST_ROWS = 16
_PANELS = (1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 32)
_PARTS = (1, 2, 4, 8)
"""Of all groups, panels besides, where codes are unpacked in registers."""
_PANEL_BYTES = 400 << 10
"""Packed weights and activation codes of a panel, about, that stay next to the core; the other half is for others."""
_SHORT_GROUP = 32
"""Of 8-bit weights: their tiles are smaller."""
_UNROLLS = (1, 2, 4)
_BLOCKS = (1, 2, 4)
_AHEAD_OF_ONE_ROW, _AHEAD = (0, 2, 4, 8, 16, 32), (0, 8)
_MOST_MULTIPLIES = 1024
"""Of a loop's body: beyond, compiling takes long and instructions leave their cache."""


def default(kernel, isa: InstructionSet) -> dict[str, int]:
    """Return the decisions made by hand."""
    inline = _inline(kernel, isa)
    rows, vectors = _tile(kernel, isa, inline)
    return {
        "rows": rows,
        "vectors": vectors,
        "panel": _panel(kernel, isa, inline, kernel.code_rows // rows),
        "inline": int(inline),
        "split": 0,
        "blocks": 1,
        "parallel": 1,
        "unroll": 1,
        "columns_first": 0,
        "ahead": isa.ahead if (inline and kernel.bits == 4) or fetches(kernel, isa) else 0,
    }


def _inline(kernel, isa: InstructionSet) -> bool:
    if kernel.code_rows == 1:
        return True
    return isa.inlines(kernel.code_rows) and not (kernel.bits == 8 and isa.inline_most)


def _tile(kernel, isa: InstructionSet, inline: bool) -> tuple[int, int]:
    """Return rows and vectors of a register tile."""
    if inline and kernel.bits == 4 and isa.inline_tile and kernel.code_rows > 1:
        rows = row_tile(kernel.code_rows, isa.inline_tile[0])
        return rows, row_tile(isa.layout_4bit.vectors, math.prod(isa.inline_tile) // rows)
    # Sums of larger tiles leave registers whenever a group ends, which short groups do too often.
    short = kernel.bits == 8 and inline and kernel.group_size <= _SHORT_GROUP
    return row_tile(kernel.code_rows, isa.rows if short else isa.product_rows), isa.tile(kernel.bits, inline).vectors


def fetches(kernel, isa: InstructionSet) -> bool:
    """Whether codes that are unpacked together are enough to fetch the next ones meanwhile, see `linear_fetch.py`."""
    return kernel.bits == 4 and isa.ahead > 0 and isa.panel > K_BLOCK


def _panel(kernel, isa: InstructionSet, inline: bool, tiles_of_rows: int) -> int:
    if kernel.code_rows == 1:
        return 1
    if not inline:
        channels = min(isa.panel, K_BLOCK * tiles_of_rows) if fetches(kernel, isa) else isa.panel
        return row_tile(kernel.groups, max(1, channels // kernel.group_size))
    if isa.ahead:  # 4-bit codes, then: see `_inline`
        return 1
    # The first rows fetch a tile's weights from memory, the longer without a pause the better; others find them cached.
    group = kernel.group_size * (kernel.code_rows + isa.layout(kernel.bits).width * kernel.bits // 8)
    panels = divisors(kernel.groups, kernel.groups)
    return min(panels, key=lambda panel: abs(math.log(panel * group / _PANEL_BYTES)))


def most_sums(isa: InstructionSet) -> int:
    """Return how many vectors of sums stay in registers, next to weights and activations."""
    return _SUMS.get(isa.family, _OTHER_SUMS)


def space(kernel, isa: InstructionSet, threads: int = 1) -> Space:
    """Return the decisions of a `LinearKernel`; with one thread, there is none about sharing."""
    made, layout = default(kernel, isa), isa.layout(kernel.bits)
    one_row, several = kernel.code_rows == 1, threads > 1
    multiply = isa.multiply(kernel.bits, kernel.activation_bits, True)
    vectors = tuple(v for v in (1, 2, 4) if layout.vectors % v == 0)
    parts = _PARTS if isa.inline_rows and not one_row else ()
    panels = {*_PANELS, *(kernel.groups // n for n in parts if kernel.groups >= n)}
    choices = {
        "rows": divisors(kernel.code_rows, _MOST_ROWS),
        "vectors": vectors,
        "panel": tuple(panel for panel in panels if kernel.groups % panel == 0),
        "inline": (1,) if one_row else (0, 1),
        "split": (0, 1),
        "blocks": _BLOCKS if several and kernel.terms == 1 else (1,),
        "parallel": (0, 1) if several else (1,),
        "unroll": _UNROLLS,
        "columns_first": (0, 1),
        "ahead": (0,) if multiply is None or kernel.bits == 8 else _AHEAD_OF_ONE_ROW if one_row else _AHEAD,
    }
    choices = {name: tuple(sorted({made[name], *values})) for name, values in choices.items()}

    def rule(d: dict[str, int]) -> bool:
        return d == made or all(_fits(kernel, isa, layout, d))

    return Space(choices, made, rule)


def _fits(kernel, isa: InstructionSet, layout, d: dict[str, int]):
    packed, partial = d["inline"] and kernel.bits == 4, d["vectors"] < layout.vectors
    multiply = isa.multiply(kernel.bits, kernel.activation_bits, bool(packed), d["rows"])
    yield d["rows"] * d["vectors"] <= most_sums(isa)
    yield kernel.code_rows % (d["rows"] * d["blocks"]) == 0
    yield d["panel"] % d["unroll"] == 0
    yield d["unroll"] * d["rows"] * d["vectors"] * kernel.group_size // layout.depth <= _MOST_MULTIPLIES
    yield partial or not (d["split"] or d["columns_first"])
    yield not d["split"] or (d["blocks"] == 1 and not d["columns_first"])
    yield not d["columns_first"] or d["rows"] < kernel.code_rows
    yield d["parallel"] or not (d["split"] or d["blocks"] > 1)
    yield not d["ahead"] or packed or fetches(kernel, isa)
    if multiply is None:
        yield not partial or not d["inline"]
    elif multiply.implement:
        yield d["vectors"] > 1
