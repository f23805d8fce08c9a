"""Activation codes of mixed bits: kernels bit for bit like the torch reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agq_tvm.kernels import activation
from agq_tvm.kernels.activation import QuantizeKernel
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.quantize.mixed import MixedFormat, mixed_codes
from agq_tvm.quantize.mixed_format import SMALLEST_SCALE
from tests.kernels.operands import compiled
from tests.kernels.test_activation import made_by, run

LAYOUT = INSTRUCTION_SETS["generic"].layout_4bit
CHANNELS, GROUP = 150, 64  # a short last group
KERNEL = QuantizeKernel("plain", 3, CHANNELS, GROUP, "per-token-group", mixed=True)
FUNCTION = compiled(activation.build(KERNEL, LAYOUT), "generic")


def a_format(seed: int = 0) -> MixedFormat:
    """Draw bits and steps, the widest codes among them."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(4, 8, CHANNELS)
    steps = rng.integers(0, 8 - bits)
    bits[:2], steps[:2] = (7, 4), (0, 3)
    return MixedFormat(torch.from_numpy(bits), torch.from_numpy(steps))


def powers(format: MixedFormat) -> np.ndarray:
    """Return the operand that packing makes of a format."""
    bits, steps = format.bits.numpy(), format.steps.numpy()
    exponents = np.zeros((3, -(-CHANNELS // GROUP) * GROUP))
    exponents[:, :CHANNELS] = 4 - bits - steps, bits - 4, steps
    return np.exp2(exponents).astype("float32")


def reference(y: np.ndarray, format: MixedFormat) -> tuple[np.ndarray, np.ndarray]:
    """Return codes [M, padded] and scales [M, G]."""
    codes, scales = mixed_codes(torch.from_numpy(y), GROUP, format)
    return np.pad(codes.numpy(), ((0, 0), (0, -CHANNELS % GROUP))), scales.numpy()


def check(x: np.ndarray, format: MixedFormat, layout=LAYOUT, function=FUNCTION) -> np.ndarray:
    """Compare a kernel's codes, scales and sums with the reference's; return the codes."""
    codes, scales, sums = run(KERNEL, [x, powers(format)], layout, function)
    expected, expected_scales = reference(x, format)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(sums, codes.reshape(3, -1, GROUP).astype("int64").sum(-1))
    return codes


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays("float32", (3, CHANNELS), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)),
    st.integers(0, 99),
)
def test_any_finite_row(x, seed):
    codes = check(x, a_format(seed))
    assert abs(codes.astype("int32")).max() <= 120


def test_corners():
    rng = np.random.default_rng(0)
    format = a_format()
    x = rng.standard_normal((3, CHANNELS)).astype("float32")
    x[0] = 0  # a row of zeros, and groups of one sign, of one value, and far outside of what scales reach
    x[1, :GROUP] = abs(x[1, :GROUP])
    x[1, GROUP : 2 * GROUP] = -5
    x[2, :GROUP] = 1e-9
    x[2, GROUP : 2 * GROUP] *= 1e9
    codes, scales, _ = run(KERNEL, [x, powers(format)], LAYOUT, FUNCTION)
    assert (codes[0] == 0).all() and (scales[0] == np.float32(SMALLEST_SCALE)).all()
    assert (codes[2, :GROUP] == 0).all() and abs(codes).max() == 120
    check(x, format)


def test_ties_go_to_even_and_ends_are_reached():
    x = np.zeros((3, CHANNELS), "float32")
    x[:, :6] = [15, 0.5, 1.5, 2.5, 14.5, 0]
    x[1, :6] = [-10, 5, -0.5, -1.5, 2.5, 0]
    format = MixedFormat(torch.full((CHANNELS,), 4), torch.zeros(CHANNELS, dtype=torch.int64))
    codes = check(x, format)
    np.testing.assert_array_equal(codes[0, :6], [15, 0, 2, 2, 14, 0])
    np.testing.assert_array_equal(codes[1, :6], [-10, 5, 0, -2, 2, 0])


@pytest.mark.parametrize("isa", INSTRUCTION_SETS.values(), ids=lambda isa: isa.name)
def test_order_of_codes_suits_every_layout(isa):
    x = np.random.default_rng(1).standard_normal((3, CHANNELS)).astype("float32")
    check(x, a_format(), isa.layout_4bit, None)


@pytest.mark.parametrize("source", activation.SOURCES)
def test_fused_with_what_comes_before(source):
    kernel = QuantizeKernel(source, 3, CHANNELS, GROUP, "per-token-group", 1e-5, mixed=True)
    format, rng = a_format(), np.random.default_rng(0)
    inputs = [rng.standard_normal(shape).astype("float32") * 3 for shape in kernel.input_shapes()[:-1]]
    codes, scales, sums = run(kernel, [*inputs, powers(format)])
    expected, expected_scales = reference(made_by(source, inputs, kernel).astype("float32"), format)
    same = scales == expected_scales  # where rounding differs by one unit a scale may take the next of its values
    assert same.mean() > 0.8
    distance = abs(codes - expected).reshape(3, -1, GROUP)[same]
    steps = np.pad(2 ** format.steps.numpy(), (0, -CHANNELS % GROUP)).reshape(1, -1, GROUP).repeat(3, 0)[same]
    assert (distance <= steps).all() and (distance > 0).mean() < 0.01
    np.testing.assert_array_equal(sums, codes.reshape(3, -1, GROUP).astype("int64").sum(-1))
