"""Channels that calibration can make nothing of, through every way to quantize: nothing breaks, little is lost."""

import numpy as np
import pytest

from agq_tvm.errors import AgqError
from agq_tvm.flow.quantize import quantize
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.gptq import DAMPING, gptq, inverse_factor
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.source import open_source
from agq_tvm.quantize.tensor_names import linear_shapes
from agq_tvm.quantize.weights import dequantize
from tests.degenerate import spoil
from tests.quantize.conftest import FEW
from tests.tiny import write_tiny_model

TOKENS = np.random.default_rng(4).integers(3, 259, 48).tolist()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = write_tiny_model(tmp_path_factory.mktemp("degenerate") / "m", "opt", 5)
    spoil(path)
    return open_source(path)


@pytest.fixture(scope="module")
def exact(source):
    return ReferenceModel.from_source(source).logits(TOKENS)


WAYS = {  # what is quantized, and the least correlation of logits with those of the float model
    "rtn": ({"method": "rtn", "activation": "none"}, 0.92),
    "rtn, symmetric": ({"method": "rtn", "activation": "none", "symmetric": True}, 0.97),
    "8-bit weights": ({"weight_bits": 8, "activation": "none"}, 0.999),
    "gptq": ({"method": "gptq", "activation": "none"}, 0.97),
    "per token": ({"weight_bits": 8, "activation": "per-token"}, 0.995),
    "per token, TRIP": ({"weight_bits": 8, "activation": "per-token", "max_refine": 6}, 0.995),
    "per token and group": ({"weight_bits": 8, "activation": "per-token-group"}, 0.997),
    "static": ({"weight_bits": 8, "activation": "static"}, 0.98),
    "static TRIP": ({"weight_bits": 8, "activation": "static", "max_refine": 6}, 0.98),
    "gptq, static TRIP": ({"method": "gptq", "activation": "static", "max_refine": 6}, 0.96),
    "gptq, 4-bit activations": ({"method": "gptq", "activation": "per-token-group", "four_bit": ("o", "down")}, 0.96),
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_breaks(tmp_path, source, exact, way):
    settings, least = WAYS[way]
    quantize(source, tmp_path / "c", group_size=32, calibration=FEW, **settings)
    checkpoint = read_checkpoint(tmp_path / "c")
    for name in linear_shapes(checkpoint.config):
        assert np.isfinite(dequantize(checkpoint.linear(name))).all()
    model = ReferenceModel.from_checkpoint(checkpoint)
    logits = model.logits(TOKENS)
    correlation = np.corrcoef(logits.ravel(), exact.ravel())[0, 1]
    assert correlation >= least
    sums = model.logits(TOKENS, trace=lambda *_: None)
    assert np.corrcoef(logits.ravel(), sums.ravel())[0, 1] > 0.99


def test_static_scales_do_not_break_a_channel_that_calibration_saw_as_zero(tmp_path, source):
    quantize(source, tmp_path / "c", method="rtn", activation="static", max_refine=4, group_size=32, calibration=FEW)
    linear = read_checkpoint(tmp_path / "c").linear("model.decoder.layers.0.self_attn.q_proj")
    assert linear.act_scale[0] > 0 and linear.alpha[2] == 0  # all exponents are as good: the smallest
    assert linear.alpha[0] == 4  # the group with the outlier


WEIGHT = np.random.default_rng(0).standard_normal((6, 64)).astype("float32")


def test_gptq_dead_inputs_lose_their_weights_and_touch_no_other():
    x = np.random.default_rng(1).standard_normal((200, 64))
    x[:, 10:20] = 0
    alive = np.r_[0:10, 20:64]
    with_dead = dequantize(gptq(WEIGHT, x.T @ x, 64, True))
    assert (with_dead[:, 10:20] == 0).all()
    zeroed = WEIGHT.copy()
    zeroed[:, 10:20] = 0
    np.testing.assert_array_equal(dequantize(gptq(zeroed, x.T @ x, 64, True))[:, alive], with_dead[:, alive])


def test_gptq_without_any_input():
    assert (dequantize(gptq(WEIGHT, np.zeros((64, 64)), 32, False)) == 0).all()


def test_gptq_on_equal_inputs():
    """Rank 1: what one column loses the next ones make up for, so that the row's sum is kept."""
    hessian = np.ones((64, 64))
    found = dequantize(gptq(WEIGHT, hessian, 64, False))
    nearest = dequantize(gptq(WEIGHT, np.eye(64), 64, False))
    errors = [abs((each - WEIGHT).sum(1)).max() for each in (found, nearest)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("lowest,damping", [(-0.01, 1), (-0.2, 10), (-2.0, 100)])
def test_damping_grows_until_the_hessian_is_positive_definite(lowest, damping):
    hessian = np.diag([1.0] * 63 + [lowest])
    factor = inverse_factor(hessian).astype("float64")
    damped = hessian + damping * DAMPING * np.diag(hessian).mean() * np.eye(64)
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(64), atol=1e-5)


def test_damping_ends():
    with pytest.raises(AgqError, match=r"cannot invert .* or use rtn"):
        inverse_factor(-np.eye(64))
