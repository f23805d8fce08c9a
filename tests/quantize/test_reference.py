import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from agq_tvm.errors import AgqError
from agq_tvm.quantize.checkpoint import QuantizedLinear, read_checkpoint
from agq_tvm.quantize.operators import QuantizedOperator
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.source import open_source
from agq_tvm.quantize.tables import dequantize_table
from agq_tvm.quantize.weights import dequantize, rtn
from tests.tiny import tiny_config, write_tiny_llama

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TOKENS = np.random.default_rng(0).integers(0, 259, 70).tolist()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 6, "num_hidden_layers": 3},
        {"head_dim": 24},
        {"rope_scaling": LLAMA3},
    ],
    ids=["tied", "untied", "one-kv-head", "all-kv-heads", "wide-heads", "llama3"],
)
def test_float_logits_are_those_of_transformers(tmp_path, overrides):
    path = write_tiny_llama(tmp_path / "m", 5, **overrides)
    theirs = LlamaForCausalLM(LlamaConfig(**tiny_config(**overrides))).eval()
    tensors = {name: torch.from_numpy(value) for name, value in load_file(path / "model.safetensors").items()}
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    with torch.inference_mode():
        expected = theirs(torch.tensor([TOKENS])).logits[0].numpy()
    ours = ReferenceModel.from_source(open_source(path)).logits(TOKENS)
    assert ours.dtype == np.float32 and ours.shape == (len(TOKENS), 260)
    np.testing.assert_allclose(ours, expected, atol=2e-4 * np.abs(expected).max())


def test_without_activation_codes_only_the_weights_are_quantized(quantized):
    checkpoint = read_checkpoint(quantized(group_size=64))
    source = open_source(checkpoint.path.parent / "source")
    exact = ReferenceModel.from_source(source).logits(TOKENS)
    rounded = ReferenceModel.from_checkpoint(checkpoint, "none").logits(TOKENS)
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 0.005 < error < 0.5


def naive_linear(part: QuantizedLinear, x: np.ndarray, activation: str):
    """The contract, one product at a time; returns y in float64, codes, scales and the integer sums."""
    group, features = part.group_size, part.in_features
    groups = -(-features // group)
    scales_w = part.scales.astype("float64")
    offsets = -8 * scales_w if part.offsets is None else part.offsets.astype("float64")
    y = np.zeros((len(x), len(part.qweight)))
    codes = np.zeros(x.shape, "int64")
    scales = np.zeros((len(x), groups if activation == "per-token-group" else 1), "float32")
    sums = np.zeros((len(x), groups, len(part.qweight)), "int64")
    for m, row in enumerate(x):
        for g in range(groups):
            channels = range(g * group, min(features, (g + 1) * group))
            seen = row[list(channels)] if activation == "per-token-group" else row
            if activation == "static":
                scale, zero = part.act_scale[0], int(part.act_zero[0])
            else:
                largest = np.abs(seen).max()
                scale, zero = (np.float32(largest / np.float32(127)) if largest else np.float32(1)), 0
            scales[m, g if scales.shape[1] > 1 else 0] = scale
            for k in channels:
                codes[m, k] = np.clip(int(np.rint(row[k] * (np.float32(1) / scale))) + zero, -127, 127)
            for n in range(y.shape[1]):
                q = [part.qweight[n, k // 2] >> (4 * (k % 2)) & 15 for k in channels]
                dot = sum(int(a) * int(b) for a, b in zip(codes[m, list(channels)], q, strict=True))
                total = int(codes[m, list(channels)].sum())
                sums[m, g, n] = dot
                y[m, n] += scale * (scales_w[n, g] * dot + offsets[n, g] * total)
                y[m, n] -= scale * zero * (scales_w[n, g] * sum(map(int, q)) + offsets[n, g] * len(q))
    return y + (0 if part.bias is None else part.bias), codes, scales, sums


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("activation", ["per-token", "per-token-group", "static"])
@pytest.mark.parametrize(("group_size", "features"), [(32, 64), (64, 96), (128, 41)])
def test_linears_are_the_contract(activation, symmetric, group_size, features):
    rng = np.random.default_rng(features)
    x = rng.standard_normal((4, features), dtype="float32") * 3
    x[1] = 0
    x[2, 5] = 300.0
    static = {"act_scale": np.array([0.04], "float32"), "act_zero": np.array([-31], "int32")}
    parts = []
    for rows in (3, 2):
        part = rtn(rng.standard_normal((rows, features), dtype="float32"), group_size, symmetric)
        bias = rng.standard_normal(rows, dtype="float32") if rows == 3 else None
        fields = {**part.__dict__, "bias": bias} | (static if activation == "static" else {})
        parts.append(QuantizedLinear(**fields))
    operator = QuantizedOperator(tuple(parts), activation)
    y, codes, scales, sums = (value.numpy() for value in operator.exact(torch.from_numpy(x)))
    expected = [naive_linear(part, x, activation) for part in parts]
    assert (codes.dtype, scales.dtype, sums.dtype) == (np.int8, np.float32, np.int32)
    np.testing.assert_array_equal(codes, expected[0][1])
    np.testing.assert_array_equal(scales, expected[0][2])
    np.testing.assert_array_equal(sums, np.concatenate([e[3] for e in expected], axis=2))
    wanted = np.concatenate([e[0] for e in expected], axis=1)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    fast = operator(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(fast, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("activation", ["per-token", "per-token-group", "static"])
def test_the_trace_sees_every_linear_in_order(quantized, activation):
    checkpoint = read_checkpoint(quantized(group_size=64, activation=activation))
    model = ReferenceModel.from_checkpoint(checkpoint)
    calls = []
    traced = model.logits(TOKENS, trace=lambda *call: calls.append(call))
    linears = checkpoint.config.linears
    assert [call[0] for call in calls] == [f"layers.{i}.{linear.name}" for i in range(2) for linear in linears]
    for (_, codes, scales, sums), linear in zip(calls, linears * 2, strict=True):
        groups = -(-linear.in_features // 64)
        assert codes.shape == (len(TOKENS), linear.in_features)
        assert scales.shape == (len(TOKENS), groups if activation == "per-token-group" else 1)
        assert sums.shape == (len(TOKENS), groups, sum(linear.rows))
    plain = model.logits(TOKENS)
    # A code on a tie may fall to either side after sums in another order; most do not.
    assert np.median(np.abs(traced - plain)) < 1e-2 * np.abs(plain).max()


def test_eight_bit_activations_cost_little_and_groups_less(quantized):
    checkpoint = read_checkpoint(quantized(group_size=32))
    exact = ReferenceModel.from_checkpoint(checkpoint, "none").logits(TOKENS)
    error = {
        activation: np.linalg.norm(ReferenceModel.from_checkpoint(checkpoint, activation).logits(TOKENS) - exact)
        for activation in ("per-token", "per-token-group")
    }
    assert 0 < error["per-token-group"] < error["per-token"] < 0.1 * np.linalg.norm(exact)


def test_keys_and_values_are_rounded_to_half(quantized, monkeypatch):
    checkpoint = read_checkpoint(quantized(group_size=32))
    halved = ReferenceModel.from_checkpoint(checkpoint, "none").logits(TOKENS)
    monkeypatch.setattr(torch.Tensor, "half", lambda self: self)
    full = ReferenceModel.from_checkpoint(checkpoint, "none").logits(TOKENS)
    error = np.abs(halved - full).max() / np.abs(full).max()
    assert 1e-6 < error < 1e-2


def test_the_head_sees_two_terms_of_eight_bit_codes_in_groups_of_32(quantized):
    checkpoint = read_checkpoint(quantized({"tie_word_embeddings": False}))
    model = ReferenceModel.from_checkpoint(checkpoint)
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((3, 96), dtype="float32"))
    table = checkpoint.table("lm_head")
    expected = np.zeros((3, 260))
    for g in range(3):
        channels = slice(32 * g, 32 * g + 32)
        part = x.numpy()[:, channels]
        for _ in range(2):
            scale = np.abs(part).max(axis=1, keepdims=True) / np.float32(127)
            codes = np.rint(part * (np.float32(1) / scale))
            part = part - codes * scale
            dots = codes.astype("int64") @ table.qweight[:, channels].astype("int64").T
            expected += scale.astype("float64") * table.scales[:, g].astype("float64") * dots
    np.testing.assert_allclose(model._exit.head(x).numpy(), expected, rtol=1e-4, atol=1e-5)
    exact = x.double().numpy() @ dequantize_table(table).astype("float64").T
    np.testing.assert_allclose(model._exit.head(x).numpy(), exact, rtol=0, atol=1e-3)


def test_causal(quantized):
    model = ReferenceModel.from_checkpoint(read_checkpoint(quantized(group_size=32)))
    np.testing.assert_allclose(model.logits(TOKENS)[:20], model.logits(TOKENS[:20]), rtol=1e-3, atol=2e-3)


def test_tokens_must_fit_the_model(tiny_llama):
    model = ReferenceModel.from_source(open_source(tiny_llama))
    for tokens, words in (([], "0 tokens"), ([1] * 257, "257 tokens"), ([260], "vocabulary"), ([-1], "vocabulary")):
        with pytest.raises(AgqError, match=words):
            model.logits(tokens)


def test_static_activations_need_a_calibrated_checkpoint(quantized):
    checkpoint = read_checkpoint(quantized(group_size=32))
    with pytest.raises(AgqError, match="no static activation scales"):
        ReferenceModel.from_checkpoint(checkpoint, "static")
    with pytest.raises(AgqError, match="unknown activation"):
        ReferenceModel.from_checkpoint(checkpoint, "int4")


def test_weights_too_large_to_keep_are_made_again(quantized, monkeypatch):
    checkpoint = read_checkpoint(quantized(group_size=32))
    kept = ReferenceModel.from_checkpoint(checkpoint)
    monkeypatch.setattr("agq_tvm.quantize.reference._KEPT_BYTES", 0)
    streamed = ReferenceModel.from_checkpoint(checkpoint)
    np.testing.assert_array_equal(kept.logits(TOKENS), streamed.logits(TOKENS))
    name = "model.layers.0.mlp.down_proj"
    np.testing.assert_array_equal(
        streamed._layer(0).linears["down"]._float.weight.numpy(), dequantize(checkpoint.linear(name))
    )
    assert streamed._layer(0) is not streamed._layer(0)
    assert kept._layer(0) is kept._layer(0)
