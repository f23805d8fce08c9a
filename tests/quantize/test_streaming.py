import weakref

import numpy as np
import pytest
import torch

from agq_tvm.errors import AgqError
from agq_tvm.quantize.activations import ActivationQuantizer, static_range
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.forward import attention_positions, layer_steps, read_norms, run_layer
from agq_tvm.quantize.gptq import gptq
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.scheme import Scheme
from agq_tvm.quantize.source import open_source
from agq_tvm.quantize.streaming import drained, quantize_layers, token_weights
from agq_tvm.quantize.tables import quantize_table
from agq_tvm.quantize.tensor_names import linear_shapes
from agq_tvm.quantize.weights import dequantize, rtn
from tests.tiny import write_tiny_model

WINDOWS = [np.random.default_rng(i).integers(3, 259, 64).tolist() for i in range(24)]
SCHEME = Scheme("gptq", 64, False, "none")


@pytest.fixture(scope="module")
def source(tiny_llama):
    return open_source(tiny_llama)


@pytest.fixture(scope="module")
def by_gptq(source):
    return dict(quantize_layers(source, SCHEME, WINDOWS))


def inputs_by_hand(source, weight_of, stop_layer: int, stop_linear: str) -> list[torch.Tensor]:
    """Run every window through the layers by itself; return the inputs of one linear."""
    config, found = source.config, []
    embedding = torch.from_numpy(source.tensor("model.embed_tokens.weight"))
    for window in WINDOWS:
        hidden = embedding[torch.tensor(window)]
        for layer in range(stop_layer + 1):
            prefix = f"model.layers.{layer}."
            norms = read_norms(config, layer, source.tensor)
            parts = {linear.name: linear.parts for linear in config.linears}

            def linear(name, x, layer=layer, prefix=prefix, parts=parts):
                if (layer, name) == (stop_layer, stop_linear):
                    found.append(x)
                return x @ torch.cat([torch.from_numpy(weight_of(prefix + part)) for part in parts[name]]).T

            hidden = run_layer(layer_steps(config, norms, hidden, attention_positions(config, 64), False), linear)
    return found


@pytest.mark.parametrize(("layer", "name"), [(0, "qkv"), (0, "down"), (1, "o"), (1, "gate_up")])
def test_every_linear_is_gptq_on_what_comes_out_of_the_quantized_ones(source, by_gptq, layer, name):
    inputs = inputs_by_hand(source, lambda part: dequantize(by_gptq[part]), layer, name)
    wanted = inputs_by_hand(source, lambda part: source.tensor(f"{part}.weight"), layer, name)
    weighted = [(x * token_weights(x)).double() for x in inputs]
    hessian = sum(w.T @ x.double() for w, x in zip(weighted, inputs, strict=True)).numpy()
    drift = sum((y - x).double().T @ w for w, x, y in zip(weighted, inputs, wanted, strict=True)).numpy()
    assert (np.abs(drift).max() > 0) == ((layer, name) != (0, "qkv"))
    linear = next(linear for linear in source.config.linears if linear.name == name)
    names = [f"model.layers.{layer}.{part}" for part in linear.parts]
    for part in names:
        expected = gptq(source.tensor(f"{part}.weight"), hessian, 64, False, drift)
        # Sums in another order can move a code that is on a tie, and with it the rest of its row.
        same = dequantize(by_gptq[part]) == dequantize(expected)
        assert same.mean() > 0.95


@pytest.mark.parametrize("activation", ["per-token", "per-token-group"])
def test_inputs_are_rounded_as_the_scheme_says(source, activation):
    """With activations of the scheme, the first linear sees the rounded inputs and later ones what follows."""
    scheme = Scheme("gptq", 64, False, activation)
    linears = dict(quantize_layers(source, scheme, WINDOWS[:4]))
    quantizer = ActivationQuantizer(activation, 64)
    found = inputs_by_hand(source, lambda part: source.tensor(f"{part}.weight"), 0, "qkv")[:4]
    rounded = [quantizer.rounded(x) for x in found]
    weighted = [(x * token_weights(x)).double() for x in rounded]
    hessian = sum(w.T @ x.double() for w, x in zip(weighted, rounded, strict=True)).numpy()
    drift = sum((y - x).double().T @ w for w, x, y in zip(weighted, rounded, found, strict=True)).numpy()
    name = "model.layers.0.self_attn.q_proj"
    expected = gptq(source.tensor(f"{name}.weight"), hessian, 64, False, drift)
    assert (dequantize(linears[name]) == dequantize(expected)).mean() > 0.95


def test_gptq_predicts_better_than_rounding(source, by_gptq):
    held_out = np.random.default_rng(99).integers(3, 259, 64).tolist()
    exact = ReferenceModel.from_source(source).logits(held_out)
    nearest = {name: rtn(source.tensor(f"{name}.weight"), 64, False) for name in linear_shapes(source.config)}

    def error(linears) -> float:
        class Quantized:
            config, raw_config, label = source.config, source.raw_config, "quantized"

            def tensor(self, name):
                linear = linears.get(name.removesuffix(".weight"))
                return source.tensor(name) if linear is None else dequantize(linear)

            bias = source.bias

        return float(np.square(ReferenceModel.from_source(Quantized()).logits(held_out) - exact).sum())

    assert error(by_gptq) < 0.8 * error(nearest)


def test_one_outlier_token_does_not_drown_the_others():
    x = torch.ones(5, 8)
    x[0] *= 1e4
    weighted = (x.square() * token_weights(x)).sum(-1)
    assert weighted.max() <= 1.01 * weighted.min()
    assert torch.isfinite(token_weights(torch.zeros(2, 8))).all()


def test_gptq_names_the_linear_that_fails(source, monkeypatch):
    def refuse(*_):
        raise AgqError("cannot invert")

    monkeypatch.setattr("agq_tvm.quantize.streaming.gptq", refuse)
    with pytest.raises(AgqError, match=r"layers\.0\.self_attn\.q_proj: cannot invert"):
        dict(quantize_layers(source, SCHEME, WINDOWS[:1]))


def test_static_ranges_hold_the_smallest_and_the_largest_input(source):
    linears = dict(quantize_layers(source, Scheme("rtn", 64, False, "static"), WINDOWS))
    assert linears.keys() == linear_shapes(source.config).keys()
    assert linears["model.layers.0.self_attn.k_proj"].act_scale.dtype == np.float32
    assert linears["model.layers.0.self_attn.k_proj"].act_zero.dtype == np.int32
    inputs = inputs_by_hand(source, lambda part: source.tensor(f"{part}.weight"), 0, "qkv")
    scale, zero = static_range(min(x.min().item() for x in inputs), max(x.max().item() for x in inputs))
    for part in ("q", "k", "v"):
        linear = linears[f"model.layers.0.self_attn.{part}_proj"]
        assert (linear.act_scale[0], linear.act_zero[0]) == (np.float32(scale), zero)
        expected = rtn(source.tensor(f"model.layers.0.self_attn.{part}_proj.weight"), 64, False)
        np.testing.assert_array_equal(linear.qweight, expected.qweight)


def test_static_calibration_uses_the_kept_embedding(quantized):
    checkpoint = read_checkpoint(quantized(activation="static"))
    source = open_source(checkpoint.path.parent / "source")
    table = quantize_table(source.tensor("model.embed_tokens.weight"), 8)
    np.testing.assert_array_equal(checkpoint.table("model.embed_tokens").qweight, table.qweight)
    q, k = (checkpoint.linear(f"model.layers.0.self_attn.{name}_proj") for name in "qk")
    assert q.act_scale == k.act_scale and q.act_zero == k.act_zero


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_layers_that_wait_keep_nothing_but_the_residual(tmp_path, family):
    """Calibration has a layer waiting for every window: what one keeps is kept as often."""
    source = open_source(write_tiny_model(tmp_path / "m", family))
    config, hidden = source.config, torch.ones(5, source.config.hidden_size)
    steps = layer_steps(config, read_norms(config, 0, source.tensor), hidden, attention_positions(config, 5), False)
    (_, x), kept = next(steps), []
    for linear in config.linears[:-1]:
        given, made = weakref.ref(x), torch.ones(5, sum(linear.rows))
        kept += [given, weakref.ref(made)]
        _, x = steps.send(made)
        del made
        assert [ref for ref in kept if ref() is not None] == []


def test_drained_lists_are_left_with_nothing():
    items = [[1], [2], [3]]
    assert [item for item in drained(items) if items.count(None) == item[0]] == [[1], [2], [3]]
