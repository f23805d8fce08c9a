"""The table of kernels: complete, named by the grammar, and the page in docs/ is it."""

from pathlib import Path

import pytest

from agq_tvm.errors import AgqError
from agq_tvm.flow import packing
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_grid import GridKernel
from agq_tvm.kernels.linear_shifted import ShiftedKernel
from agq_tvm.kernels.names import SIZES, parse_name
from agq_tvm.kernels.table import ANY, as_dicts, as_markdown, devices_of, kernel_table
from agq_tvm.targets import device_names, known

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
TABLE = kernel_table()


def test_table_names_every_kernel_once():
    rows = [row for row in TABLE if row.instruction_set != ANY]
    assert len({(row.name, row.bits) for row in rows}) == len(rows)
    panels = [row for row in rows if row.name.startswith("panels.")]
    few = [row for row in rows if row.operation.endswith("up to 8 rows")]
    grids = [row for row in rows if row.operation.startswith("grid ")]
    assert len(rows) - len(panels) - len(few) - len(grids) == 14 * len(INSTRUCTION_SETS)
    assert {row.instruction_set for row in grids} == {name for name, isa in INSTRUCTION_SETS.items() if isa.grids}
    assert {row.instruction_set for row in few} == {"avx512vnni-xeon"} and len(few) == 4
    assert {row.instruction_set for row in panels} == {name for name, isa in INSTRUCTION_SETS.items() if isa.assembly}
    assert len({row.name for row in TABLE if row.instruction_set == ANY}) == len(TABLE) - len(rows)


def test_table_tells_what_multiplies_4bit_activations():
    rows = {(row.instruction_set, row.bits, row.operation): row for row in TABLE}
    for isa in INSTRUCTION_SETS:
        for operation in ("gemv", "gemm"):
            assert rows[isa, "w4a8", f"shifted {operation}"].name != rows[isa, "w4a8", operation].name
            own = rows[isa, "w4a4", operation].name != rows[isa, "w4a8", operation].name
            assert own == ((isa, operation) in {("neon", "gemm"), ("neon-paper", "gemv"), ("neon-paper", "gemm")})


def test_rows_have_what_runs_them_and_what_packs_for_them():
    for row in as_dicts():
        assert set(row["features"]) == set(known.INSTRUCTION_SET_NEEDS.get(row["instruction_set"], ()))
        for name in row["packer"].split(", "):
            assert name == "-" or callable(getattr(packing, name))
        assert (row["packer"] == "-") <= (row["instruction_set"] == ANY)
    chosen = [name for isa in INSTRUCTION_SETS for name in devices_of(isa)]
    assert sorted(chosen) == device_names() == list(devices_of(ANY))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_name_parses_to_what_the_row_says(row):
    parsed = parse_name(row.name)
    if row.instruction_set == ANY:
        assert parsed["sizes"] and set(parsed["sizes"]) <= set(SIZES)
        return
    layout = parsed["layout"]
    width = layout["vectors"] * layout["lanes"]
    assert parsed["instruction_set"] == row.instruction_set
    assert row.tile.split("x")[:2] == [str(parsed["rows"]), str(width)]
    assert row.bits.startswith(f"w{layout['bits']}a")
    assert ("activations" in parsed) <= row.bits.endswith("a4")
    assert parsed["operation"].startswith("shift_") == row.operation.startswith("shifted")


def test_names_of_functions_parse():
    linear = LinearKernel(128, 5632, 2048, 4, 32, True, "float16", True)
    shifted = ShiftedKernel(1, 64, 96, None)
    grid = GridKernel(128, 64, 96, 32, True)
    for kernel, operation in (
        (linear, "linear_w4a8g32_group_asym_bias"),
        (shifted, "linear_w4a8column_shift_sym_bias"),
        (grid, "linear_w4a8g32_grid_bias"),
    ):
        sizes = {"m": kernel.rows, "n": kernel.columns, "k": kernel.channels}
        assert parse_name(kernel.name) == {"operation": operation, "sizes": sizes}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "m128",
        "linear",
        "linear_x3",
        "agq.dot.neon.u4_v4x8.packed.m1",
        "agq.sum.neon.u4_v4x8_k2.packed.m1",
        "a.b.m0",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(AgqError, match="is not the name of a kernel"):
        parse_name(name)


def test_the_page_has_the_table():
    """Made by ``agq kernels --markdown``; put what it prints between the two marks."""
    text = PAGE.read_text(encoding="utf-8")
    before, mark, rest = text.partition("<!-- agq kernels --markdown -->\n")
    table, end, _ = rest.partition("<!-- end of the table -->\n")
    assert mark and end and table.strip() == as_markdown().strip()
    for name in SIZES:
        assert f"`{name}`" in before
