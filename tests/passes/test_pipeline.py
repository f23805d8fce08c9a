"""What each phase leaves in the module."""

import re

import pytest

from agq_tvm.errors import AgqError
from agq_tvm.kernels.attention_form import AttentionForm
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.models.registry import describe
from agq_tvm.models.relax_decoder import build_decoder, function_names
from agq_tvm.passes import pipeline
from agq_tvm.passes.quantize_linears import LinearFormat
from agq_tvm.tvm_seam import relax, tvm
from tests.kernels.operands import target_of
from tests.tiny import tiny_config

LAYERS = 2


@pytest.fixture(scope="module", params=["per-token", "per-token-group", "static"])
def dumped(request, tmp_path_factory):
    """The phases' dumps by name, and the lowered module."""
    folder = tmp_path_factory.mktemp("dump")
    module = build_decoder(describe(tiny_config(num_hidden_layers=LAYERS)), 64, AttentionForm())
    format = LinearFormat(4, 64, request.param, "float16")
    lowered, tensors = pipeline.run(module, target_of("avx512vnni"), format, INSTRUCTION_SETS["avx512vnni"], folder)
    texts = {path.stem[3:]: path.read_text() for path in sorted(folder.iterdir())}
    return texts, lowered, tensors


def relax_part(text: str, function: str) -> str:
    """Return the source of one Relax function of a dump."""
    return re.search(rf"def {function}\(.*?\n\n", text + "\n\n", re.S).group()


def test_every_phase_is_dumped(dumped):
    texts, _, _ = dumped
    assert list(texts) == [
        "decoder",
        "quantize_linears",
        "fuse_activation_quantize",
        "lower_norms",
        "legalize",
        "schedule_kernels",
        "bundle_parameters",
        "lower",
    ]


def test_linears_are_quantized(dumped):
    texts, _, _ = dumped
    for name, _, _ in function_names():
        before, after = (relax_part(texts[phase], name) for phase in ("decoder", "quantize_linears"))
        assert before.count("R.matmul") == 4 * LAYERS + 1
        assert "R.matmul" not in after and "R.permute_dims" not in after and "R.take" not in after
        assert len(re.findall(r"R\.call_tir\(cls\.linear_w4a8|R\.call_tir\(linear_w4a8", after)) == 4 * LAYERS
        assert after.count("(linear_w8a8") + after.count("cls.linear_w8a8") == 1


def test_the_head_is_computed_for_the_rows_whose_logits_are_asked_for(dumped):
    texts, _, _ = dumped
    for name, rows, all_logits in function_names():
        heads = re.findall(r"call_tir\((?:cls\.)?linear_w8a8\w*?_m(\d+)_n", relax_part(texts["quantize_linears"], name))
        assert heads == [str(rows if all_logits else 1)]


def test_quantization_is_fused_with_what_comes_before(dumped):
    texts, _, _ = dumped
    decode = relax_part(texts["fuse_activation_quantize"], "decode")
    assert "R.nn.rms_norm" not in decode and "R.nn.silu" not in decode and "R.split" not in decode
    assert len(re.findall(r"[(.]rms_norm_quantize_", decode)) == 1  # before it there is no residual
    assert len(re.findall(r"[(.]add_rms_norm_quantize_", decode)) == 2 * LAYERS and "R.add(" not in decode
    assert len(re.findall(r"[(.]silu_mul_quantize_", decode)) == LAYERS
    assert len(re.findall(r"[(.]quantize_", decode)) == LAYERS  # of what attention returns


def test_the_intrinsic_is_in_the_final_tir(dumped):
    texts, lowered, _ = dumped
    assert "llvm.x86.avx512.vpdpbusd.512" not in texts["legalize"]
    assert texts["lower"].count("llvm.x86.avx512.vpdpbusd.512") > 100
    linears = [func for gvar, func in lowered.functions_items() if gvar.name_hint.startswith("linear_")]
    assert len(linears) >= 6 * 5  # six row counts; four linears of a layer, and the head
    assert all("llvm.x86.avx512.vpdpbusd.512" in func.script() for func in linears)


@pytest.mark.parametrize("name", ["neon", "dotprod"])
def test_prefill_on_arm_has_the_inner_loops_in_assembly(name):
    isa, format = INSTRUCTION_SETS[name], LinearFormat(4, 32, "per-token-group", "float16")
    module = build_decoder(describe(tiny_config(num_hidden_layers=1)), 64, AttentionForm())
    lowered, _ = pipeline.run(module, target_of(name), format, isa)
    kernels = [func for gvar, func in lowered.functions_items() if re.match(r"linear_w4a8.*_m128_", gvar.name_hint)]
    assert len(kernels) == 4
    for func in kernels:
        assert f'"agq_{isa.layout_4bit.name}_unpack_group"' in func.script()


def test_all_functions_take_the_same_parameters(dumped):
    _, lowered, tensors = dumped
    assert [name for name, _, _ in tensors[: 2 * LAYERS]] == [
        f"layers.{layer}.{cache}" for layer in range(LAYERS) for cache in ("keys", "values")
    ]
    types = {str(func.params[-1].ty) for _, func in lowered.functions_items() if isinstance(func, relax.Function)}
    assert len(types) == 1


@pytest.fixture(scope="module")
def fused():
    """Return ``make(family, **overrides)``: the Relax function `decode` after all fusions."""

    def make(family: str, **overrides) -> str:
        module = build_decoder(describe(tiny_config(family, **overrides)), 64, AttentionForm())
        isa = INSTRUCTION_SETS["generic"]
        for name, passes in pipeline.phases(LinearFormat(4, 64, "per-token-group", None), isa):
            with target_of("generic"):
                module = tvm.transform.Sequential(passes)(module)
            if name == "lower_norms":
                return relax_part(module.script(show_meta=False), "decode")

    return make


ONE_LAYER = {"num_hidden_layers": 1}
SHARED = {"apply_residual_connection_post_layernorm": True}


@pytest.mark.parametrize(
    ("family", "overrides", "counts", "activation"),
    [  # how many norms are fused, how many stay, and how many quantizations have nothing before them
        ("opt", ONE_LAYER, [3, 0, 1], "relu"),
        ("opt", ONE_LAYER | {"activation_function": "gelu"}, [3, 0, 1], "gelu"),
        ("opt", ONE_LAYER | {"do_layer_norm_before": False}, [1, 1, 3], "relu"),
        ("bloom", {"n_layer": 1}, [3, 1, 1], "gelu_tanh"),
        ("bloom", {"n_layer": 1} | SHARED, [1, 3, 3], "gelu_tanh"),
    ],
)
def test_norms_are_fused_unless_a_residual_needs_them(fused, family, overrides, counts, activation):
    decode = fused(family, **overrides)
    assert "R.nn." not in decode
    patterns = ("(?:add_)?layer_norm_quantize_", "layer_norm_m", "quantize_per", f"{activation}_quantize_")
    assert [len(re.findall(rf"call_tir\((?:cls\.)?{pattern}", decode)) for pattern in patterns] == [*counts, 1]


def test_biases_are_added_by_the_linears(fused):
    decode = fused("qwen2", **ONE_LAYER)
    assert len(re.findall(r"call_tir\((?:cls\.)?linear_w4a8g64_group_sym_bias_", decode)) == 1
    assert len(re.findall(r"call_tir\((?:cls\.)?linear_w4a8g64_group_sym_m1", decode)) == 3
    assert "R.add(" not in decode  # the two residuals are added by the norms after them


@pytest.mark.parametrize(
    ("family", "overrides", "counts"),
    [  # how many residuals are added by a norm that is fused, and how many stay
        ("opt", {"num_hidden_layers": 2}, [5, 0]),  # the first adds learned positions
        ("opt", {"num_hidden_layers": 2, "do_layer_norm_before": False}, [1, 4]),
        ("bloom", {"n_layer": 2} | SHARED, [1, 3]),
    ],
)
def test_residuals_are_added_by_the_norms_that_read_them(fused, family, overrides, counts):
    decode = fused(family, **overrides)
    patterns = (r"call_tir\((?:cls\.)?add_layer_norm_quantize_", r"R\.add\(")
    assert [len(re.findall(pattern, decode)) for pattern in patterns] == counts


def test_a_mistake_found_in_a_pass_keeps_its_words():
    module = build_decoder(describe(tiny_config(num_hidden_layers=1, intermediate_size=66_336)), 64, AttentionForm())
    format = LinearFormat(8, "column", "per-token", None)
    with pytest.raises(AgqError, match=r"^66336 products of 8-bit weights .* may leave 32 bits"):
        pipeline.run(module, target_of("avx512vnni"), format, INSTRUCTION_SETS["avx512vnni"])
