import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from agq_tvm.errors import AgqError
from agq_tvm.quantize.weights import (
    checked,
    choose_grid,
    dequantize,
    encode,
    grid_of,
    pack,
    rtn,
    rtn_8bit,
    spread,
    unpack,
)

MATRICES = array_shapes(min_dims=2, max_dims=2, max_side=150).flatmap(
    lambda shape: arrays("float32", shape, elements=st.floats(-100, 100, width=32))
)


@given(arrays("uint8", array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 15)))
def test_unpack_undoes_pack(codes):
    packed = pack(codes)
    assert packed.shape == (len(codes), (codes.shape[1] + 1) // 2)
    np.testing.assert_array_equal(unpack(packed, codes.shape[1]), codes)


def test_even_channels_are_in_the_low_nibble():
    np.testing.assert_array_equal(pack(np.array([[1, 2, 3]], "uint8")), [[0x21, 0x03]])


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.sampled_from([32, 64, 128]), st.booleans())
def test_rtn_picks_the_nearest_point_of_its_grid(weight, group_size, symmetric):
    linear = rtn(weight, group_size, symmetric)
    assert (linear.offsets is None) == symmetric
    scales, offsets = (spread(a, group_size, weight.shape[1]) for a in grid_of(linear))
    candidates = np.arange(16, dtype="float32")[:, None, None] * scales + offsets
    best = np.abs(candidates - weight).min(axis=0)
    error = np.abs(dequantize(linear) - weight)
    assert (error <= best + 1e-5 * (1 + np.abs(weight))).all()


@settings(max_examples=60, deadline=None)
@given(MATRICES)
def test_asymmetric_error_is_at_most_half_a_step(weight):
    linear = rtn(weight, 32, symmetric=False)
    step = spread(grid_of(linear)[0], 32, weight.shape[1])
    rounding = 2.0**-10 * np.abs(weight).max() + 1e-6  # of the float16 scale and offset
    assert (np.abs(dequantize(linear) - weight) <= step / 2 + rounding).all()


@pytest.mark.parametrize("value", [0.0, -3.0, 7.5, 1e-7, 6e4])
def test_a_constant_group_is_kept(value):
    weight = np.full((2, 40), value, "float32")
    np.testing.assert_allclose(dequantize(rtn(weight, 32, False)), weight, rtol=2**-11, atol=6e-8)
    assert np.isfinite(dequantize(rtn(weight, 32, True))).all()


def test_the_extreme_weight_of_a_symmetric_group_is_exact():
    weight = np.array([[4.0, -1.0, 0.5], [-4.0, 1.0, 0.5]], "float32")
    scale, offset = choose_grid(weight, symmetric=True)
    np.testing.assert_array_equal(scale, [-0.5, 0.5])
    np.testing.assert_array_equal(encode(weight, scale[:, None], offset[:, None])[:, 0], [0, 0])
    np.testing.assert_array_equal(dequantize(rtn(weight, 32, True)), weight)


def test_scales_are_rounded_before_codes_are_chosen():
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((4, 64)) * 1e-6).astype("float32")  # where float16 is coarse
    linear = rtn(weight, 64, symmetric=False)
    scale, offset = grid_of(linear)
    np.testing.assert_array_equal(unpack(linear.qweight, 64), encode(weight, scale, offset))


@settings(max_examples=40, deadline=None)
@given(MATRICES, st.sampled_from([32, 64, 128]))
@example(np.array([[0.0, 0.0]], "float32"), 32)
def test_8bit_codes_are_within_half_a_step(weight, group_size):
    linear = rtn_8bit(weight, group_size)
    assert linear.bits == 8 and linear.offsets is None and linear.qweight.min(initial=0) >= -127
    scales, offsets = (spread(a, group_size, weight.shape[1]) for a in grid_of(linear))
    assert (offsets == 0).all()
    np.testing.assert_array_equal(dequantize(linear), scales * linear.qweight)
    error = np.abs(dequantize(linear) - weight)
    assert (error <= scales / 2 + 2.0**-11 * np.abs(weight).max() + 1e-6).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 70000.0])
def test_unusable_weights_are_refused_by_name(bad):
    with pytest.raises(AgqError, match=r"layers\.0\.q_proj"):
        checked(np.array([[1.0, bad]], "float32"), "layers.0.q_proj")
