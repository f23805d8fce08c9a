"""Embedding and head in 16, 8 and 4 bits: what is stored, and what comes back."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from agq_tvm.errors import AgqError
from agq_tvm.files import read_json, write_json
from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.head import HeadFit
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.source import open_source
from agq_tvm.quantize.tables import dequantize_table, quantize_table
from agq_tvm.quantize.tensor_names import table_shapes
from agq_tvm.quantize.weights import dequantize, grid_of, rtn, spread
from tests.quantize.gguf_models import write_gguf
from tests.tiny import write_tiny_model

_TYPES = gguf.GGMLQuantizationType
FEW = Calibration(samples=3, length=48)
MATRICES = array_shapes(min_dims=2, max_dims=2, max_side=150).flatmap(
    lambda shape: arrays("float32", shape, elements=st.floats(-100, 100, width=32))
)


@settings(max_examples=40, deadline=None)
@given(MATRICES)
@example(np.array([[1e-5]], "float32"))  # its scale is subnormal
def test_8_bit_tables_are_within_half_a_step(weight):
    table = quantize_table(weight, 8)
    assert table.qweight.min() >= -127
    step = spread(table.scales.astype("float32"), 32, weight.shape[1])
    error = np.abs(dequantize_table(table) - weight)
    assert (error <= step / 2 + 2.0**-11 * np.abs(weight).max() + 1e-6).all()


def squared_error(matrix: np.ndarray, weight: np.ndarray) -> float:
    return float(np.square(matrix.astype("float64") - weight).sum())


@settings(max_examples=40, deadline=None)
@given(MATRICES)
@example(np.zeros((3, 40), "float32"))
@example(np.full((2, 33), 7.3, "float32"))
@example(np.array([[1e-6, -1e-6]], "float32"))
def test_4_bit_tables_are_no_worse_than_rounding_to_nearest(weight):
    table = quantize_table(weight, 4)
    assert table.group_size == 32 and np.isfinite(table.scales).all() and np.isfinite(table.offsets).all()
    plain = squared_error(dequantize(rtn(weight, 32, symmetric=False)), weight)
    assert squared_error(dequantize_table(table), weight) <= plain * (1 + 1e-4) + 1e-9


def test_4_bit_tables_are_fitted():
    weight = np.random.default_rng(0).standard_normal((500, 96)).astype("float32")
    plain = squared_error(dequantize(rtn(weight, 32, symmetric=False)), weight)
    assert squared_error(dequantize_table(quantize_table(weight, 4)), weight) < 0.87 * plain


def test_a_grid_of_4_bits_is_found_again():
    weight = dequantize(rtn(np.random.default_rng(1).standard_normal((9, 64)).astype("float32"), 32, symmetric=False))
    np.testing.assert_allclose(dequantize_table(quantize_table(weight, 4)), weight, rtol=0, atol=2e-3)


def test_float16_tables_are_rounded_and_no_more():
    weight = np.array([[0.1, -65504.0, 1e-7, 0.0]], "float32")
    np.testing.assert_array_equal(dequantize_table(quantize_table(weight, 16)), weight.astype("float16"))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_checkpoint_and_reference(tmp_path, family, bits):
    variant = {"do_layer_norm_before": False, "word_embed_proj_dim": 48} if family == "opt" else {}
    source = open_source(write_tiny_model(tmp_path / "m", family, 3, **variant))
    quantize(source, tmp_path / "c", method="rtn", group_size=64, head_bits=bits, calibration=FEW)
    checkpoint = read_checkpoint(tmp_path / "c")
    assert checkpoint.scheme.head_bits == bits
    for name, shape in table_shapes(source.config).items():
        weight = source.tensor(f"{name}.weight")
        table = dequantize_table(checkpoint.table(name))
        assert table.shape == shape
        if bits != 4 or name not in (source.config.embedding, source.config.head):
            np.testing.assert_array_equal(table, dequantize_table(quantize_table(weight, bits)))
        assert np.abs(table - weight).max() < {4: 0.5, 8: 0.005, 16: 0.0005}[bits] * np.abs(weight).max()
    assert np.isfinite(ReferenceModel.from_checkpoint(checkpoint).logits([1, 2, 3])).all()


def test_a_checkpoint_that_says_nothing_has_8_bits(tmp_path):
    write_tiny_model(tmp_path / "m", "llama", 3)
    quantize(tmp_path / "m", tmp_path / "c", method="rtn", group_size=64)
    config = read_json(tmp_path / "c" / "config.json", "checkpoint")
    del config["quantization_config"]["head_bits"]
    write_json(tmp_path / "c" / "config.json", config)
    assert read_checkpoint(tmp_path / "c").scheme.head_bits == 8
    for bits, words in ((5, "choose 4, 8 or 16"), ("8", "choose 4, 8 or 16"), (4, "damaged"), (16, "damaged")):
        config["quantization_config"]["head_bits"] = bits
        write_json(tmp_path / "c" / "config.json", config)
        with pytest.raises(AgqError, match=words):
            read_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(("kind", "bits"), [(_TYPES.Q8_0, 8), (_TYPES.Q4_1, 4), (_TYPES.Q4_0, 4), (_TYPES.F16, 16)])
def test_the_grid_of_a_gguf_table_is_kept(tmp_path, kind, bits):
    values = write_gguf(tmp_path / "m.gguf", tables=kind)
    quantize(tmp_path / "m.gguf", tmp_path / "out", head_bits=bits, calibration=FEW)
    checkpoint = read_checkpoint(tmp_path / "out")
    for name in table_shapes(checkpoint.config):
        table = checkpoint.table(name)
        np.testing.assert_array_equal(dequantize_table(table), values[f"{name}.weight"])
        assert bits != 4 or grid_of(table)[1].shape == table.scales.shape


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_4_bit_head_gives_the_logits_of_the_float_one(tmp_path, tied, method):
    """On what it multiplies, and better than a table that was not calibrated."""
    source = open_source(write_tiny_model(tmp_path / "m", "llama", 3, tie_word_embeddings=tied))
    head, inputs = HeadFit(source), np.random.default_rng(0).standard_normal((400, 96)).astype("float32")
    inputs[:, 1::2] = inputs[:, ::2] + 0.1 * inputs[:, 1::2]  # channels that can make up for each other
    hidden = [torch.from_numpy(part) for part in np.split(inputs, 4)]
    head.look(hidden, hidden if method == "gptq" else None)
    weight = source.tensor(f"{head.name}.weight")
    x = np.concatenate([head._norm(part).numpy() for part in hidden])
    errors = [
        squared_error(x @ dequantize_table(table).T, x @ weight.T)
        for table in (head.quantized(), quantize_table(weight, 4))
    ]
    assert errors[0] < 0.75 * errors[1]


def test_a_channel_that_the_head_never_sees_keeps_its_embedding(tmp_path):
    source = open_source(write_tiny_model(tmp_path / "m", "llama", 3))
    head, hidden = HeadFit(source), torch.randn(60, 96, generator=torch.Generator().manual_seed(0))
    hidden[:, 5] = 0
    head.look([hidden], None)
    weight = source.tensor(f"{head.name}.weight")
    assert np.abs(dequantize_table(head.quantized()) - weight)[:, 5].max() < 0.15 * np.abs(weight).max()
