"""Matrix products: reference, plain TIR and every tensorized kernel agree, integers bit for bit."""

import re
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import tvm

from agq_tvm.errors import AgqError
from agq_tvm.kernels import linear
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_schedule import row_tile
from agq_tvm.kernels.linear_space import default
from tests.kernels.operands import compiled, corner_operands, native, random_operands, target_of

NATIVE = ("avx512vnni", "avx512vnni-xeon", "avx2", "generic")
# K and N are no multiples of any tile or group.
FORMS = [
    LinearKernel(1, 100, 150, 4, 32, True, "float16", False),
    LinearKernel(8, 100, 150, 4, 128, False, None, True),
    LinearKernel(6, 65, 190, 4, 64, True, "float32", False),
    LinearKernel(12, 97, 130, 4, 32, True, None, False),
    LinearKernel(1, 70, 130, 4, 64, False, None, False),
    LinearKernel(1, 97, 100, 8, 32, True, None, False),
    LinearKernel(8, 97, 100, 8, 32, True, None, False),
    LinearKernel(1, 97, 100, 8, 32, True, None, False, terms=2),
    LinearKernel(3, 65, 100, 8, 32, True, None, True, terms=2),
    LinearKernel(1, 65, 190, 8, 64, False, None, True),
    LinearKernel(6, 65, 300, 8, 128, False, None, False, 4),
]


def assembly_of(kernel: LinearKernel, isa) -> str:
    return assembly_text(linear.build(kernel, isa), isa)


def assembly_text(func, isa) -> str:
    library = tvm.compile(tvm.IRModule({"main": func}), target=target_of(isa.name))
    return library.mod.inspect_source("asm")


@pytest.mark.parametrize("isa,form", [*product(NATIVE, ("tensorized", "plain")), ("avxvnni", "tensorized")])
@pytest.mark.parametrize("kernel", FORMS, ids=lambda kernel: kernel.name)
def test_exact_in_integers(isa, kernel, form):
    isa = native(isa)
    plain = form == "plain"
    func = linear.define(kernel, isa) if plain else linear.build(kernel, isa)
    function = compiled(func, isa.name)
    for name, operands in {"random": random_operands(kernel, 1), **corner_operands(kernel)}.items():
        operands = operands.integer_form()
        np.testing.assert_array_equal(operands.run(function, isa), operands.expected(), err_msg=name)


@pytest.mark.parametrize("bits,longest", [(4, 2176), (8, 128)])
@pytest.mark.parametrize("offsets", [None, "float16"])
def test_sums_are_floats_as_long_as_these_hold_them(bits, longest, offsets):
    """15 x 127 x 2176 = 4145280 < 2^22, and 255 x 127 x 128 as well: one k-block more has to be converted."""
    isa = native("avx512vnni-xeon")
    for channels, floats in ((longest, True), (longest + 32, False)):
        kernel = LinearKernel(32, 64, channels, bits, channels, True, offsets, False)
        func = linear.build(kernel, isa, default(kernel, isa) | {"inline": 0})
        assert ("vcvtdq2ps" not in assembly_text(func, isa)) == floats
        function = compiled(func, isa.name)
        for name, operands in corner_operands(kernel).items():
            operands = operands.integer_form()
            np.testing.assert_array_equal(operands.run(function, isa), operands.expected(), err_msg=name)


@pytest.mark.parametrize("kernel", FORMS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("isa", NATIVE)
def test_scaled_result(isa, kernel):
    isa = native(isa)
    operands = random_operands(kernel, 3)
    expected = operands.expected()
    got = operands.run(compiled(linear.build(kernel, isa), isa.name), isa)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_each_group_has_its_own_sum():
    """With one group's scale at 1 and the others at 0, the kernel returns that group's accumulators."""
    isa = native("generic")
    kernel = LinearKernel(4, 40, 150, 4, 32, True, "float16", False)
    function, operands = compiled(linear.build(kernel, isa), isa.name), random_operands(kernel)
    dots = operands.dots()
    for group in range(kernel.groups):
        one = operands.integer_form()
        one.scales[:] = np.arange(kernel.groups) == group
        np.testing.assert_array_equal(one.run(function, isa), dots[:, group])


@pytest.mark.parametrize("isa", [name for name in INSTRUCTION_SETS if name != "generic"])
@pytest.mark.parametrize("rows,bits", [(1, 4), (8, 4), (1, 8), (8, 8)])
def test_instruction_is_in_the_code(isa, rows, bits):
    isa = INSTRUCTION_SETS[isa]
    kernel = LinearKernel(rows, 64, 128, bits, 32, True, None, False)
    assembly = assembly_of(kernel, isa)
    instruction = isa.multiply(bits, 8, kernel.packed, rows).instruction
    assert re.search(rf"\b{instruction}\b", assembly)
    if "neon" in isa.name:
        # Upper halves of vectors are multiplied where they are, without an instruction to fetch them.
        assert re.search(rf"\b{instruction}2\b", assembly)
        assert not re.search(r"\b[su]dot\b", assembly)


@pytest.mark.parametrize(
    "isa,rows,counts",
    [
        # 4 groups of 8 steps of 4 channels, 4 vectors of 8 columns, 2 rows; `smlal` has its 8 steps unrolled.
        ("neon", 2, {"mul": 256, "mla": 256, "saddlp": 32, "sadalp": 224, "smlal": 0, "smlal2": 0}),
        ("neon", 1, {"smull": 4, "smull2": 4, "smlal": 60, "smlal2": 60, "mla": 0}),
        ("neon-paper", 2, {"mul": 32, "orr": 32, "smlal": 0, "mla": 0}),
        ("neon-paper", 1, {"mul": 16, "orr": 16, "smlal": 0, "mla": 0}),
    ],
)
def test_multiplies_of_4bit_activations(isa, rows, counts):
    """16 products in a `mul` or `mla` of byte lanes, 8 in one of Algorithm 1."""
    kernel = LinearKernel(rows, 64, 512, 4, 32, True, None, False, activation_bits=4)
    assembly = assembly_of(kernel, INSTRUCTION_SETS[isa])
    found = Counter(re.findall(r"^\t(\w+)\tv\d+\.", assembly, re.MULTILINE))
    assert {name: found[name] for name in counts} == counts
    if isa == "neon-paper":
        # LLVM clears the bytes of 0x00FF00FF's complement (`bic`) where that is shorter.
        assert found["and"] + found["bic"] >= found["orr"] <= found["shl"]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("isa", [name for name in INSTRUCTION_SETS if "neon" not in name])
def test_4bit_activations_take_the_same_kernel_where_there_is_none_better(isa, rows):
    isa, kernel = INSTRUCTION_SETS[isa], LinearKernel(rows, 100, 150, 4, 32, True, None, False)
    narrow = replace(kernel, activation_bits=4)
    assert narrow.name == kernel.name.replace("w4a8", "w4a4")
    func = linear.build(narrow, isa).with_attr("global_symbol", kernel.name)
    tvm.ir.assert_structural_equal(func, linear.build(kernel, isa))


@pytest.mark.parametrize("bits,activation_bits,longest", [(4, 8, 1127288), (8, 8, 66311), (8, 4, 1203072)])
def test_sums_that_could_leave_32_bits_are_refused(bits, activation_bits, longest):
    """255 x 127 x 66311 = 2147481735 < 2^31, as stored codes are unsigned on some instruction sets."""
    form = LinearKernel(1, 64, longest, bits, longest, True, None, False, activation_bits)
    with pytest.raises(AgqError, match=f"groups of {longest} or fewer"):
        replace(form, group_size=longest + 1)


def test_accumulators_stay_in_registers():
    """The inner block of prefill stores nothing: its loads and multiplies stand without a spill between."""
    isa = INSTRUCTION_SETS["avx512vnni"]
    kernel = LinearKernel(8, 64, 512, 4, 128, True, None, False)
    lines = assembly_of(kernel, isa).splitlines()
    multiplies = [i for i, line in enumerate(lines) if "vpdpbusd" in line]
    between = [line for line in lines[multiplies[0] : multiplies[-1]] if re.search(r"vmov\w+\s+%zmm\d+, .*\(", line)]
    assert len(multiplies) == 8 * 8
    assert between == []


def test_row_tile_divides():
    assert [row_tile(rows, 4) for rows in (1, 2, 3, 6, 7, 8, 128)] == [1, 2, 3, 3, 1, 4, 4]


@pytest.mark.parametrize("rows,channels,panel", [(1, 4096, 1), (16, 11008, 86), (128, 4096, 16), (128, 11008, 43)])
def test_panels_are_as_long_as_the_cache_allows(rows, channels, panel):
    """Packed codes of 64 columns, 32 bytes for a channel, and all rows of activations: about 400 KB."""
    made = default(LinearKernel(rows, 4096, channels, 4, 128, True, None, False), INSTRUCTION_SETS["avx512vnni"])
    assert (made["panel"], made["inline"]) == (panel, 1)


def test_other_instruction_sets_unpack_once_for_several_rows():
    kernel = LinearKernel(16, 4096, 4096, 4, 32, True, None, False)
    unpacked = {name for name, isa in INSTRUCTION_SETS.items() if not default(kernel, isa)["inline"]}
    assert unpacked == set(INSTRUCTION_SETS) - {"avx512vnni"}


@pytest.mark.parametrize("rows,vectors", [(4, 4), (8, 2)])
def test_tiles_fetch_their_own_weights_ahead(rows, vectors):
    """A line for each vector of each of 4 steps; those of the vectors of other tiles are left to these."""
    kernel = LinearKernel(rows, 128, 512, 4, 128, True, None, False)
    assert assembly_of(kernel, INSTRUCTION_SETS["avx512vnni-xeon"]).count("prefetcht0") == 4 * vectors


def test_xeons_unpack_once_for_many_rows_and_fetch_ahead():
    """Groups of 32: no more k-blocks together than there are tiles of rows."""
    rows, isa = (1, 2, 8, 9, 16, 32, 128), INSTRUCTION_SETS["avx512vnni-xeon"]
    made = [default(LinearKernel(M, 4096, 4096, 4, 32, True, None, False), isa) for M in rows]
    assert [each["inline"] for each in made] == [1, 1, 1, 0, 0, 0, 0]
    assert [(each["rows"], each["vectors"]) for each in made] == [(1, 4), (2, 4), (8, 2), (3, 4), *[(4, 4)] * 3]
    assert [each["panel"] for each in made] == [1, 1, 1, 2, 4, 8, 8]
    assert {each["ahead"] for each in made} == {8}
    wide = default(LinearKernel(16, 4096, 4096, 8, 32, True, None, False), isa)
    assert (wide["rows"], wide["vectors"], wide["panel"], wide["inline"], wide["ahead"]) == (4, 4, 8, 0, 0)


@pytest.mark.parametrize("ahead", [0, 8])
def test_many_rows_fetch_the_next_panel(ahead):
    """All lines of it, each tile of rows its part."""
    isa, kernel = INSTRUCTION_SETS["avx512vnni-xeon"], LinearKernel(24, 128, 1024, 4, 32, True, "float16", False)
    func = linear.build(kernel, isa, default(kernel, isa) | {"rows": 4, "panel": 16, "ahead": ahead})
    loops, _, prefetches = func.script().partition("llvm.prefetch")
    assert bool(prefetches) == bool(ahead)
    if ahead:
        assert int(re.findall(r"in range\((\d+)\)", loops)[-1]) == -(-64 * 512 // 2 // 64 // 6)
