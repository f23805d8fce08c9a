"""TRIP's exponents: chosen as the paper says, and better than none."""

import numpy as np
import pytest
import torch

from agq_tvm.quantize.activations import ActivationQuantizer, static_range
from agq_tvm.quantize.trip import refine_per_token, refine_static


def outliers(seed: int = 0, tokens: int = 200) -> torch.Tensor:
    """Values of three groups of 32, the second sixteen times larger, and a short group."""
    x = torch.randn(tokens, 110, generator=torch.Generator().manual_seed(seed))
    x[:, 32:64] *= 16
    return x


def squared_error(quantizer: ActivationQuantizer, x: torch.Tensor) -> float:
    return float((quantizer.rounded(x) - x).square().sum())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("max_refine", [1, 3, 6])
def test_exponents_of_static_scales_have_the_least_error_of_all(max_refine, bits):
    batches = [outliers(seed) for seed in range(3)]
    quantizer = refine_static(batches, 32, max_refine, bits).quantizer
    scale, zero = static_range(
        min(float(x.min()) for x in batches), max(float(x.max()) for x in batches), 127 if bits == 8 else 7
    )
    assert quantizer.static == (scale / 2**max_refine, zero)
    for group in range(4):
        errors = []
        for exponent in range(max_refine + 1):
            alpha = quantizer.alpha.clone()
            alpha[group] = exponent
            other = ActivationQuantizer("static", 32, quantizer.static, alpha, bits)
            errors.append(sum(squared_error(other, x) for x in batches))
        assert np.argmin(errors) == quantizer.alpha[group]


def test_all_batches_count():
    """A group that is large in the first batch only keeps its large exponent."""
    first, last = outliers(0), torch.randn(200, 110, generator=torch.Generator().manual_seed(1))
    assert refine_static([first, last], 32, 4, 8).quantizer.alpha.argmax() == 1


def test_the_clipped_share_is_that_of_values_without_a_code():
    x = torch.zeros(10, 32)
    x[:, 0], x[0, 1] = 1.0, 100.0
    refined = refine_static([x], 32, 0, 8)
    assert refined.quantizer.alpha is None
    assert refined.clipped.abs().max() == 0
    x = torch.cat((outliers(), torch.zeros(200, 18)), 1)
    x[0, 0] = 400.0  # one value of a small group: cheaper to clip than to round all others coarsely
    refined = refine_static([x], 32, 6, 4)
    scale, zero = refined.quantizer.static
    reach = (7 - zero + 0.5) * scale * torch.exp2(refined.quantizer.alpha.float()).repeat_interleave(32)
    low = (-7 - zero - 0.5) * scale * torch.exp2(refined.quantizer.alpha.float()).repeat_interleave(32)
    by_hand = ((x > reach) | (x < low)).float().mean(0)
    torch.testing.assert_close(refined.clipped, by_hand)


def test_constant_and_zero_channels_do_no_harm():
    x = torch.zeros(20, 64)
    assert torch.equal(refine_static([x], 32, 3, 8).quantizer.rounded(x), x)
    x[:, :32] = 5.0
    assert squared_error(refine_static([x], 32, 3, 8).quantizer, x) < 1e-3
    weight = torch.ones(4, 64)
    assert torch.isfinite(
        ActivationQuantizer("per-token", 32, alpha=refine_per_token([x], weight, 32, 4)).rounded(x)
    ).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_exponents_make_scales_of_tokens_finer(bits):
    x, weight = outliers(), torch.randn(16, 110, generator=torch.Generator().manual_seed(2))
    alpha = refine_per_token([x], weight, 32, 6)
    assert alpha[1] == alpha.max() and alpha.min() == 0
    plain, refined = (ActivationQuantizer("per-token", 32, alpha=a, bits=bits) for a in (None, alpha))

    def output_error(quantizer) -> float:
        return float(((quantizer.rounded(x) - x) @ weight.T).square().sum())

    assert output_error(refined) < 0.6 * output_error(plain)


def test_exponents_stay_within_the_limit_and_need_no_outliers():
    x, weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)), torch.ones(4, 96)
    assert refine_per_token([x], weight, 32, 4).max() == 0
    assert refine_per_token([1e3 * outliers()], torch.ones(4, 110), 32, 2).max() == 2


def test_powers_of_two_are_exact():
    """Dividing by a power of two and multiplying again changes no code but its step."""
    x = outliers()
    alpha = torch.tensor([0, 4, 0, 0])
    codes, scales = ActivationQuantizer("per-token", 32, alpha=alpha).codes(x)
    divided = x.clone()
    divided[:, 32:64] /= 16
    expected, expected_scales = ActivationQuantizer("per-token", 32).codes(divided)
    assert torch.equal(codes, expected) and torch.equal(scales, expected_scales)
