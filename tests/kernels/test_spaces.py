"""Design spaces: every point builds the same kernel, the default is what is built without decisions."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import tvm

from agq_tvm.errors import AgqError
from agq_tvm.kernels import linear_grid, tunable
from agq_tvm.kernels.attrs import describe
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS, instruction_set
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.names import parse_name
from agq_tvm.kernels.norm import LayerNormKernel
from agq_tvm.kernels.prune import SelectKernel
from agq_tvm.kernels.space import Space
from agq_tvm.passes.schedule_kernels import ScheduleKernels
from tests.kernels.operands import device_here, native, random_operands
from tests.kernels.spaces import GRIDS, OTHERS, PRODUCTS, attentions, build_all, outputs

NATIVE = ("avx512vnni", "avx512vnni-xeon", "avx2", "generic")
CHECKSUMS = {
    "LinearKernel": {3: "c23785a3e6a6ccff", 4: "11aa01c3ba7d87bc"},
    "ShiftedKernel": {2: "8e838263743b2205"},
    "DenseKernel": {1: "57cde6e07a612a66"},
    "FloatLinearKernel": {1: "cbbffb0ef68b2118"},
    "QuantizeKernel": {1: "2b01c394484b74b1"},
    "LayerNormKernel": {1: "e5c79971077da975"},
    "AttentionKernel": {2: "5f35cf2cadc37a18"},
    "GridKernel": {1: "e02130f6ddfe7955", 2: "f81835d469c48b6a", 3: "4cb9c2a15614355f"},
}
"""Of the spaces of `_examples`, by version: a line is added when a version is raised, none is changed."""
ADDED = {
    "avx512vnni-xeon": {
        "LinearKernel": {3: "7b51f2b24ae0dbd7", 4: "7ea76d1b0a191829"},
        "ShiftedKernel": {2: "84c29ede7702e482"},
        "DenseKernel": {1: "65b2ad4bee4d42b4"},
        "FloatLinearKernel": {1: "7d6ba15184916935"},
        "QuantizeKernel": {1: "51579484741114d8"},
        "LayerNormKernel": {1: "ae858404d36d2370"},
        "AttentionKernel": {2: "cd17b40ae97fedc0"},
        "GridKernel": {1: "e242dfb12888ab66", 2: "860c4da29920c691", 3: "c9e479ab9207d4d1"},
    },
    "dotprod": {"GridKernel": {3: "1c550bbb9d851169"}},
    "i8mm": {"GridKernel": {3: "a68c9028c7ede636"}},
}
"""The same of instruction sets that came later to a kind of kernels: they leave the others as they were."""


def _examples(isa):
    return [*PRODUCTS, *OTHERS, *attentions(isa), *(kernel for kernel in GRIDS if linear_grid.applies(kernel, isa))]


def _library(built: dict, isa: str):
    target = tvm.target.Target(device_here(isa).tvm_target())
    return tvm.compile(tvm.IRModule({name: func for name, (_, func) in built.items()}), target=target)


@pytest.mark.parametrize("isa", NATIVE)
def test_all_points_of_products_are_exact(isa):
    built = build_all(PRODUCTS, native(isa))
    library = _library(built, isa)
    for name, (kernel, _) in built.items():
        operands = random_operands(kernel, 1).integer_form()
        got = operands.run(library[name], instruction_set(isa))
        np.testing.assert_array_equal(got, operands.expected(), err_msg=f"{kernel.name} {name}")


@pytest.mark.parametrize("isa", NATIVE)
def test_all_points_of_other_kernels_are_as_the_default(isa):
    """What kernels compute by hand is held to references in their own tests."""
    kernels = [*OTHERS, *attentions(native(isa))]
    built = build_all(kernels, instruction_set(isa))
    library = _library(built, isa)
    for name, (kernel, func) in built.items():
        default = f"{name.partition('_')[0]}_default"
        for got, expected in zip(outputs(library[name], func), outputs(library[default], func), strict=True):
            assert not np.isnan(got).any()
            if got.dtype.kind == "i":
                np.testing.assert_array_equal(got, expected, err_msg=f"{kernel.name} {name}")
            else:
                np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-5, err_msg=f"{kernel.name} {name}")


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_default_is_a_point_and_what_is_built_without_decisions(isa):
    isa = instruction_set(isa)
    for kernel in _examples(isa):
        for threads in (1, 2):
            space = tunable.space_of(kernel, isa, threads)
            if space:
                assert space.default in space.points()
                tvm.ir.assert_structural_equal(
                    tunable.build(kernel, isa, space.default), tunable.build(kernel, isa), map_free_vars=True
                )


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_points_of_one_thread_are_points_of_several(isa):
    isa = instruction_set(isa)
    for kernel in _examples(isa):
        one, several = (tunable.space_of(kernel, isa, threads) for threads in (1, 2))
        for point in one.points() if one else []:
            several.check(point)


def test_attention_has_the_same_decisions_for_every_context():
    isa = instruction_set("generic")
    for kernel in attentions(isa):
        spaces = [tunable.space_of(tunable.specialized(kernel, context), isa, 2) for context in tunable.CONTEXTS]
        spaces.append(tunable.space_of(replace(kernel, fixed=False), isa, 2))
        assert len({space.checksum() for space in spaces}) == 1
        decisions = spaces[0].points()[-1]
        func = tunable.build(replace(kernel, fixed=False, context=48), isa, decisions)
        assert "lengths[0]" in func.script()
        assert "lengths[0]" not in tunable.build(kernel, isa, decisions).script()


def test_what_has_no_decisions():
    isa = instruction_set("generic")
    assert tunable.space_of(SelectKernel(8, 4, 2, 0, 2), isa, 2) is None
    kernel = LayerNormKernel(1, 64, 1e-5)
    assert tunable.space_of(kernel, isa, 2) is None
    with pytest.raises(AgqError, match="nothing to decide"):
        tunable.build(kernel, isa, {"rows": 1})


def test_wrong_decisions_are_refused():
    isa, kernel = instruction_set("avx2"), PRODUCTS[0]
    default = tunable.space_of(kernel, isa, 2).default
    for decisions, complaint in [
        ({}, "missing"),
        (default | {"colour": 1}, "colour unknown"),
        (default | {"rows": 3}, "rows = 3 is not one of"),
        (default | {"split": 1}, "do not go together"),
    ]:
        with pytest.raises(AgqError, match=complaint):
            tunable.build(kernel, isa, decisions)
    with pytest.raises(AgqError, match="not one of"):
        Space({"a": (1, 2)}, {"a": 3})


@pytest.mark.parametrize(
    ("kind", "added"),
    [(kind, None) for kind in tunable.KINDS] + [(kind, isa) for isa, kinds in ADDED.items() for kind in kinds],
)
def test_version_is_raised_with_every_change(kind, added):
    names, versions = hashlib.sha256(), set()
    chosen = [added] if added else [name for name in INSTRUCTION_SETS if kind not in ADDED.get(name, ())]
    for isa in map(instruction_set, chosen):
        for kernel in _examples(isa):
            if type(kernel).__name__ == kind:
                versions.add(tunable.version_of(kernel))
                for threads in (1, 2):
                    space = tunable.space_of(kernel, isa, threads)
                    names.update(f"{tunable.task_name(kernel, isa, threads)} {space and space.checksum()}".encode())
    (version,) = versions
    known = (ADDED[added] if added else CHECKSUMS)[kind]
    assert version in known, f"write {names.hexdigest()[:16]} for version {version}"
    assert known[version] == names.hexdigest()[:16], "the space is another one: raise its version in tunable.py"
    assert len(set(known.values())) == len(known)


@pytest.mark.parametrize("isa", ["avx512vnni", "neon"])
def test_descriptions_make_kernels_again(isa):
    isa = instruction_set(isa)
    for kernel in _examples(isa):
        assert tunable.described(json.loads(json.dumps(describe(kernel))), isa) == kernel
    with pytest.raises(AgqError, match="describes no kernel"):
        tunable.described({"class": "LinearKernel", "rows": 1}, isa)


def test_tiles_of_tuned_products_have_names():
    name = "agq.dot.avx2.u4_v2x8_k4.packed.m4.of4.ahead8"
    kernel, isa = PRODUCTS[0], instruction_set("avx2")
    decisions = {"rows": 4, "vectors": 2, "inline": 1, "ahead": 8}
    tunable.build(kernel, isa, tunable.space_of(kernel, isa).default | decisions)
    assert tvm.s_tir.TensorIntrin.get(name, allow_missing=True) is not None
    parsed = parse_name(name)
    assert (parsed["rows"], parsed["stored"], parsed["ahead"]) == (4, 4, 8)


def test_task_names():
    isa = instruction_set("avx512vnni")
    kernel = LinearKernel(128, 4096, 4096, 4, 32, True, "float16", False)
    name = "linear_w4a8g32_group_asym_m128_n4096_k4096.avx512vnni.u4_v4x16_k4.t2.v4"
    assert tunable.task_name(kernel, isa, 2) == name


def test_the_pass_builds_what_is_chosen():
    isa, chosen = instruction_set("generic"), {}
    for kernel in _examples(isa):
        space = tunable.space_of(kernel, isa, 2)
        chosen[kernel] = space.points()[-1] if space else None
    module = tvm.IRModule({kernel.name: tunable.build(kernel, isa) for kernel in chosen})
    scheduled = ScheduleKernels(isa, chosen.get)(module)
    for kernel, decisions in chosen.items():
        tvm.ir.assert_structural_equal(scheduled[kernel.name], tunable.build(kernel, isa, decisions))
