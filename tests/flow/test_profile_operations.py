"""What a profile times is what a compiled decoder runs, whatever a checkpoint or `agq compile` chose."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from agq_tvm.flow.library import linear_format
from agq_tvm.flow.profile_forms import FLOAT_FORMS, OWN, forms_of
from agq_tvm.flow.profile_kernels import ONCE, Place, time_kernels
from agq_tvm.flow.profile_operations import DecoderOperations
from agq_tvm.kernels import tunable
from agq_tvm.kernels.attention_form import attention_form
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.models.registry import describe
from agq_tvm.models.relax_decoder import build_decoder
from agq_tvm.passes import pipeline
from agq_tvm.passes.schedule_kernels import default
from agq_tvm.quantize.codebooks import CODE_BOOKS
from agq_tvm.quantize.pruning import PruningSchedule
from agq_tvm.quantize.scheme import Scheme
from agq_tvm.targets import load_device
from tests.kernels.operands import target_of
from tests.tiny import tiny_config

FORMS = (*FLOAT_FORMS, "w8a8", "w4a8", "w4a4")
PLAIN = Scheme("rtn", 32, False, "per-token-group")
SHIFTED = Scheme("rtn", "column", False, "static", max_refine=3, shifts=True)
OPT_350M = {"do_layer_norm_before": False, "word_embed_proj_dim": 64}
SHARED = {"apply_residual_connection_post_layernorm": True}


class Source:
    """Stands for a checkpoint, of whose tensors only the type of offsets is asked; no two products are alike."""

    offsets = np.zeros(1, "float16")

    def __init__(self, scheme: Scheme = PLAIN, family: str = "llama", **config):
        self.scheme, self.config = scheme, describe(tiny_config(family, vocab_size=600, **config))

    def fused(self, _layer, parts):
        """Return matrices with offsets."""
        return [self for _ in parts]


def operations(source: Source, isa="avx512vnni", cache="float16", rows=1, only=None, choose=lambda form: default):
    forms, own = forms_of(source, isa, cache)
    wanted = (own,) if only == "own" else only or [form.name for form in forms]
    return DecoderOperations(source, [form for form in forms if form.name in wanted], rows, 64, 16, choose)


def names(made: DecoderOperations) -> list[str]:
    return [operation.name for operation in made.operations]


@pytest.mark.parametrize(
    ("source", "cache", "rows"),
    [
        (Source(replace(PLAIN, head_bits=4, four_bit=("down",))), "int8", 1),
        (Source(replace(PLAIN, activation="none", head_bits=16), "opt", **OPT_350M), "float16", 1),
        (Source(replace(PLAIN, attention="log2"), "bloom", **SHARED), "int8", 8),
        (Source(replace(PLAIN, mixed_bits=5.0, pruning=PruningSchedule((1,), 0.5))), "float16", 8),
        (Source(SHIFTED), "float16", 8),
    ],
    ids=lambda value: None if not isinstance(value, Source) else value.config.family,
)
def test_the_calls_are_those_of_the_compiled_decoder(source, cache, rows, tmp_path):
    """Counted in what `agq compile --debug-dump` writes; times that are taken off cancel those that are added."""
    scheme, function = source.scheme, "decode" if rows == 1 else f"prefill_{rows}"
    isa = instruction_set("avx512vnni", scheme.activation)
    attention = attention_form(isa, cache, CODE_BOOKS.get(scheme.attention))
    module = build_decoder(source.config, 64, attention, scheme.pruning, ("decode", function))
    pipeline.run(module, target_of("avx512vnni"), linear_format(scheme, "float16"), isa, tmp_path)
    text = (tmp_path / "05_schedule_kernels.py").read_text()
    body = re.search(rf"def {function}\(.*?\n\n", text + "\n\n", re.S).group()
    made = operations(source, cache=cache, rows=rows, only="own")
    counted = Counter()
    for operation in made.operations:
        for runs in operation.kernels.values():
            counted.update(runs)
    called = Counter(re.findall(r"R\.call_tir(?:_inplace)?\(cls\.(\w+)", body))
    assert _plain(+counted) == _plain(called) and min(counted.values()) >= 0


def _plain(counts: Counter) -> Counter:
    """Leave out the numbers that TVM gives to kernels of the same name."""
    plain = Counter()
    for name, count in counts.items():
        plain[re.sub(r"^([a-z_]+?)_?\d+$", r"\1", name)] += count
    return plain


@pytest.mark.parametrize(
    ("bits", "words"), [(4, ("linear_w4a8", "embedding_w4")), (8, ("linear_w8a8", "embedding_w8"))]
)
def test_forms_of_integers_have_the_head_of_the_checkpoint(bits, words):
    made = operations(Source(replace(PLAIN, head_bits=bits)), only=("w8a8", "w4a4"))
    found = {each.name: each for each in made.operations if each.name in ("head", "embedding")}
    for name, word in zip(("head", "embedding"), words, strict=True):
        assert len(found[name].kernels) == 2
        assert all(next(iter(runs)).startswith(word) for runs in found[name].kernels.values())
    assert (found["head"].kind, found["head"].section) == ("linear", "head")


def test_forms_of_floats_store_all_weights_as_floats():
    made = operations(Source(replace(PLAIN, head_bits=4)), only=FLOAT_FORMS)
    for operation in made.operations:
        if operation.kind == "linear":
            assert [next(iter(runs)).split("_")[1] for runs in operation.kernels.values()] == ["float32", "float16"]


@pytest.mark.parametrize("cache", ["float16", "int8"])
def test_forms_of_integers_have_the_caches_that_were_chosen(cache):
    made = operations(Source(), cache=cache, only=("float32", "w4a8"))
    (attention,) = (operation for operation in made.operations if operation.kind == "attention")
    for form, expected in {"float32": "float16", "w4a8": cache}.items():
        (name,) = attention.kernels[form]
        cold = [operand for operand in made.kernels[name].operands if operand.cold]
        assert {operand.dtype for operand in cold if len(operand.shape) > 2} == {expected}
        assert len(cold) == (4 if expected == "int8" else 2)


def test_residuals_are_where_the_compiled_model_adds_them():
    assert "residuals" not in names(operations(Source(), only="own"))
    llama = next(each for each in operations(Source(), only="own").operations if each.name == "residuals, norms")
    assert sum(llama.kernels["w4a8"].values()) == 4  # two for each block, the one without a residual among them
    assert any(name.startswith("add_rms_norm") for name in llama.kernels["w4a8"])
    assert "residuals" in names(operations(Source(PLAIN, "opt", **OPT_350M), only="own"))
    assert names(operations(Source(PLAIN, "opt"), only="own")).count("embedding") == 1


def test_sections_follow_each_other_and_quantization_comes_last():
    made = operations(Source(PLAIN, "opt", **OPT_350M), rows=8, only="own")
    assert [each.section for each in made.operations] == sorted(
        (each.section for each in made.operations), key=("embedding", "block", "head").index
    )
    roles = [(each.section, each.name) for each in made.operations if each.kind == "linear"]
    blocks = [("block", name) for name in ("qkv", "o", "up", "down")]
    assert roles == [("embedding", "project_in"), *blocks, ("head", "project_out"), ("head", "head")]
    assert [each.name for each in made.operations if each.section == "block"][-1] == "quantization"


def test_quantization_is_what_fused_kernels_take_beyond_those_without_it():
    made = operations(Source(), only="own").operations
    norms, activation, quantization = (
        next(each.kernels["w4a8"] for each in made if each.name == name)
        for name in ("residuals, norms", "activation", "quantization")
    )
    assert {name: -runs for name, runs in quantization.items() if runs < 0} == dict(norms + activation)
    # In each of two blocks the inputs of qkv, o, gate_up and down.
    assert sum(runs for runs in quantization.values() if runs > 0) == 8


@pytest.mark.parametrize(
    ("changes", "isa", "own"),
    [
        ({}, "neon", "w4a8"),
        ({"weight_bits": 8, "symmetric": True}, "neon", "w8a8"),
        ({"four_bit": ("down", "o", "qkv", "gate_up")}, "neon", "w4a4"),
        ({"four_bit": ("down",)}, "neon", OWN),
        ({"mixed_bits": 5.0}, "neon", OWN),
        ({"activation": "none"}, "neon", OWN),
        ({"activation": "per-token", "integer_grid": True}, "neon", "w4a8"),
        ({"activation": "per-token", "integer_grid": True}, "avx512vnni", OWN),
    ],
)
def test_the_form_of_a_bundle_is_known(changes, isa, own):
    source = Source(replace(PLAIN, **changes))
    source.offsets = None if source.scheme.symmetric else source.offsets
    forms, name = forms_of(source, isa, "float16")
    assert name == own
    assert tuple(form.name for form in forms) == ((*FORMS, OWN) if own == OWN else FORMS)


def test_forms_share_a_kernel_only_where_they_run_the_same_code():
    source = Source(num_hidden_layers=1)
    for isa, rows, shared in (("neon", 8, False), ("neon", 1, True), ("dotprod", 8, True), ("neon-paper", 1, False)):
        made = operations(source, isa, rows=rows, only=("w8a8", "w4a8", "w4a4"))
        qkv = next(operation.kernels for operation in made.operations if operation.name == "qkv")
        (by_8,), (by_4,) = qkv["w4a8"], qkv["w4a4"]
        assert (by_8 == by_4) == shared and by_8 not in qkv["w8a8"], (isa, rows)
        head = next(operation.kernels for operation in made.operations if operation.name == "head")
        assert head["w4a8"] == head["w4a4"]


def test_kernels_have_the_schedules_that_compiling_chooses():
    isa = instruction_set("avx512vnni")

    def decide(kernel):
        space = tunable.space_of(kernel, isa)
        if not isinstance(kernel, LinearKernel) or space is None:
            return None
        return next(point for point in space.points() if point != space.default)

    made = operations(Source(), rows=8, only="own", choose=lambda form: decide)
    plain = operations(Source(), rows=8, only="own")
    changed = [name for name, kernel in made.kernels.items() if str(kernel.func) != str(plain.kernels[name].func)]
    assert changed and all(name.startswith("linear_w") for name in changed)


@pytest.mark.parametrize(
    ("source", "rows", "only"),
    [
        (Source(replace(PLAIN, activation="static", head_bits=4), "opt", **OPT_350M), 1, ("float32", "w8a8", "w4a4")),
        (Source(replace(PLAIN, attention="log2-paper", mixed_bits=5.0), "bloom", **SHARED), 8, (OWN,)),
        (Source(replace(PLAIN, activation="none", pruning=PruningSchedule((1,), 0.5))), 8, (OWN,)),
        (Source(SHIFTED, num_hidden_layers=1), 8, (OWN,)),
    ],
)
def test_every_kernel_runs(source, rows, only):
    device = load_device("host")
    made = operations(source, device.instruction_set, "int8", rows, only)
    timings = time_kernels(made.kernels.values(), Place(device), ONCE)
    assert timings.keys() == made.kernels.keys() and all(timing.seconds > 0 for timing in timings.values())
    used = {name for each in made.operations for runs in each.kernels.values() for name in runs}
    assert used == made.kernels.keys()
