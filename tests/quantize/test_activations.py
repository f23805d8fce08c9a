import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from agq_tvm.quantize.activations import SMALLEST, dynamic_codes, grouped_codes, static_codes, static_range

ROWS = array_shapes(min_dims=2, max_dims=2, max_side=80).flatmap(
    lambda shape: arrays("float32", shape, elements=st.floats(-(2.0**100), 2.0**100, width=32))
)


@settings(max_examples=80, deadline=None)
@given(ROWS)
def test_dynamic_codes_are_the_contract(x):
    codes, scales = (value.numpy() for value in dynamic_codes(torch.from_numpy(x)))
    for row, row_codes, (scale,) in zip(x, codes, scales, strict=True):
        largest = np.abs(row).max()
        if largest < SMALLEST:
            assert scale == 1 and not row_codes.any()
            continue
        assert scale == np.float32(largest / np.float32(127))
        np.testing.assert_array_equal(row_codes, np.rint(row * (np.float32(1) / scale)))
        assert np.abs(row_codes).max() == 127


def test_ties_go_to_the_even_code():
    codes, scales = dynamic_codes(torch.tensor([[127.0, 0.5, 1.5, -2.5]]))
    assert scales.item() == 1
    assert codes.tolist() == [[127, 0, 2, -2]]


@pytest.mark.parametrize("x", [0.0, 1e-45, 1e-37])
def test_a_row_of_nearly_nothing_is_zero(x):
    codes, scales = dynamic_codes(torch.full((1, 3), x))
    assert scales.item() == 1
    assert codes.tolist() == [[0, 0, 0]]


def test_groups_do_not_see_each_other_and_the_last_may_be_short():
    x = torch.arange(1.0, 81).reshape(1, 80)
    codes, scales = grouped_codes(x, 32)
    assert codes.shape == (1, 80)
    np.testing.assert_allclose(scales, [[32 / 127, 64 / 127, 80 / 127]], rtol=1e-7)
    assert codes[0, [31, 63, 79]].tolist() == [127, 127, 127]


@settings(max_examples=80, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_a_static_range_covers_what_it_was_made_for(low, width):
    scale, zero = static_range(low, low + width)
    ends = torch.tensor([[min(low, 0), max(low + width, 0), 0.0]])
    codes = static_codes(ends, scale, zero)
    assert -127 <= zero <= 127 and codes.abs().max() <= 127
    np.testing.assert_allclose((codes - zero) * scale, ends, atol=1.01 * scale)
    assert codes[0, 2] == zero  # zero itself is exact


def test_static_codes_are_clipped():
    assert static_codes(torch.tensor([[-1e9, 1e9]]), 1.0, 5).tolist() == [[-127, 127]]
