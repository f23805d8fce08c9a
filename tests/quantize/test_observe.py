import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.forward import start_probabilities
from agq_tvm.quantize.observe import observe, outlier_ratio
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.source import open_source
from tests.tiny import tiny_config, write_tiny_model

WINDOWS = [np.random.default_rng(i).integers(3, 259, 40).tolist() for i in range(3)]
FIRST_READERS = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "gate_up": "mlp.up_proj", "down": "mlp.down_proj"}


@pytest.fixture(scope="module")
def seen_by_transformers(tiny_llama):
    """The inputs [L, W, T, K] of each linear and the attention maps [L, W, H, T, T], by transformers' own hooks."""
    config = LlamaConfig(**tiny_config(), attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    tensors = load_file(tiny_llama / "model.safetensors")
    model.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()}, strict=False)
    inputs = {name: [[] for _ in model.model.layers] for name in FIRST_READERS}
    for i, layer in enumerate(model.model.layers):
        for name, reader in FIRST_READERS.items():
            layer.get_submodule(reader).register_forward_pre_hook(
                lambda _, x, found=inputs[name][i]: found.append(x[0][0].numpy())
            )
    with torch.inference_mode():
        maps = [model(torch.tensor([window]), output_attentions=True).attentions for window in WINDOWS]
    return {name: np.array(found) for name, found in inputs.items()}, np.array(
        [[layer[0].numpy() for layer in window] for window in maps]
    ).swapaxes(0, 1)


@pytest.fixture(scope="module")
def observation(tiny_llama):
    return observe(ReferenceModel.from_source(open_source(tiny_llama)), WINDOWS)


@pytest.mark.parametrize("name", FIRST_READERS)
def test_magnitudes_are_those_of_transformers(seen_by_transformers, observation, name):
    x, seen = np.abs(seen_by_transformers[0][name]), observation.inputs[name]
    np.testing.assert_allclose(seen.channel_largest, x.max((1, 2)), rtol=1e-3)
    np.testing.assert_allclose(seen.channel_largest_later, x[:, :, 1:].max((1, 2)), rtol=1e-3)
    np.testing.assert_allclose(seen.token_largest, x.max(3), rtol=1e-3)
    named = np.take_along_axis(x, seen.token_channel[..., None], 3)[..., 0]
    np.testing.assert_allclose(named, x.max(3), rtol=1e-3)


def test_attention_to_the_first_token_is_that_of_transformers(seen_by_transformers, observation):
    column = seen_by_transformers[1][..., 0]
    assert column.shape == (2, 3, 6, 40)
    np.testing.assert_allclose(observation.start_attention, column[..., 1:].mean((1, 3)), rtol=1e-3)


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_attention_of_other_families(tmp_path, family):
    path = write_tiny_model(tmp_path / "model", family, 3)
    found = observe(ReferenceModel.from_source(open_source(path)), WINDOWS[:1]).start_attention
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        maps = model(torch.tensor(WINDOWS[:1]), output_attentions=True).attentions
    np.testing.assert_allclose(found, [layer[0, :, 1:, 0].mean(1).numpy() for layer in maps], rtol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(0, 99), st.sampled_from([0.1, 1, 100]))
def test_start_probabilities_are_column_zero_of_a_softmax(kv_heads, sharing, length, seed, size):
    rng = np.random.default_rng(seed)
    q, k = (size * rng.standard_normal((heads, length, 8)) for heads in (kv_heads * sharing, kv_heads))
    found = start_probabilities(torch.from_numpy(q), torch.from_numpy(k)).numpy()
    for head in range(len(q)):
        for row in range(length):
            scores = k[head // sharing, : row + 1] @ q[head, row] / 8**0.5
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(found[head, row], weights[0] / weights.sum(), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found[:, 0], 1)


def test_observing_changes_nothing(tiny_llama, observation):
    class Counter:
        inputs = maps = 0

        def linear_input(self, layer, name, x):
            self.inputs += 1

        def attention(self, layer, q, k, bias):
            assert q.shape == (6, 40, 16) and k.shape == (2, 40, 16) and bias is None
            self.maps += 1

    model, counter = ReferenceModel.from_source(open_source(tiny_llama)), Counter()
    np.testing.assert_array_equal(model.logits(WINDOWS[0], observer=counter), model.logits(WINDOWS[0]))
    assert (counter.inputs, counter.maps) == (8, 2)


def test_a_checkpoint_shows_its_inputs_before_they_are_rounded(quantized):
    checkpoint = read_checkpoint(quantized(activation="static"))
    seen = observe(ReferenceModel.from_checkpoint(checkpoint), WINDOWS[:1]).inputs["qkv"].channel_largest[1]
    steps = seen / checkpoint.linear("model.layers.1.self_attn.q_proj").act_scale
    assert np.abs(steps - np.rint(steps)).max() > 0.4


def test_outlier_ratio():
    channels = np.array([[1, 1, 1, 1, 1], [2, 1, 4, 3, 40], [0, 0, 0, 5, 9], [0, 0, 1, 2, 3]], "float32")
    np.testing.assert_array_equal(outlier_ratio(channels), [1, 40 / 3, np.nan, 3])
