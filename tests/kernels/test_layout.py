"""Packing: what is packed comes back, and stands where the layout says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.layout import K_BLOCK, k_blocks

LAYOUTS = [isa.layout(bits) for isa in INSTRUCTION_SETS.values() for bits in (4, 8)]


@given(st.sampled_from(LAYOUTS), st.integers(1, 150), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_round_trip(layout, columns, channels, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << layout.bits, (columns, channels)).astype("uint8")
    packed = layout.pack(codes)
    assert packed.shape == layout.packed_shape(columns, channels)
    np.testing.assert_array_equal(layout.unpack(packed, columns, channels), codes)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_code_stands_where_the_layout_says(layout):
    rng = np.random.default_rng(0)
    columns, channels = layout.width + 1, 2 * K_BLOCK
    codes = rng.integers(0, 1 << layout.bits, (columns, channels)).astype("uint8")
    packed = layout.pack(codes)
    mask = (1 << layout.bits) - 1
    for n in range(columns):
        for k in range(channels):
            c = k % K_BLOCK
            step, half, i = c // (2 * layout.depth), c // layout.depth % 2, c % layout.depth
            tile, vector, lane = n // layout.width, n % layout.width // layout.lanes, n % layout.lanes
            if layout.bits == 4:
                stored = packed[tile, k // K_BLOCK, step, vector, lane, i] >> (4 * half) & 15
            else:
                stored = packed[tile, k // K_BLOCK, step, half, vector, lane, i]
            assert (int(stored) + layout.zero) & mask == codes[n, k]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_threads_write_whole_cache_lines(layout):
    """Threads take tiles of columns, whose outputs are float32."""
    assert layout.width * 4 % 64 == 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_names_tell_layouts_apart(layout):
    assert [other for other in LAYOUTS if other.name == layout.name and other != layout] == []


def test_the_two_layouts_of_an_instruction_set_read_activations_alike():
    for isa in INSTRUCTION_SETS.values():
        assert isa.layout_4bit.depth == isa.layout_8bit.depth


@given(st.integers(1, 5000), st.sampled_from((32, 64, 128)))
def test_k_blocks_fill_whole_groups(channels, group):
    padded = k_blocks(channels, group) * K_BLOCK
    assert padded % group == 0 and 0 <= padded - channels < group
