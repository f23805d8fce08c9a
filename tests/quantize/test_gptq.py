import numpy as np
import pytest

from agq_tvm.errors import AgqError
from agq_tvm.quantize.gptq import DAMPING, gptq, inverse_factor
from agq_tvm.quantize.weights import dequantize, rtn, unpack


def correlated(rng, rows: int, columns: int) -> np.ndarray:
    return (rng.standard_normal((rows, columns // 4)) @ rng.standard_normal((columns // 4, columns))).astype("float32")


def output_error(weight, linear, x) -> float:
    return float(np.square(x @ (dequantize(linear) - weight).T).sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("group_size", "columns"), [(32, 160), (64, 160), (128, 300)])
def test_beats_rounding_on_correlated_inputs(group_size, columns, symmetric):
    rng = np.random.default_rng(group_size)
    x = correlated(rng, 512, columns) + 0.1 * rng.standard_normal((512, columns)).astype("float32")
    weight = rng.standard_normal((24, columns)).astype("float32")
    ours = gptq(weight, x.T @ x, group_size, symmetric)
    nearest = rtn(weight, group_size, symmetric)
    assert ours.scales.shape == nearest.scales.shape
    assert output_error(weight, ours, x) < 0.5 * output_error(weight, nearest, x)


def test_independent_inputs_leave_plain_rounding():
    weight = np.random.default_rng(1).standard_normal((8, 160)).astype("float32")
    ours, nearest = gptq(weight, np.eye(160), 64, False), rtn(weight, 64, False)
    np.testing.assert_array_equal(ours.qweight, nearest.qweight)
    np.testing.assert_array_equal(ours.offsets, nearest.offsets)


def test_agrees_with_solving_for_the_rest_after_every_column():
    """The textbook form: fix a column, then minimize the output error over the columns still free."""
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((5, 40)).astype("float32")
    x = rng.standard_normal((200, 40)) @ rng.standard_normal((40, 40))
    hessian = x.T @ x
    ours = gptq(weight, hessian, 64, False)
    damped = hessian + DAMPING * np.diag(hessian).mean() * np.eye(40)
    scale, offset = ours.scales.astype("float64"), ours.offsets.astype("float64")
    free = weight.astype("float64")
    for k in range(40):
        codes = np.clip(np.rint((free[:, k] - offset[:, 0]) / scale[:, 0]), 0, 15)
        np.testing.assert_array_equal(unpack(ours.qweight, 40)[:, k], codes)
        error = free[:, k] - (codes * scale[:, 0] + offset[:, 0])
        rest = slice(k + 1, None)
        free[:, rest] += np.outer(error, np.linalg.solve(damped[rest, rest], damped[rest, k]))


def test_drifted_inputs_are_made_up_for():
    """Inputs that layers before have changed: fitted weights come nearer to the outputs of the true inputs."""
    rng = np.random.default_rng(5)
    x_float = correlated(rng, 512, 128) + 0.3 * rng.standard_normal((512, 128)).astype("float32")
    x = (0.9 * x_float + 0.2 * rng.standard_normal((512, 128)) @ rng.standard_normal((128, 128))).astype("float32")
    weight = rng.standard_normal((24, 128)).astype("float32")
    wanted = x_float @ weight.T

    def error(linear) -> float:
        return float(np.square(x @ dequantize(linear).T - wanted).sum())

    fitted = gptq(weight, x.T @ x, 64, False, (x_float - x).T @ x)
    assert error(fitted) < 0.7 * error(gptq(weight, x.T @ x, 64, False))
    # The same as plain GPTQ on the damped least-squares fit.
    hessian = (x.T @ x).astype("float64")
    damped = hessian + DAMPING * np.diag(hessian).mean() * np.eye(128)
    fit = weight + weight @ (x_float - x).T @ x @ np.linalg.inv(damped)
    by_hand = gptq(fit.astype("float32"), hessian, 64, False)
    assert (dequantize(fitted) == dequantize(by_hand)).mean() > 0.9


def test_an_input_that_is_never_used_does_no_harm():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((100, 64)).astype("float32")
    x[:, 5] = 0
    weight = rng.standard_normal((4, 64)).astype("float32")
    assert output_error(weight, gptq(weight, x.T @ x, 32, False), x) < output_error(weight, rtn(weight, 32, False), x)


def test_the_weights_given_are_left_as_they_were():
    weight = np.ones((2, 32), "float32")
    gptq(weight, np.zeros((32, 32)), 32, False)
    np.testing.assert_array_equal(weight, 1)


def test_the_factor_inverts_even_a_singular_hessian():
    x = np.ones((3, 50))
    factor = inverse_factor(x.T @ x).astype("float64")
    assert np.allclose(np.tril(factor, -1), 0)
    damped = x.T @ x + DAMPING * 3 * np.eye(50)
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(50), atol=1e-3)


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(AgqError, match="not finite"):
        gptq(np.ones((1, 32), "float32"), np.full((32, 32), np.nan), 32, False)
