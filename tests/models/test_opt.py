import pytest

from agq_tvm.errors import AgqError
from agq_tvm.models.registry import describe
from agq_tvm.quantize.tensor_names import bias_shapes, linear_shapes, table_shapes, vector_shapes
from tests.tiny import tiny_config


def test_describes_a_pre_norm_model():
    config = describe(tiny_config("opt"))
    assert (config.norm_placement, config.activation, config.gated, config.positions) == (
        "before",
        "relu",
        False,
        "learned",
    )
    qkv, o, up, down = config.linears
    assert (qkv.rows, o.rows, up.rows, down.rows) == ((96, 96, 96), (96,), (160,), (96,))
    assert all(linear.bias for linear in config.linears)
    assert bias_shapes(config).keys() == {f"{name}.bias" for name in linear_shapes(config)}
    # Row 2 of the table is position 0.
    assert vector_shapes(config)["model.decoder.embed_positions.weight"] == (258, 96)
    assert "model.decoder.final_layer_norm.bias" in vector_shapes(config)


def test_describes_opt_350m():
    config = describe(tiny_config("opt", do_layer_norm_before=False, word_embed_proj_dim=64))
    assert config.norm_placement == "after" and config.final_norm is None
    assert table_shapes(config) == {
        "model.decoder.embed_tokens": (260, 64),
        "model.decoder.project_in": (96, 64),
        "model.decoder.project_out": (64, 96),
    }


def test_missing_values_take_the_defaults_of_transformers():
    config = tiny_config("opt")
    for name in ("activation_function", "do_layer_norm_before", "word_embed_proj_dim", "tie_word_embeddings"):
        del config[name]
    assert describe(config) == describe(tiny_config("opt"))


def test_norms_without_learned_vectors_are_in_no_file():
    config = describe(tiny_config("opt", layer_norm_elementwise_affine=False))
    assert list(vector_shapes(config)) == ["model.decoder.embed_positions.weight"]
    weight, bias = config.norm.vectors("any", 3, read=lambda name: pytest.fail("there is nothing to read"))
    assert (weight.tolist(), bias.tolist()) == ([1, 1, 1], [0, 0, 0])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"activation_function": "quick_gelu"}, "activation_function 'quick_gelu' is not supported; supported: relu"),
        ({"activation_function": ["relu"]}, "activation_function"),
        ({"num_attention_heads": 7}, "multiple of num_attention_heads 7"),
        ({"word_embed_proj_dim": 0}, "word_embed_proj_dim"),
        ({"ffn_dim": None}, "has no ffn_dim: it does not describe a model of the family OPT"),
        ({"max_position_embeddings": 1 << 30}, "max_position_embeddings"),
        ({"do_layer_norm_before": 1}, "do_layer_norm_before must be true or false"),
        ({"_remove_final_layer_norm": "no"}, "_remove_final_layer_norm"),
        ({"enable_bias": 0}, "enable_bias"),
        ({"layer_norm_elementwise_affine": "yes"}, "layer_norm_elementwise_affine"),
        ({"eos_token_id": 999}, "eos_token_id"),
    ],
)
def test_refuses_in_one_sentence(overrides, words):
    with pytest.raises(AgqError, match=words):
        describe(tiny_config("opt", **overrides))
