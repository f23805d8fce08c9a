import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agq_tvm.errors import AgqError
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.scheme import Scheme
from agq_tvm.quantize.source import open_source
from agq_tvm.quantize.tables import dequantize_table
from agq_tvm.quantize.tensor_names import linear_shapes, table_shapes, vector_shapes
from agq_tvm.quantize.weights import dequantize, rtn, rtn_8bit

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"


def change_tensors(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def change_config(path, change) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def read_everything(path) -> None:
    checkpoint = read_checkpoint(path)
    for layer in range(checkpoint.config.num_layers):
        for linear in checkpoint.config.linears:
            checkpoint.fused(layer, linear.parts)
    for name in table_shapes(checkpoint.config):
        checkpoint.table(name)
    for name in vector_shapes(checkpoint.config):
        checkpoint.vector(name)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True])
def test_reads_back_what_was_quantized(quantized, group_size, symmetric):
    checkpoint = read_checkpoint(quantized(group_size=group_size, symmetric=symmetric))
    source = open_source(checkpoint.path.parent / "source")
    assert checkpoint.config == source.config
    assert checkpoint.scheme == Scheme("rtn", group_size, symmetric, "per-token-group")
    for name, (rows, columns) in linear_shapes(source.config).items():
        linear = checkpoint.linear(name)
        expected = rtn(source.tensor(f"{name}.weight"), group_size, symmetric)
        assert linear.scales.shape == (rows, -(-columns // group_size))
        np.testing.assert_array_equal(dequantize(linear), dequantize(expected))
    for name in vector_shapes(source.config):
        np.testing.assert_array_equal(checkpoint.vector(name), source.tensor(name))
    table = dequantize_table(checkpoint.table("model.embed_tokens"))
    np.testing.assert_allclose(table, source.tensor("model.embed_tokens.weight"), atol=0.02)
    assert (checkpoint.path / ".agq-checkpoint").exists()
    assert oct((checkpoint.path / "model.safetensors").stat().st_mode & 0o777) == "0o644"


def test_what_is_written_can_be_read_completely(static):
    read_everything(static)


def nan(name):
    def change(tensors):
        tensors[name].flat[0] = np.nan

    return change


def replace(name, make):
    return lambda tensors: tensors.update({name: make(tensors[name])})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{Q}.scales"), "has no tensor"),
        (lambda t: t.pop("lm_head.qweight"), "has no tensor lm_head.qweight"),
        (lambda t: t.pop("model.norm.weight"), "has no tensor model.norm.weight"),
        (lambda t: t.update(surprise=np.zeros(1)), "unexpected tensor surprise"),
        (replace(f"{Q}.qweight", lambda a: a[:, :-1].copy()), "qweight is U8"),
        (replace(f"{Q}.qweight", lambda a: a.astype("int8")), "qweight is I8"),
        (replace(f"{Q}.scales", lambda a: a.astype("float32")), "scales is F32"),
        (replace(f"{Q}.offsets", lambda a: a.astype("float64")), "offsets is F64"),
        (replace("lm_head.scales", lambda a: a.T.copy()), "lm_head.scales is"),
        (replace("model.norm.weight", lambda a: a[None]), "model.norm.weight is"),
        (nan(f"{Q}.scales"), "not finite"),
        (nan(f"{Q}.offsets"), "not finite"),
        (nan("model.norm.weight"), "not finite"),
        (nan("model.embed_tokens.scales"), "not finite"),
        (nan(f"{Q}.act_scale"), "not finite"),
        (replace(f"{Q}.act_scale", np.negative), "out of range"),
        (replace(f"{Q}.act_zero", lambda a: a + 300), "out of range"),
        (replace(f"{K}.act_scale", lambda a: a * 2), "disagree on their shared input"),
        (replace(f"{K}.alpha", lambda a: 2 - a), "disagree on their shared input"),
        (replace(f"{Q}.alpha", lambda a: a + 3), r"outside 0\.\.2"),
        (replace(f"{Q}.alpha", lambda a: a - 3), r"outside 0\.\.2"),
    ],
)
def test_changed_tensors_are_refused(static, change, words):
    change_tensors(static, change)
    with pytest.raises(AgqError, match=words) as error:
        read_everything(static)
    assert str(static) in str(error.value)


@pytest.mark.parametrize("change", [lambda a: a + 1, lambda a: np.eye(1, len(a), 3)[0]])
def test_exponents_of_channels_are_those_of_blocks(quantized, tmp_path, change):
    made = quantized(group_size="column", activation="static", max_refine=2, shifts=True)
    path = Path(shutil.copytree(made, tmp_path / "shifts"))
    name, valid = "model.layers.0.mlp.down_proj", np.append(np.zeros(96), np.full(64, 1)).astype("int8")
    change_tensors(path, lambda tensors: tensors.update({f"{name}.alpha": valid}))
    assert read_checkpoint(path).scheme.shifts and read_checkpoint(path).linear(name).is_shifted
    change_tensors(path, lambda tensors: tensors.update({f"{name}.alpha": change(valid[:-1]).astype("int8")}))
    with pytest.raises(AgqError, match=r"alpha is I8 \[159\], not I8 \[160\]"):
        read_checkpoint(path)
    wrong = valid.copy()
    wrong[:-1] = change(wrong[:-1])
    change_tensors(path, lambda tensors: tensors.update({f"{name}.alpha": wrong}))
    with pytest.raises(AgqError, match="not those of blocks of 32 channels"):
        read_checkpoint(path).linear(name)


@pytest.mark.parametrize("group_size", [32, 128])
def test_reads_back_8bit_weights(quantized, tmp_path, group_size):
    path = quantized(group_size=group_size, weight_bits=8)
    checkpoint = read_checkpoint(path)
    source = open_source(path.parent / "source")
    assert checkpoint.scheme == Scheme("rtn", group_size, True, "per-token-group", weight_bits=8)
    for name in linear_shapes(source.config):
        linear, expected = checkpoint.linear(name), rtn_8bit(source.tensor(f"{name}.weight"), group_size)
        np.testing.assert_array_equal(linear.qweight, expected.qweight)
        np.testing.assert_array_equal(linear.scales, expected.scales)
    damaged = Path(shutil.copytree(path, tmp_path / "damaged"))
    change_config(damaged, lambda config: config["quantization_config"].update(weight_bits=4))
    with pytest.raises(AgqError, match=r"qweight is I8 .* not U8"):
        read_checkpoint(damaged)


def test_checkpoints_that_do_not_say_have_4_bits(static):
    change_config(static, lambda config: config["quantization_config"].pop("weight_bits"))
    assert read_checkpoint(static).scheme.weight_bits == 4


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf])
def test_scales_of_values_are_positive_numbers(quantized, tmp_path, scale):
    path = Path(shutil.copytree(quantized(attention="log2"), tmp_path / "log2"))
    assert read_checkpoint(path).scheme.attention == "log2" and read_checkpoint(path).value_scale(1).shape == (2,)
    name = "model.layers.1.self_attn.v_proj.value_scale"
    change_tensors(path, lambda tensors: tensors[name].__setitem__(1, scale))
    with pytest.raises(AgqError, match=r"layers\.1\.self_attn\.v_proj\.value_scale has .*damaged"):
        read_checkpoint(path).value_scale(1)


def test_checkpoints_from_before_there_was_a_choice_have_float_attention(static):
    change_config(static, lambda config: config["quantization_config"].pop("attention"))
    assert read_checkpoint(static).scheme.attention == "float"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("group_size", 96, "group size 96"),
        ("group_size", 64, r"scales is F16"),
        ("group_size", "32", "group size '32'"),
        ("group_size", "column", "max_refine needs groups"),
        ("shifts", True, "shifts need group size column"),
        ("shifts", 1, "shifts must be true or false"),
        ("symmetric", 1, "symmetric"),
        ("symmetric", True, "unexpected tensor"),
        ("method", "awq", "method 'awq'"),
        ("activation", "int4", "activation 'int4'"),
        ("activation", "per-token", "unexpected tensor"),
        ("max_refine", 9, "max_refine 9"),
        ("max_refine", 1.0, r"max_refine 1\.0"),
        ("max_refine", 0, "unexpected tensor"),
        ("four_bit", "o", "four_bit must be a list"),
        ("four_bit", [3], "four_bit must be names"),
        ("four_bit", ["head"], "no linear 'head'"),
        ("attention", "int4", "attention 'int4'"),
        ("attention", None, "attention None"),
        ("attention", "log2", r"v_proj.value_scale"),
        ("format_version", 2, "format 2"),
        ("format_version", None, "format None"),
        ("weight_bits", 3, "weight_bits 3"),
        ("weight_bits", 8, "symmetric and rounded to nearest"),
        ("weight_bits", 8.0, r"weight_bits 8\.0"),
        ("table_group_size", 64, "table_group_size 64"),
        ("quant_method", "gptq", "not a quantized checkpoint"),
    ],
)
def test_a_changed_scheme_is_refused(static, name, value, words):
    change_config(static, lambda config: config["quantization_config"].update({name: value}))
    with pytest.raises(AgqError, match=words):
        read_checkpoint(static)


@pytest.mark.parametrize(
    ("name", "value"), [("num_hidden_layers", 3), ("vocab_size", 999), ("hidden_size", 192), ("hidden_size", -1)]
)
def test_a_config_of_another_model_is_refused(static, name, value):
    change_config(static, lambda config: config.update({name: value}))
    with pytest.raises(AgqError):
        read_checkpoint(static)


def test_truncated_weights_are_refused_at_any_length(static):
    path = static / "model.safetensors"
    data = path.read_bytes()
    for length in [0, 4, 8, 100, 3000, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(AgqError, match="make it again"):
            read_checkpoint(static)


def test_an_absurd_header_length_is_refused(static):
    path = static / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(AgqError, match="make it again"):
        read_checkpoint(static)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '"agq"', '{"model_type": "llama"}'])
def test_a_broken_config_is_refused(static, content):
    (static / "config.json").unlink()
    if content is not None:
        (static / "config.json").write_text(content)
    with pytest.raises(AgqError):
        read_checkpoint(static)


def test_missing_weights_are_refused(static):
    (static / "model.safetensors").unlink()
    with pytest.raises(AgqError, match=r"model\.safetensors"):
        read_checkpoint(static)
    shutil.rmtree(static)
    with pytest.raises(AgqError, match="missing"):
        read_checkpoint(static)
