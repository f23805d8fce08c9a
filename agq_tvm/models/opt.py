"""OPT (`model_type` "opt"): learned positions, LayerNorm before or after, an MLP without gate, biases."""

from collections.abc import Mapping

from agq_tvm.models.decoder import DecoderConfig, Linear, NormStyle
from agq_tvm.models.fields import Fields

_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_EPSILON = 1e-5  # not in the config: that of PyTorch's LayerNorm
_FIRST_POSITION = 2  # the table's first two rows belong to no position


def describe(config: Mapping) -> DecoderConfig:
    """Describe an OPT model, or one with its architecture such as Galactica.

    Parameters
    ----------
    config : mapping
        The contents of a Hugging Face ``config.json``.

    Returns
    -------
    DecoderConfig

    Raises
    ------
    AgqError
        If a value is missing, out of bounds or contradicts another, or if the model needs something that is
        not supported.
    """
    fields = Fields(config, "OPT")
    hidden, heads = fields.size("hidden_size", "hidden"), fields.size("num_attention_heads", "heads")
    vocab = fields.size("vocab_size", "vocab_size")
    embedding = fields.size("word_embed_proj_dim", "hidden", hidden)
    before = fields.flag("do_layer_norm_before", True)
    ends_with_norm = before and not fields.flag("_remove_final_layer_norm")
    projected = embedding != hidden
    return DecoderConfig(
        family="opt",
        vocab_size=vocab,
        hidden_size=hidden,
        embedding_size=embedding,
        num_layers=fields.size("num_hidden_layers", "layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=fields.head_dim(hidden, heads, "num_attention_heads", "correct them"),
        context_length=fields.size("max_position_embeddings", "positions"),
        norm=NormStyle("layer", _EPSILON, fields.flag("layer_norm_elementwise_affine", True)),
        norm_placement="before" if before else "after",
        activation=_ACTIVATIONS[fields.choice("activation_function", "relu", _ACTIVATIONS)],
        gated=False,
        positions="learned",
        position_offset=_FIRST_POSITION,
        linears=_linears(hidden, fields.size("ffn_dim", "inner"), fields.flag("enable_bias", True)),
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        bos_token_id=fields.token("bos_token_id", 2, vocab),
        eos_token_ids=fields.tokens("eos_token_id", 2, vocab),
        base_prefix="model.",
        layer_prefix="model.decoder.layers.{layer}.",
        embedding="model.decoder.embed_tokens",
        input_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        final_norm="model.decoder.final_layer_norm" if ends_with_norm else None,
        position_table="model.decoder.embed_positions",
        project_in="model.decoder.project_in" if projected else None,
        project_out="model.decoder.project_out" if projected else None,
    )


def _linears(hidden: int, inner: int, bias: bool) -> tuple[Linear, ...]:
    parts = tuple(f"self_attn.{name}_proj" for name in "qkv")
    return (
        Linear("qkv", parts, (hidden, hidden, hidden), hidden, bias),
        Linear("o", ("self_attn.out_proj",), (hidden,), hidden, bias),
        Linear("up", ("fc1",), (inner,), hidden, bias),
        Linear("down", ("fc2",), (hidden,), inner, bias),
    )
