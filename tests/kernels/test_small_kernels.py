"""The exponential, the error function, LayerNorm, the embedding, and the last row."""

import math

import numpy as np
import pytest
import tvm

from agq_tvm.flow.packing import pack_table
from agq_tvm.kernels.embedding import build_embedding, build_float_embedding, build_last_row
from agq_tvm.kernels.emit import erf, exp, store_vector, task_loop
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.norm import LayerNormKernel, build_layer_norm
from agq_tvm.quantize.tables import dequantize_table, quantize_table
from agq_tvm.tvm_seam import IRBuilder, T
from tests.kernels.operands import compiled


def apply(function, values: np.ndarray) -> np.ndarray:
    """Apply a function of TIR expressions to every value."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("apply")
            T.func_attr({"global_symbol": "apply"})
            x, y = (T.arg(name, T.buffer(values.shape, "float32")) for name in "xy")
            with task_loop("all", 1, [x], [y]):
                store_vector(y, len(values), lambda i: function(x[i]))
    out = tvm.runtime.tensor(np.zeros_like(values))
    compiled(builder.get(), "generic")(tvm.runtime.tensor(values), out)
    return out.numpy()


def test_exp_is_right_to_two_units_in_the_last_place():
    values = np.linspace(-87, 88, 1 << 16).astype("float32")
    values[:3] = [0, 1, -1]
    out, expected = apply(exp, values), np.exp(values.astype("float64"))
    error = abs(out - expected) / np.spacing(expected.astype("float32"))
    assert out[0] == 1
    assert error.max() <= 2


def test_erf_is_right_to_five_in_ten_million():
    values = np.concatenate([np.linspace(-6, 6, 1 << 12), [0, -0.0, 1e30, -1e30]]).astype("float32")
    np.testing.assert_allclose(apply(erf, values), np.vectorize(math.erf)(values), rtol=0, atol=5e-7)


@pytest.mark.parametrize(("rows", "channels"), [(1, 96), (5, 75), (3, 1)])
def test_layer_norm(rows, channels):
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, channels)).astype("float32") * 3 + 100  # a mean that rounding must not drown
    gain, bias = rng.standard_normal((2, channels)).astype("float32")
    out = tvm.runtime.tensor(np.full((rows, channels), np.nan, "float32"))
    kernel = LayerNormKernel(rows, channels, 1e-5)
    compiled(build_layer_norm(kernel), "generic")(*map(tvm.runtime.tensor, (x, gain, bias)), out)
    wide = x.astype("float64")
    expected = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5) * gain + bias
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS.values(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_embedding_reads_the_packed_table(isa, bits):
    table = quantize_table(np.random.default_rng(0).standard_normal((150, 80)).astype("float32"), bits)
    packed = pack_table(table, isa)
    tokens = np.array([0, 149, 64, 63, 15], "int32")
    out = tvm.runtime.tensor(np.zeros((5, 80), "float32"))
    if bits == 16:
        kernel = build_float_embedding(5, 150, 80, packed["w"].shape, "float16")
    else:
        kernel = build_embedding(5, 150, 80, isa.layout(bits), "wo" in packed)
    compiled(kernel, "generic")(*(tvm.runtime.tensor(a) for a in (tokens, *packed.values())), out)
    np.testing.assert_array_equal(out.numpy(), dequantize_table(table)[tokens])


@pytest.mark.parametrize("valid", [1, 3, 8])
def test_last_row_is_the_last_valid_one(valid):
    x = np.random.default_rng(0).standard_normal((8, 20)).astype("float32")
    out = tvm.runtime.tensor(np.zeros((1, 20), "float32"))
    lengths = tvm.runtime.tensor(np.array([5, valid], "int32"))
    compiled(build_last_row(8, 20), "generic")(tvm.runtime.tensor(x), lengths, out)
    np.testing.assert_array_equal(out.numpy()[0], x[valid - 1])
