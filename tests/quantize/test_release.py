"""The simulation of the published code, against a plain computation in numpy."""

import numpy as np
import pytest
import torch

from agq_tvm.errors import AgqError
from agq_tvm.flow.evaluate import evaluate_reference, evaluate_release
from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.release import attend, release_model, round_probabilities, round_to_range
from agq_tvm.quantize.source import open_source
from agq_tvm.quantize.weights import dequantize
from tests.tiny import write_tiny_llama, write_tiny_model

WINDOWS = [np.random.default_rng(i).integers(3, 259, 40).tolist() for i in range(3)]


class ByHand:
    """The tiny LLaMA in float64, one token window at a time."""

    def __init__(self, source, checkpoint):
        self.source, self.checkpoint, self.config = source, checkpoint, source.config
        self.largest: dict = {}
        self.rounds = False

    def seen(self, key, x, axes):
        """Round to the largest magnitudes found under `key`, or find them."""
        if not self.rounds:
            found = abs(x).max(axes)
            self.largest[key] = np.maximum(self.largest.get(key, 0), found)
            return x
        scale = np.expand_dims(self.largest[key], axes) / 127.5
        return np.clip(np.rint(x / scale), -128, 127) * scale

    def linear(self, layer, parts, x):
        weights = [dequantize(self.checkpoint.linear(f"model.layers.{layer}.{part}")) for part in parts]
        return self.seen((layer, parts[0]), x, 0) @ np.concatenate(weights).astype("float64").T

    def norm(self, name, x):
        gain = self.source.tensor(f"{name}.weight")
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.norm.epsilon) * gain

    def attention(self, layer, x):
        config, width = self.config, self.config.head_dim
        names = [f"self_attn.{part}_proj" for part in "qkv"]
        heads = self.linear(layer, names, x).reshape(len(x), -1, width)
        heads = self.seen((layer, "heads"), heads, (0, 2)).transpose(1, 0, 2)
        cos, sin = (np.concatenate((table, table), -1) for table in config.rope_tables(len(x)))
        q, k, v = np.split(heads, [config.num_heads, config.num_heads + config.num_kv_heads])
        q, k = (
            each * cos + np.concatenate((-each[..., width // 2 :], each[..., : width // 2]), -1) * sin
            for each in (q, k)
        )
        out = np.empty_like(q)
        for head, queries in enumerate(q):
            shared = head // (config.num_heads // config.num_kv_heads)
            p = np.exp(np.where(np.tri(len(x)) > 0, queries @ k[shared].T / np.sqrt(width), -np.inf))
            p /= p.sum(-1, keepdims=True)
            if self.rounds:
                code = np.rint(-np.log2(p, where=p > 0, out=np.full_like(p, -np.inf)))
                p = np.where(code > 15, 0, 2.0 ** -np.minimum(code, 15))
            out[head] = p @ v[shared]
        return self.linear(layer, ["self_attn.o_proj"], out.transpose(1, 0, 2).reshape(len(x), -1))

    def logits(self, tokens):
        embedding = self.source.tensor("model.embed_tokens.weight").astype("float64")
        x = embedding[tokens]
        for layer in range(self.config.num_layers):
            prefix = f"model.layers.{layer}."
            x = x + self.attention(layer, self.norm(prefix + "input_layernorm", x))
            inner = self.linear(
                layer, ["mlp.gate_proj", "mlp.up_proj"], self.norm(prefix + "post_attention_layernorm", x)
            )
            gate, up = np.split(inner, 2, -1)
            x = x + self.linear(layer, ["mlp.down_proj"], gate / (1 + np.exp(-gate)) * up)
        return self.norm("model.norm", x) @ embedding.T


@pytest.fixture
def pair(quantized):
    path = quantized(activation="none")
    return open_source(path.parent / "source"), read_checkpoint(path)


def test_it_is_what_the_published_code_does(pair):
    by_hand = ByHand(*pair)
    for window in WINDOWS:
        plain = by_hand.logits(window)
    by_hand.rounds = True
    tokens = np.random.default_rng(9).integers(3, 259, 30).tolist()
    expected, ours = by_hand.logits(tokens), release_model(*pair, WINDOWS).logits(tokens)
    assert plain.shape == (40, pair[0].config.vocab_size)
    by_hand.rounds = False
    effect = abs(expected - by_hand.logits(tokens)).mean()
    # Float32 moves a few values across a tie; nearly all others agree, far below what rounding does.
    assert np.median(abs(ours - expected)) < 0.02 * effect
    assert abs(ours - expected).mean() < 0.2 * effect


def test_probabilities_are_rounded_to_sixteen_powers_of_two_and_zero():
    p = torch.tensor([1.0, 0.75, 0.7, 2**-15.4, 2**-15.6, 0.0])
    torch.testing.assert_close(round_probabilities(p), torch.tensor([1.0, 1.0, 0.5, 2**-15, 0.0, 0.0]))


def test_ranges_have_256_codes_and_dead_channels_stay_zero():
    x = torch.tensor([[1.0, -1.0, 0.0], [-4.0, 0.5, 0.0]])
    rounded = round_to_range(x, torch.tensor([2.0, 1.0, 0.0]))
    step = torch.tensor([2.0, 1.0, 0.0]) / 127.5
    torch.testing.assert_close(rounded[1], torch.tensor([-128.0, 64.0, 0.0]) * step)
    assert (rounded[:, 2] == 0).all()
    torch.testing.assert_close(round_to_range(torch.tensor(5.0), torch.tensor(1.0)), torch.tensor(127 / 127.5))


def test_a_bias_masks_and_shifts_scores():
    q, k, v = (torch.randn(heads, 5, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1) > 0, -torch.inf).expand(4, -1, -1)
    torch.testing.assert_close(attend(q, k, v, mask), attend(q, k, v, None))
    away = mask.clone()
    away[:, 1:, 0] = -1e4
    out = attend(q, k, v, away)
    torch.testing.assert_close(out[:, 1], v[:, 1].repeat_interleave(2, 0))


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_other_families(tmp_path, family):
    source = open_source(write_tiny_model(tmp_path / "m", family, 2))
    quantize(source, tmp_path / "c", method="rtn", group_size=32, activation="none")
    checkpoint = read_checkpoint(tmp_path / "c")
    weights = ReferenceModel.from_checkpoint(checkpoint, "none").logits(WINDOWS[0])
    ours = release_model(source, checkpoint, WINDOWS).logits(WINDOWS[0])
    correlation = np.corrcoef(ours.ravel(), weights.ravel())[0, 1]
    assert 0.95 < correlation < 0.99999


def test_scores_are_of_the_same_tokens_as_others(pair):
    source, checkpoint = pair
    settings = {"window": 64, "max_tokens": 200}
    ours = evaluate_release(
        source, checkpoint.path, "persuasion", calibration=Calibration(samples=2, length=48), **settings
    )
    weights = evaluate_reference(checkpoint.path, "persuasion", activation="none", **settings)
    assert ours.losses.shape == weights.losses.shape == (3, 63)
    assert 0.9 < np.corrcoef(ours.losses.ravel(), weights.losses.ravel())[0, 1] < 0.9999


def test_weights_of_another_model_are_refused(pair, tmp_path):
    other = open_source(write_tiny_llama(tmp_path / "m", num_hidden_layers=3))
    with pytest.raises(AgqError, match="is not a checkpoint of"):
        release_model(other, pair[1], WINDOWS)
