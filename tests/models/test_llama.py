import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from agq_tvm.errors import AgqError
from agq_tvm.models.registry import describe
from tests.tiny import tiny_config


def test_describes_grouped_heads():
    config = describe(tiny_config(num_attention_heads=6, num_key_value_heads=2, eos_token_id=[2, 5]))
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (6, 2, 16)
    assert config.eos_token_ids == (2, 5)
    qkv, o, gate_up, down = config.linears
    assert (qkv.rows, qkv.in_features) == ((96, 32, 32), 96)
    assert (o.in_features, gate_up.rows, down.in_features) == (96, (160, 160), 160)


def test_missing_values_take_the_defaults_of_transformers():
    config = tiny_config()
    for name in ("num_key_value_heads", "head_dim", "rope_theta", "eos_token_id", "tie_word_embeddings"):
        del config[name]
    described = describe(config)
    assert (described.num_kv_heads, described.head_dim, described.eos_token_ids) == (6, 16, (2,))
    assert not described.tied_embeddings
    assert described.rope_inverse_frequencies[1] == pytest.approx(10000 ** (-2 / 16))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "scaling",
    [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}, LLAMA3],
    ids=lambda scaling: scaling["rope_type"],
)
def test_rotary_frequencies_are_those_of_transformers(scaling):
    parameters = {"rope_theta": 500.0, **scaling}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**tiny_config(rope_parameters=parameters))).inv_freq
    old_spelling = describe(tiny_config(rope_theta=500.0, rope_scaling=scaling))
    new_spelling = describe(tiny_config(rope_theta=None, rope_parameters=parameters))
    assert old_spelling == new_spelling
    np.testing.assert_allclose(old_spelling.rope_inverse_frequencies, theirs.to(torch.float64), rtol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"attention_bias": 1}, "attention_bias"),
        ({"mlp_bias": "no"}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}}, "high_freq_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 96.0}, "hidden_size"),
        ({"hidden_size": "96"}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "multiple of num_key_value_heads"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": None}, "head_dim"),
        ({"head_dim": 15}, "odd"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"eos_token_id": 260}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"model_type": "gpt2"}, "supported: bloom, llama, mistral, opt, qwen2"),
        ({"model_type": ["llama"]}, "supported: bloom, llama"),
    ],
)
def test_refuses_in_one_sentence(overrides, words):
    with pytest.raises(AgqError, match=words):
        describe(tiny_config(**overrides))
