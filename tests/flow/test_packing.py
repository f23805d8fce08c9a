"""Packed parameters hold exactly what the checkpoint says."""

from dataclasses import replace

import numpy as np
import pytest

from agq_tvm.flow.packing import pack_linear, unpack_codes
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.quantize.checkpoint import QuantizedLinear
from agq_tvm.quantize.weights import dequantize, rtn


def random_linear(rows: int, channels: int, group: int, offsets: str | None, static: bool = False):
    rng = np.random.default_rng(rows)
    groups = -(-channels // group)
    return QuantizedLinear(
        qweight=rng.integers(0, 256, (rows, -(-channels // 2))).astype("uint8"),
        scales=rng.standard_normal((rows, groups)).astype("float16"),
        offsets=rng.standard_normal((rows, groups)).astype(offsets) if offsets else None,
        in_features=channels,
        group_size=group,
        act_scale=np.array([0.03], "float32") if static else None,
        act_zero=np.array([-7], "int32") if static else None,
    )


def test_codes_come_low_nibble_first():
    linear = random_linear(3, 5, 32, None)
    codes = unpack_codes(linear)
    assert codes.shape == (3, 5)
    for n in range(3):
        for k in range(5):
            assert codes[n, k] == linear.qweight[n, k // 2] >> (4 * (k % 2)) & 15


@pytest.mark.parametrize("isa", INSTRUCTION_SETS.values(), ids=lambda isa: isa.name)
def test_parts_are_stacked(isa):
    parts = (random_linear(40, 70, 32, "float16"), random_linear(9, 70, 32, None))
    packed = pack_linear(parts, isa.layout_4bit, "float32")
    codes = np.concatenate([unpack_codes(part) for part in parts])
    np.testing.assert_array_equal(isa.layout_4bit.unpack(packed["w"], 49, 70), codes)
    width, layout = isa.layout_4bit.width, isa.layout_4bit
    scales = packed["ws"].transpose(0, 2, 3, 1).reshape(-1, 3)
    np.testing.assert_array_equal(scales[:49], np.concatenate([part.scales for part in parts]))
    assert (scales[49:] == 0).all() and len(scales) == layout.tiles(49) * width
    offsets = packed["wo"].transpose(0, 2, 3, 1).reshape(-1, 3)[:49]
    np.testing.assert_array_equal(offsets[:40], parts[0].offsets)
    np.testing.assert_array_equal(offsets[40:], -8 * parts[1].scales.astype("float32"))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS.values(), ids=lambda isa: isa.name)
def test_8bit_codes_are_packed_as_those_of_tables(isa):
    rng = np.random.default_rng(4)
    codes = rng.integers(-127, 128, (40, 70)).astype("int8")
    scales = rng.standard_normal((40, 2)).astype("float16")
    static = (np.array([0.03], "float32"), np.array([-7], "int32"))
    packed = pack_linear((QuantizedLinear(codes, scales, None, 70, 64, None, *static),), isa.layout_8bit, None)
    np.testing.assert_array_equal(isa.layout_8bit.unpack(packed["w"].view("uint8"), 40, 70), codes.astype(int) + 128)
    weights = codes * scales.astype("float64")[:, np.arange(70) // 64]
    np.testing.assert_allclose(packed["bias"].reshape(-1)[:40], 0.03 * 7 * weights.sum(1), rtol=1e-5, atol=1e-5)


def _by_column(tiled, layout):
    return tiled.transpose(0, 2, 3, 1).reshape(len(tiled) * layout.width, -1).astype("float64")


@pytest.mark.parametrize("isa", ["avx512vnni", "avxvnni"])
def test_an_integer_grid_is_packed_as_integers(isa):
    layout = INSTRUCTION_SETS[isa].layout_4bit
    weight = np.random.default_rng(2).standard_normal((40, 70)).astype("float32")
    parts = [rtn(part, 32, False, integer=True) for part in (weight[:30], weight[30:])]
    packed = pack_linear(tuple(parts), layout, "float16", grid=True)
    assert set(packed) == {"w", "step", "low", "ws"}
    assert packed["step"].dtype == packed["low"].dtype == np.uint8
    step, low, unit = (_by_column(packed[name], layout)[:40] for name in ("step", "low", "ws"))
    whole = np.repeat(step, 32, 1)[:, :70] * layout.unpack(packed["w"], 40, 70) + np.repeat(low - 128, 32, 1)[:, :70]
    np.testing.assert_array_equal(whole * unit, np.concatenate([dequantize(part) for part in parts]))


def test_static_zero_point_becomes_bias():
    linear = random_linear(20, 70, 32, "float16", static=True)
    packed = pack_linear((linear,), INSTRUCTION_SETS["generic"].layout_4bit, "float16")
    groups = np.arange(70) // 32
    weights = linear.scales[:, groups].astype("float64") * unpack_codes(linear) + linear.offsets[:, groups]
    bias = packed["bias"].reshape(-1)[:20]
    np.testing.assert_allclose(bias, 0.03 * 7 * weights.sum(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(packed["act"], np.array([0.03, -7], "float32"))


def test_a_bias_is_packed_with_or_without_static_activations():
    isa = INSTRUCTION_SETS["generic"]
    own = np.random.default_rng(1).standard_normal(20).astype("float32")
    static = random_linear(20, 70, 32, "float16", static=True)
    constant = pack_linear((static,), isa.layout_4bit, "float16")["bias"].reshape(-1)[:20]
    both = pack_linear((replace(static, bias=own),), isa.layout_4bit, "float16")["bias"].reshape(-1)[:20]
    np.testing.assert_allclose(both, own + constant, rtol=1e-5, atol=1e-6)
    plain = random_linear(20, 70, 32, "float16")
    assert "bias" not in pack_linear((plain,), isa.layout_4bit, "float16")
    packed = pack_linear((replace(plain, bias=own),), isa.layout_4bit, "float16")
    np.testing.assert_array_equal(packed["bias"].reshape(-1)[:20], own)
    assert "act" not in packed


@pytest.mark.parametrize("isa", INSTRUCTION_SETS.values(), ids=lambda isa: isa.name)
def test_channels_are_packed_in_the_order_of_their_exponents(isa):
    linear = random_linear(20, 70, 70, "float16", static=True)
    alpha = np.random.default_rng(1).permutation(np.repeat([3, 1, 0], [32, 32, 6])).astype("int8")
    linear = replace(linear, alpha=alpha)
    packed = pack_linear((linear,), isa.layout_4bit, "float16")
    order = packed["order"]
    assert order.dtype == packed["shift"].dtype == np.int32
    np.testing.assert_array_equal(alpha[order], np.repeat([3, 1, 0], [32, 32, 6]))
    np.testing.assert_array_equal(packed["shift"], [0, 2, 1])
    codes = unpack_codes(linear)
    np.testing.assert_array_equal(isa.layout_4bit.unpack(packed["w"], 20, 70), codes[:, order])
    np.testing.assert_array_equal(packed["refine"], np.exp2(-alpha[order], dtype="float32"))
    columns = packed["ws"].transpose(0, 2, 3, 1).reshape(-1, 1)
    np.testing.assert_array_equal(columns[:20], linear.scales)
    weights = (linear.scales.astype("float64") * codes + linear.offsets) * np.exp2(alpha, dtype="float64")
    np.testing.assert_allclose(packed["bias"].reshape(-1)[:20], 0.03 * 7 * weights.sum(1), rtol=1e-5, atol=1e-4)
