"""Engines that run where tests do, on small operands; and what converters write."""

import gguf
import numpy as np
import pytest

from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.quantize.source import open_source, tensor_shapes
from agq_tvm.quantize.weights import dequantize, rtn
from agq_tvm.targets import load_device
from benchmarks.peers import base
from benchmarks.peers.conversion import interleaved, write_gguf
from benchmarks.peers.engines import ours, torch_eager
from tests.benchmarks.test_peers import rounded
from tests.missing import leave_out
from tests.tiny import write_tiny_llama

COLUMNS, CHANNELS = 192, 256


@pytest.fixture(scope="module")
def operands(tmp_path_factory):
    path = tmp_path_factory.mktemp("operands")
    base.Operands.write(path, COLUMNS, CHANNELS, 16, rounded)
    return path


def multiplied(engine, form, operands, tmp_path, rows: int):
    product, given = engine.Product(form, 1, tmp_path), base.Operands(operands, rows, 2)
    product.prepare(given)
    product.run()
    return product, given


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("form", torch_eager.PRODUCTS, ids=lambda form: form.name)
def test_torch_multiplies(form, rows, operands, tmp_path):
    product, given = multiplied(torch_eager, form, operands, tmp_path, rows)
    bits = {"torch bfloat16": 16, "torch float32": 32}.get(form.name, 8)
    assert product.stored_bytes == pytest.approx(COLUMNS * CHANNELS * bits / 8, rel=0.02)
    low, high = {8: (1e-3, 0.03), 16: (1e-4, 0.01), 32: (0, 1e-5)}[bits]
    assert low <= given.error(product.result()) < high


@pytest.mark.parametrize("form,rows", list(zip(ours.PRODUCTS, (1, 16, 16, 16, 1, 1), strict=True)), ids=str)
def test_ours_multiplies_the_rounded_weights(form, rows, operands, tmp_path):
    size, on_grid = int(form.kind[1:]), "integer grid" in form.name
    if on_grid and not instruction_set(load_device("host").instruction_set).grids:
        leave_out("kernels of integer grids", "this processor lacks what they need")
    product, given = multiplied(ours, form, operands, tmp_path, rows)
    codes, scales = given.grid(size)
    weights = (codes.astype("float32") - 8) * np.repeat(scales, size, 1)
    expected = given.x @ (dequantize(rtn(given.w, size, False, integer=True)) if on_grid else weights).T
    off = np.linalg.norm(product.result() - expected) / np.linalg.norm(expected)
    assert 1e-4 < off < 0.02  # what rounding activations to 8 bits costs
    assert product.stored_bytes == COLUMNS * CHANNELS // 2 + 2 * COLUMNS * CHANNELS // size + 2 * COLUMNS * on_grid


def test_gguf_holds_the_same_model(tmp_path):
    model = write_tiny_llama(tmp_path / "tiny")
    source = open_source(str(model))
    write_gguf(model, tmp_path / "tiny.gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    config = source.raw_config
    q = np.array(source.tensor("model.layers.0.self_attn.q_proj.weight"))
    np.testing.assert_array_equal(
        found["blk.0.attn_q.weight"].data, interleaved(q, config["num_attention_heads"]).astype("float16")
    )
    up = np.array(source.tensor("model.layers.1.mlp.up_proj.weight"))
    np.testing.assert_array_equal(found["blk.1.ffn_up.weight"].data, up.astype("float16"))
    assert len(found) == len(tensor_shapes(source.config))


def test_rows_of_a_head_are_put_in_turns():
    weight = np.arange(8)[:, None]
    np.testing.assert_array_equal(interleaved(weight, 2)[:, 0], [0, 2, 1, 3, 4, 6, 5, 7])
