"""Exponents of channels: how they are chosen, what order they give, what the reference makes of them."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agq_tvm.errors import AgqError
from agq_tvm.flow.quantize import quantize
from agq_tvm.quantize import shifts
from agq_tvm.quantize.checkpoint import QuantizedLinear, read_checkpoint
from agq_tvm.quantize.gptq import gptq
from agq_tvm.quantize.operators import ShiftedOperator
from agq_tvm.quantize.outliers import with_outliers
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.shifts import BLOCK, block_shifts, channel_order, is_blocked
from agq_tvm.quantize.source import open_source
from agq_tvm.quantize.trip import _falling_exponents, refine_blocks, refine_static
from agq_tvm.quantize.weights import rtn
from tests.quantize.conftest import FEW

SHIFTED = {"group_size": "column", "activation": "static", "max_refine": 5, "shifts": True}


@given(st.lists(st.integers(0, 8), min_size=1, max_size=150))
def test_order_is_falling_and_shifts_lead_to_the_last_exponent(exponents):
    alpha = np.array(exponents, "int8")
    order, shift = channel_order(alpha), block_shifts(alpha)
    assert sorted(order) == list(range(len(alpha)))
    keys = [(-int(alpha[c]), c) for c in order]
    assert keys == sorted(keys)
    assert shift[0] == 0 and (shift >= 0).all() and len(shift) == -(-len(alpha) // BLOCK)
    if is_blocked(alpha):
        left = np.append(np.cumsum(shift[::-1])[::-1][1:], 0)  # what still follows after a block
        np.testing.assert_array_equal(np.repeat(left, BLOCK)[: len(alpha)], alpha[order])


@pytest.mark.parametrize(
    ("alpha", "blocked"),
    [
        (np.zeros(40), True),
        (np.append(np.zeros(8), np.full(32, 3)), True),
        (np.append(np.zeros(8), np.full(31, 3)), False),
        (np.append(np.zeros(33), np.full(31, 3)), False),
        (np.full(40, 1), False),
        (np.append(np.zeros(1), np.full(31, 3)), False),
    ],
)
def test_blocks_have_one_exponent_and_the_last_has_0(alpha, blocked):
    assert is_blocked(alpha.astype("int8")) == blocked


@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 1000))
def test_falling_exponents_have_the_least_error_of_all(blocks, largest, seed):
    errors = torch.rand(largest + 1, blocks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = _falling_exponents(errors)
    possible = itertools.combinations_with_replacement(range(largest, -1, -1), blocks)
    best = min(sum(float(errors[a, b]) for b, a in enumerate(each)) for each in possible)
    assert (found.diff() <= 0).all()
    assert float(errors[found, torch.arange(blocks)].sum()) == pytest.approx(best)


def scattered(tokens: int = 200, channels: int = 150) -> torch.Tensor:
    """Values with every fifth channel sixteen times larger."""
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(0))
    x[:, ::5] *= 16
    return x


@pytest.mark.parametrize("bits", [8, 4])
def test_scattered_outliers_are_gathered(bits):
    x = scattered()
    refined = refine_blocks([x[:50], x[50:]], 6, bits)
    quantizer = refined.quantizer
    alpha = quantizer.alpha.numpy()
    assert is_blocked(alpha.astype("int8")) and alpha.max() <= 6
    # 30 outliers fill a block up with two others.
    assert alpha[::5].min() >= 3 and (np.delete(alpha, np.s_[::5]) <= 1).sum() == 118

    def error(quantizer) -> float:
        return float((quantizer.rounded(x) - x).square().sum())

    assert error(quantizer) < 0.75 * error(refine_static([x], 32, 6, bits).quantizer)
    assert refined.clipped.shape == (150,)
    scale, zero = quantizer.static
    codes = x / (scale * torch.exp2(quantizer.alpha.float())) + zero
    beyond = (codes.abs() > (127 if bits == 8 else 7) + 0.5).float().mean(0)
    torch.testing.assert_close(refined.clipped, beyond)


@pytest.mark.parametrize("kind", ["zero", "some zero", "constant", "one outlier", "one channel", "two values"])
def test_degenerate_channels(kind):
    x = torch.randn(64, 70, generator=torch.Generator().manual_seed(1))
    if kind == "zero":
        x[:] = 0
    elif kind == "some zero":
        x[:, 3:50] = 0
    elif kind == "constant":
        x[:] = -3.0
    elif kind == "one outlier":
        x[:, 40] *= 1000
    elif kind == "one channel":
        x = x[:, :1]
    elif kind == "two values":
        x[:, 7] = 1e-30
        x[:, 8] = 1e15
    quantizer = refine_blocks([x], 6, 8).quantizer
    alpha, rounded = quantizer.alpha.numpy().astype("int8"), quantizer.rounded(x)
    assert is_blocked(alpha) and torch.isfinite(rounded).all()
    if kind == "one outlier":
        assert alpha[40] == alpha.max() == 6 and (alpha == 6).sum() == 32
    # A value is off by half a step of the whole range at most, or is clipped at less than another's cost.
    assert (rounded - x).square().mean() <= ((x.max() - x.min()).clamp_min(1e-9) / 254).square()
    weight = np.random.default_rng(0).standard_normal((3, x.shape[1])).astype("float32")
    check_operator([rtn(weight, x.shape[1], False)], quantizer, x)


def check_operator(parts: list[QuantizedLinear], quantizer, x: torch.Tensor) -> None:
    """Compare the reference with the formula, one product at a time."""
    (scale, zero), alpha = quantizer.static, quantizer.alpha.numpy().astype("int8")
    static = {"act_scale": np.array([scale], "float32"), "act_zero": np.array([zero], "int32"), "alpha": alpha}
    parts = [QuantizedLinear(**(part.__dict__ | static)) for part in parts]
    operator = ShiftedOperator(tuple(parts), quantizer.bits)
    y, codes, scales, totals = (value.numpy() for value in operator.exact(x))
    assert (codes.dtype, scales.shape, totals.dtype) == (np.int8, (len(x), 1), np.int32)
    np.testing.assert_array_equal(codes, quantizer.codes(x)[0].numpy())
    column = 0
    for part in parts:
        for n in range(len(part.qweight)):
            q = [int(part.qweight[n, k // 2] >> (4 * (k % 2)) & 15) for k in range(part.in_features)]
            s, o = float(part.scales[n, 0]), -8 * float(part.scales[n, 0])
            o = o if part.offsets is None else float(part.offsets[n, 0])
            for m in range(0, len(x), 17):
                products = [int(c) * w << int(a) for c, w, a in zip(codes[m], q, alpha, strict=True)]
                assert totals[m, 0, column] == sum(products)
                terms = [
                    (int(c) - zero) * 2 ** int(a) * (s * w + o) for c, w, a in zip(codes[m], q, alpha, strict=True)
                ]
                expected = float(scale) * sum(terms) + (0 if part.bias is None else part.bias[n])
                weights = sum(abs(s * w + o) * 2 ** int(a) for w, a in zip(q, alpha, strict=True))
                size = float(scale) * (127 + abs(zero)) * weights
                assert y[m, column] == pytest.approx(expected, abs=1e-6 * size)
            column += 1
    fast = operator(x).numpy()
    np.testing.assert_allclose(fast, y, atol=1e-4 * np.abs(fast).max() + 1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_reference_shifts_one_accumulator(symmetric):
    rng, x = np.random.default_rng(0), scattered(40)
    parts = [rtn(rng.standard_normal((rows, 150)).astype("float32"), 150, symmetric) for rows in (3, 2)]
    parts[0] = QuantizedLinear(**(parts[0].__dict__ | {"bias": rng.standard_normal(3).astype("float32")}))
    quantizer = refine_blocks([x], 6, 8).quantizer
    assert quantizer.alpha.max() > 2
    check_operator(parts, quantizer, x)


def test_gptq_chooses_the_grid_of_a_column_from_the_whole_of_it():
    """With independent inputs of one size GPTQ is rounding to nearest."""
    weight = np.random.default_rng(3).standard_normal((5, 300)).astype("float32")
    weight[:, 200] *= 9
    found, expected = gptq(weight, np.eye(300), 300, False), rtn(weight, 300, False)
    np.testing.assert_array_equal(found.scales, expected.scales)
    np.testing.assert_array_equal(found.qweight, expected.qweight)


class FirstInputs:
    """Keeps the inputs of the first layer's linears."""

    def __init__(self):
        self.inputs = {}

    def linear_input(self, layer, name, x):
        self.inputs.setdefault(name, x)

    def attention(self, *_):
        pass


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_checkpoint_with_scattered_outliers_has_better_inputs(tiny_llama, tmp_path, method):
    """Exponents of channels are better than those of groups, and than none."""
    source, seen = with_outliers(open_source(tiny_llama), 10, 4), FirstInputs()
    ReferenceModel.from_source(source).logits(list(range(3, 60)), observer=seen)
    settings = SHIFTED | {"method": method, "calibration": FEW}
    forms = {
        "channels": settings,
        "groups": settings | {"group_size": 32, "shifts": False},
        "none": settings | {"max_refine": 0, "shifts": False},
    }
    errors = {}
    for name, form in forms.items():
        quantize(source, tmp_path / name, **form)
        models = [ReferenceModel.from_checkpoint(read_checkpoint(tmp_path / name), how) for how in ("none", None)]
        for linear in ("qkv", "gate_up"):
            exact, rounded = (model._layer(0).linears[linear](seen.inputs[linear]) for model in models)
            errors[name, linear] = float(torch.linalg.norm(rounded - exact) / torch.linalg.norm(exact))
    for linear in ("qkv", "gate_up"):
        assert errors["channels", linear] < 0.6 * min(errors["groups", linear], errors["none", linear])
    checkpoint = read_checkpoint(tmp_path / "channels")
    # Other activations do without exponents.
    per_token = ReferenceModel.from_checkpoint(checkpoint, "per-token")._layer(0).linears["qkv"]
    y, _, scales, sums = per_token.exact(seen.inputs["qkv"])
    torch.testing.assert_close(y, per_token(seen.inputs["qkv"]), rtol=1e-4, atol=1e-3)
    assert scales.shape == (57, 1) and sums.shape[1] == 1
    for linear in checkpoint.config.linears:
        for part in checkpoint.fused(0, linear.parts):
            assert part.is_shifted and part.scales.shape == (len(part.qweight), 1)
            assert part.alpha.shape == (linear.in_features,)
    assert checkpoint.fused(0, checkpoint.config.linears[0].parts)[0].alpha.max() >= 3


def test_what_may_overflow_is_refused_when_quantizing(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(shifts, "INT32_LARGEST", 300_000)
    with pytest.raises(AgqError, match=r"layers\.0\..*over 96 channels with exponents up to .*lower max_refine"):
        quantize(with_outliers(open_source(tiny_llama), 10, 4), tmp_path / "c", calibration=FEW, **SHIFTED)
    assert list(tmp_path.iterdir()) == []
