"""The float product and the float forms of what is fused, against numpy."""

from math import erf

import numpy as np
import pytest
import tvm

from agq_tvm.kernels import activation
from agq_tvm.kernels.activation import QuantizeKernel
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.kernels.linear_dense import DenseKernel, build, tile_of
from tests.kernels.operands import compiled, native

NATIVE = ("avx512vnni", "avxvnni", "avx2", "generic")


@pytest.mark.parametrize("isa", NATIVE)
@pytest.mark.parametrize(("rows", "bias"), [(1, True), (3, False), (8, True)])
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_product(isa, rows, bias, storage):
    """Neither columns nor channels fill their tiles."""
    kernel, rng = DenseKernel(rows, 75, 37, storage, bias), np.random.default_rng(rows)
    V, L = tile_of(native(isa))
    tiles, padded = -(-kernel.columns // (V * L)), kernel.padded_channels
    x, w = np.zeros((rows, padded), "float32"), np.zeros((tiles * V * L, padded), "float32")
    b = np.zeros(tiles * V * L, "float32")
    x[:, :37] = rng.standard_normal((rows, 37))
    w[:75, :37] = rng.standard_normal((75, 37)).astype(storage)
    b[:75] = rng.standard_normal(75) if bias else 0
    packed = np.ascontiguousarray(w.reshape(tiles, V, L, padded).transpose(0, 3, 1, 2)).astype(storage)
    out = tvm.runtime.tensor(np.full((rows, tiles * V * L), np.nan, "float32"))
    arrays = [x, packed, *([b.reshape(tiles, V, L)] if bias else [])]
    compiled(build(kernel, instruction_set(isa)), isa)(*map(tvm.runtime.tensor, arrays), out)
    np.testing.assert_allclose(out.numpy(), x.astype("float64") @ w.T + b, rtol=1e-5, atol=1e-5)


def _expected(source: str, x: np.ndarray, *vectors: np.ndarray) -> np.ndarray:
    if source == "rms_norm":
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * vectors[0]
    if source == "layer_norm":
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * vectors[0] + vectors[1]
    if source == "silu_mul":
        gate, up = np.split(x, 2, -1)
        return gate / (1 + np.exp(-gate)) * up
    if source == "relu":
        return np.maximum(x, 0)
    return x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2


@pytest.mark.parametrize("source", ["rms_norm", "layer_norm", "silu_mul", "relu", "gelu"])
def test_float_form_of_what_is_fused(source):
    kernel, rng = QuantizeKernel(source, 3, 40, 32, "none", 1e-5), np.random.default_rng(5)
    inputs = [rng.standard_normal(shape).astype("float32") for shape in kernel.input_shapes()]
    layout = native("generic").layout_4bit
    ((shape, dtype),) = kernel.output_shapes(layout)
    out = tvm.runtime.tensor(np.full(shape, np.nan, dtype))
    compiled(activation.build(kernel, layout), "generic")(*map(tvm.runtime.tensor, inputs), out)
    expected = _expected(source, *(array.astype("float64") for array in inputs))
    np.testing.assert_allclose(out.numpy()[:, :40], expected, rtol=1e-5, atol=2e-6)
    assert not out.numpy()[:, 40:].any()
