"""Activation codes against the contract in numpy."""

import dataclasses
import math

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agq_tvm.kernels import activation
from agq_tvm.kernels.activation import QuantizeKernel
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from tests.kernels.operands import compiled

MODES = ("per-token", "per-token-group", "static")
LAYOUT = INSTRUCTION_SETS["generic"].layout_4bit
STATIC = np.array([0.02, -5], "float32")


def run(kernel: QuantizeKernel, inputs, layout=LAYOUT, function=None):
    """Return codes [M, groups * group_size], scales and sums."""
    function = function or compiled(activation.build(kernel, layout), "generic")
    outputs = [tvm.runtime.tensor(np.full(s, 99, d)) for s, d in kernel.output_shapes(layout)]
    function(*(tvm.runtime.tensor(np.ascontiguousarray(x)) for x in inputs), *outputs)
    codes, scales, sums = (output.numpy() for output in outputs)
    return codes.transpose(1, 0, 2, 3, 4).reshape(len(scales), -1), scales, sums


def contract(y: np.ndarray, kernel: QuantizeKernel):
    """Return codes [M, padded] before rounding, and scales, by the written formula in float32."""
    padded = np.zeros((kernel.rows, kernel.groups * kernel.group_size), "float32")
    padded[:, : kernel.channels] = y
    if kernel.mode == "static":
        q = np.clip(np.rint(padded * (np.float32(1) / STATIC[0])) + STATIC[1], -kernel.limit, kernel.limit)
        q[:, kernel.channels :] = 0
        return q, np.full((kernel.rows, 1), STATIC[0])
    groups = padded.reshape(kernel.rows, kernel.scales, -1)
    largest = abs(groups).max(-1, keepdims=True)
    tiny = 127 * np.finfo("float32").tiny  # below it 1/s would not be finite
    scales = np.where(largest < tiny, np.float32(1), largest / np.float32(kernel.limit))
    q = np.rint(groups * (np.float32(1) / scales))
    return q.reshape(kernel.rows, -1), scales[..., 0]


def made_by(source: str, inputs, kernel) -> np.ndarray:
    """Compute y in float64."""
    x = inputs[0].astype("float64")
    if source == "rms_norm":
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + kernel.epsilon) * inputs[1]
    if source == "layer_norm":
        deviation = np.sqrt(x.var(-1, keepdims=True) + kernel.epsilon)
        return (x - x.mean(-1, keepdims=True)) / deviation * inputs[1] + inputs[2]
    if source == "relu":
        return np.maximum(x, 0)
    if source == "gelu":
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    if source == "gelu_tanh":
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    if source == "silu_mul":
        gate, up = np.split(x, 2, axis=1)
        return gate / (1 + np.exp(-gate)) * up
    return x


def test_a_second_term_has_the_codes_of_what_the_first_left():
    one, two = (QuantizeKernel("plain", 3, 150, 64, "per-token-group", terms=terms) for terms in (1, 2))
    x = np.random.default_rng(2).standard_normal((3, 150)).astype("float32") * 3
    x[1] = 0
    codes, scales, sums = run(two, [x])
    expected = contract(x, one)
    padded = np.pad(x, ((0, 0), (0, 42))).reshape(3, 3, 64)
    rest = padded - expected[1][..., None] * expected[0].reshape(3, 3, 64).astype("float32")
    second = contract(rest.reshape(3, -1)[:, :150], one)
    np.testing.assert_array_equal(codes, np.concatenate([expected[0], second[0]]))
    np.testing.assert_allclose(scales, np.concatenate([expected[1], second[1]]), rtol=1e-6)
    np.testing.assert_array_equal(sums, codes.reshape(6, 3, 64).sum(-1))
    both = (scales[..., None] * codes.reshape(6, 3, 64)).reshape(2, 3, -1).sum(0)[:, :150]
    assert abs(both - x).max() <= abs(x).max() / 127 / 2 / 127


@pytest.mark.parametrize("mode", [*MODES, "none"])
@pytest.mark.parametrize("source", ["rms_norm", "layer_norm"])
def test_a_norm_of_a_sum_is_that_of_what_it_also_returns(source, mode):
    plain = QuantizeKernel(source, 3, 150, 64, mode, 1e-5)
    adding = dataclasses.replace(plain, adds=True)
    rng = np.random.default_rng(3)
    a, *rest = (rng.standard_normal(shape).astype("float32") * 3 for shape in adding.input_shapes())
    if mode == "static":
        rest[-1] = STATIC
    inputs, results = {plain: [a + rest[0], *rest[1:]], adding: [a, *rest]}, {}
    for kernel, values in inputs.items():
        outputs = [tvm.runtime.tensor(np.full(s, 99, d)) for s, d in kernel.output_shapes(LAYOUT)]
        compiled(activation.build(kernel, LAYOUT), "generic")(*map(tvm.runtime.tensor, values), *outputs)
        results[kernel] = [output.numpy() for output in outputs]
    *others, residual = results[adding]
    np.testing.assert_array_equal(residual, a + rest[0])
    for ours, expected in zip(others, results[plain], strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("source", activation.SOURCES)
def test_values_for_float_products(source):
    kernel = QuantizeKernel(source, 3, 150, 64, "none", 1e-5)
    rng = np.random.default_rng(6)
    inputs = [rng.standard_normal(shape).astype("float32") * 3 for shape in kernel.input_shapes()]
    out = tvm.runtime.tensor(np.full((3, 192), 99, "float32"))
    compiled(activation.build(kernel, LAYOUT), "generic")(*map(tvm.runtime.tensor, inputs), out)
    np.testing.assert_allclose(out.numpy()[:, :150], made_by(source, inputs, kernel), rtol=2e-6, atol=2e-6)
    assert (out.numpy()[:, 150:] == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["plain", "silu_mul", "layer_norm"])
def test_refined_values_and_codes_of_4_bits(source, mode):
    kernel = QuantizeKernel(source, 3, 150, 64, mode, 1e-5, refined=True, bits=4)
    rng = np.random.default_rng(1)
    inputs = [rng.standard_normal(shape).astype("float32") * 3 for shape in kernel.input_shapes()]
    powers = np.repeat(np.exp2([0, -3, -1]), 64)[:150].astype("float32")
    inputs[-2 if mode == "static" else -1] = powers
    if mode == "static":
        inputs[-1] = STATIC
    codes, scales, sums = run(kernel, inputs)
    expected, expected_scales = contract((made_by(source, inputs, kernel) * powers).astype("float32"), kernel)
    np.testing.assert_allclose(scales, expected_scales, rtol=2e-6)
    assert abs(codes).max() == 7
    assert np.mean(codes != expected) < 0.01 and abs(codes - expected).max() <= 1
    np.testing.assert_array_equal(sums, codes.reshape(3, kernel.groups, -1).sum(-1))


@pytest.mark.parametrize("rows,channels,group", [(1, 576, 32), (5, 150, 64), (3, 100, 128)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", activation.SOURCES)
def test_codes(source, mode, rows, channels, group):
    kernel = QuantizeKernel(source, rows, channels, group, mode, 1e-5)
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape).astype("float32") * 3 for shape in kernel.input_shapes()]
    if mode == "static":
        inputs[-1] = STATIC
    codes, scales, sums = run(kernel, inputs)
    expected, expected_scales = contract(made_by(source, inputs, kernel).astype("float32"), kernel)
    np.testing.assert_allclose(scales, expected_scales, rtol=2e-6)
    if source in ("plain", "relu"):
        np.testing.assert_array_equal(codes, expected)
    else:  # float32 sums in another order may move a value across a tie, never further
        assert abs(codes - expected).max() <= 1
        assert (codes != expected).mean() < 0.002
    np.testing.assert_array_equal(sums, codes.reshape(rows, kernel.groups, group).astype("int64").sum(-1))


@pytest.mark.parametrize("source", ["gelu", "gelu_tanh"])
def test_far_from_zero_gelu_is_the_identity_or_zero(source):
    kernel = QuantizeKernel(source, 1, 64, 32, "per-token-group")
    x = np.repeat([[-1e30, 1e30], [-90.0, 90.0]], 16, axis=1).reshape(1, 64).astype("float32")
    codes, scales, _ = run(kernel, [x])
    np.testing.assert_array_equal(codes[0], np.where(x[0] > 0, 127, 0))
    np.testing.assert_allclose(scales[0], np.array([1e30, 90]) / 127, rtol=1e-6)


FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
KERNELS = {mode: QuantizeKernel("plain", 2, 64, 32, mode) for mode in MODES[:2]}
FUNCTIONS = {mode: compiled(activation.build(kernel, LAYOUT), "generic") for mode, kernel in KERNELS.items()}


@settings(max_examples=200, deadline=None)
@given(hnp.arrays("float32", (2, 64), elements=FLOATS), st.sampled_from(MODES[:2]))
def test_any_finite_row(x, mode):
    kernel = KERNELS[mode]
    codes, scales, _ = run(kernel, [x], function=FUNCTIONS[mode])
    expected, expected_scales = contract(x, kernel)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(codes, expected)
    assert abs(codes.astype("int32")).max() <= 127


@pytest.mark.parametrize("mode", MODES[:2])
def test_zero_row_has_scale_one(mode):
    codes, scales, sums = run(KERNELS[mode], [np.zeros((2, 64), "float32")], function=FUNCTIONS[mode])
    assert (codes == 0).all() and (scales == 1).all() and (sums == 0).all()


def test_ties_go_to_even():
    x = np.zeros((2, 64), "float32")
    x[:, :6] = [127, 0.5, 1.5, 2.5, -0.5, -1.5]
    codes, _, _ = run(KERNELS["per-token"], [x], function=FUNCTIONS["per-token"])
    np.testing.assert_array_equal(codes[0, :6], [127, 0, 2, 2, 0, -2])


@pytest.mark.parametrize("isa", INSTRUCTION_SETS.values(), ids=lambda isa: isa.name)
def test_order_of_codes_suits_every_layout(isa):
    kernel = QuantizeKernel("plain", 3, 96, 32, "per-token")
    x = np.random.default_rng(1).standard_normal((3, 96)).astype("float32")
    codes, _, _ = run(kernel, [x], isa.layout_4bit)
    np.testing.assert_array_equal(codes, contract(x, kernel)[0])
