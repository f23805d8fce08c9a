"""What the virtual machine is left to do."""

import re

import pytest

from agq_tvm.kernels.attention_form import attention_form
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.models.registry import describe
from agq_tvm.models.relax_decoder import build_decoder
from agq_tvm.passes import pipeline
from agq_tvm.passes.quantize_linears import LinearFormat
from agq_tvm.passes.share_tensors import ShareTensors
from agq_tvm.tvm_seam import tvm
from tests.kernels.operands import target_of
from tests.tiny import tiny_config

LAYERS = 5


@pytest.fixture(scope="module")
def decode():
    """The source of `decode`, memory planned, before the pass and after it."""
    isa = INSTRUCTION_SETS["avx512vnni"]
    module = build_decoder(describe(tiny_config(num_hidden_layers=LAYERS)), 64, attention_form(isa))
    phases = pipeline.phases(LinearFormat(4, 32, "per-token-group", "float16"), isa)
    passes = [step for name, steps in phases if name not in ("schedule_kernels", "lower") for step in steps]
    lowering = pipeline.lowering()
    sharing = next(i for i, step in enumerate(lowering) if isinstance(step, ShareTensors))
    with target_of("avx512vnni"):
        planned = tvm.transform.Sequential([*passes, *lowering[:sharing]])(module)
        shared = lowering[sharing](planned)
    return tuple(mod["decode"].script(show_meta=False) for mod in (planned, shared))


def allocations(source: str) -> list[str]:
    return re.findall(r"alloc_tensor\((storage\w*, .*)\)$", source, re.M)


def kernels(source: str) -> list[str]:
    return re.findall(r"^ *(?:cls\.)?(\w+_m1_\w+|add\w*)\(", source, re.M)


def test_tensors_of_one_place_are_made_once(decode):
    before, after = decode
    assert len(set(allocations(before))) < len(allocations(before)) / 3
    assert sorted(allocations(after)) == sorted(set(allocations(before)))


def test_every_kernel_is_still_called(decode):
    before, after = decode
    assert len(kernels(before)) > 8 * LAYERS
    assert kernels(after) == kernels(before)


def test_nothing_is_made_that_is_not_read(decode):
    after = decode[1]
    assert "R.Tuple" in decode[0].split("force_pure", 1)[1]
    assert "R.Tuple" not in after.split("force_pure", 1)[1]
    for name in re.findall(r"^ *(\w+): R\.", after, re.M):
        assert len(re.findall(rf"\b{name}\b", after)) > 1, name
