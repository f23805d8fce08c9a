import numpy as np
import pytest
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

from agq_tvm.errors import AgqError
from agq_tvm.models.registry import describe
from tests.tiny import tiny_config


def test_describes_a_model():
    config = describe(tiny_config("bloom"))
    assert (config.positions, config.activation, config.norm_placement) == ("alibi", "gelu_tanh", "before")
    qkv, o, up, down = config.linears
    assert (qkv.rows, o.rows, up.rows, down.in_features) == ((288,), (96,), (384,), 384)
    assert config.embedding_norm and config.tied_embeddings


def test_q_k_and_v_are_stacked_whatever_the_heads():
    qkv = describe(tiny_config("bloom", n_head=3)).linears[0]
    stored = np.array([f"head {h} {kind} {d}" for h in range(3) for kind in "qkv" for d in range(32)])
    used = [f"head {h} {kind} {d}" for kind in "qkv" for h in range(3) for d in range(32)]
    assert stored[qkv.row_order()].tolist() == used


def test_the_context_is_that_of_training():
    config = tiny_config("bloom")
    del config["seq_length"]
    assert describe(config).context_length == 2048
    assert describe(config | {"seq_length": 100}).context_length == 100


def test_older_names_are_read():
    config = tiny_config("bloom")
    names = (("hidden_size", "n_embed"), ("n_head", "num_attention_heads"), ("n_layer", "num_hidden_layers"))
    old = config | {new: config[name] for name, new in names}
    for name, _ in names:
        del old[name]
    assert describe(old) == describe(config)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 14, 16, 25, 112])
def test_slopes_are_those_of_transformers(heads):
    config = describe(tiny_config("bloom", n_head=heads, hidden_size=heads))
    np.testing.assert_allclose(config.alibi_slopes(), _get_alibi_slopes(heads, "cpu"), rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"n_head": 7}, "multiple of n_head 7"),
        ({"hidden_size": None}, "has no hidden_size: it does not describe a model of the family BLOOM"),
        ({"n_layer": -1}, "n_layer"),
        ({"seq_length": 0}, "seq_length"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon"),
        ({"apply_residual_connection_post_layernorm": "no"}, "apply_residual_connection_post_layernorm"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
    ],
)
def test_refuses_in_one_sentence(overrides, words):
    with pytest.raises(AgqError, match=words):
        describe(tiny_config("bloom", **overrides))
