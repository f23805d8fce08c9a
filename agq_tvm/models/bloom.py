"""BLOOM (`model_type` "bloom"): ALiBi, a norm after the embedding, q, k and v in one matrix, biases."""

from collections.abc import Mapping

from agq_tvm.models.decoder import DecoderConfig, Linear, NormStyle
from agq_tvm.models.fields import Fields

_SEQUENCE = 2048  # what BLOOM was trained on; ALiBi itself sets no limit


def describe(config: Mapping) -> DecoderConfig:
    """Describe a BLOOM model.

    Parameters
    ----------
    config : mapping
        The contents of a Hugging Face ``config.json``; the older names ``n_embed``, ``num_attention_heads`` and
        ``num_hidden_layers`` are read as well. ``seq_length``, where there is one, is the longest context.

    Returns
    -------
    DecoderConfig

    Raises
    ------
    AgqError
        If a value is missing, out of bounds or contradicts another.
    """
    fields = Fields(config, "BLOOM")
    hidden = fields.size(_spelling(fields, "n_embed", "hidden_size"), "hidden")
    heads_name = _spelling(fields, "num_attention_heads", "n_head")
    heads = fields.size(heads_name, "heads")
    vocab = fields.size("vocab_size", "vocab_size")
    shared = fields.flag("apply_residual_connection_post_layernorm")
    return DecoderConfig(
        family="bloom",
        vocab_size=vocab,
        hidden_size=hidden,
        embedding_size=hidden,
        num_layers=fields.size(_spelling(fields, "num_hidden_layers", "n_layer"), "layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=fields.head_dim(hidden, heads, heads_name, "correct them"),
        context_length=fields.size("seq_length", "positions", _SEQUENCE),
        norm=NormStyle("layer", fields.positive("layer_norm_epsilon", 1e-5, most=1.0)),
        norm_placement="shared" if shared else "before",
        activation="gelu_tanh",
        gated=False,
        positions="alibi",
        linears=(
            Linear("qkv", ("self_attention.query_key_value",), (3 * hidden,), hidden, True, interleaved_heads=heads),
            Linear("o", ("self_attention.dense",), (hidden,), hidden, True),
            Linear("up", ("mlp.dense_h_to_4h",), (4 * hidden,), hidden, True),
            Linear("down", ("mlp.dense_4h_to_h",), (hidden,), 4 * hidden, True),
        ),
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        bos_token_id=fields.token("bos_token_id", 1, vocab),
        eos_token_ids=fields.tokens("eos_token_id", 2, vocab),
        base_prefix="transformer.",
        layer_prefix="transformer.h.{layer}.",
        embedding="transformer.word_embeddings",
        embedding_norm="transformer.word_embeddings_layernorm",
        input_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        final_norm="transformer.ln_f",
    )


def _spelling(fields: Fields, other: str, usual: str) -> str:
    """Return which of two names the config uses."""
    return other if fields.get(other) is not None else usual
