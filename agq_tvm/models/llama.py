"""LLaMA and its relatives (`model_type` "llama", "mistral", "qwen2"): one block, other defaults and biases."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from agq_tvm.errors import AgqError
from agq_tvm.models.decoder import DecoderConfig, Linear, NormStyle
from agq_tvm.models.fields import Fields, positive

_WINDOW = 4096  # where the config names none


@dataclass(frozen=True)
class _Defaults:
    """What a config of the family means where it says nothing."""

    kv_heads: int | None  # None: as many as heads
    bos: int | None
    eos: int | None


def describe_llama(config: Mapping) -> DecoderConfig:
    """Describe a LLaMA model by its ``config.json``; ``attention_bias`` and ``mlp_bias`` are supported.

    Raises
    ------
    AgqError
        See `_describe`.
    """
    fields = Fields(config, "LLaMA")
    attention_bias = fields.flag("attention_bias")
    biases = {"qkv": attention_bias, "o": attention_bias, "mlp": fields.flag("mlp_bias")}
    return _describe(fields, "llama", _Defaults(None, 1, 2), biases, window=None)


def describe_mistral(config: Mapping) -> DecoderConfig:
    """Describe a Mistral model by its ``config.json``; a sliding window limits the context.

    Raises
    ------
    AgqError
        See `_describe`.
    """
    fields = Fields(config, "Mistral")
    window = _window(fields) if config.get("sliding_window", _WINDOW) is not None else None
    return _describe(fields, "mistral", _Defaults(8, 1, 2), {}, window)


def describe_qwen2(config: Mapping) -> DecoderConfig:
    """Describe a Qwen2 model by its ``config.json``; a sliding window that is used limits the context.

    Raises
    ------
    AgqError
        See `_describe`.
    """
    fields = Fields(config, "Qwen2")
    window = _window(fields) if fields.flag("use_sliding_window") else None
    return _describe(fields, "qwen2", _Defaults(32, None, None), {"qkv": True}, window)


def _window(fields: Fields) -> int:
    return fields.size("sliding_window", "positions", _WINDOW)


def _describe(
    fields: Fields, family: str, defaults: _Defaults, biases: Mapping[str, bool], window: int | None
) -> DecoderConfig:
    """Describe a model with LLaMA's block.

    Parameters
    ----------
    fields : Fields
        Both spellings of the rotary settings are read: ``rope_theta`` with ``rope_scaling``, and
        ``rope_parameters``.
    family : str
        ``model_type``.
    defaults : _Defaults
    biases : mapping
        Whether ``"qkv"``, ``"o"`` and the linears of the ``"mlp"`` have biases.
    window : int or None
        Keys that attention reaches back to. No more positions are allowed than that: within it a sliding window
        hides nothing, so the model computes what it was trained for.

    Raises
    ------
    AgqError
        If a value is missing, out of bounds or contradicts another, or if the model needs something that is
        not supported (another activation function, another kind of rope scaling).
    """
    fields.choice("hidden_act", "silu", ("silu", "swish"))
    hidden, heads = fields.size("hidden_size", "hidden"), fields.size("num_attention_heads", "heads")
    kv_heads = _kv_heads(fields, heads, defaults)
    head_dim = _head_dim(fields, hidden, heads)
    vocab = fields.size("vocab_size", "vocab_size")
    context = fields.size("max_position_embeddings", "positions")
    return DecoderConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        embedding_size=hidden,
        num_layers=fields.size("num_hidden_layers", "layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=context if window is None else min(context, window),
        norm=NormStyle("rms", fields.positive("rms_norm_eps", 1e-6, most=1.0)),
        activation="silu",
        gated=True,
        positions="rotary",
        rope_inverse_frequencies=_inverse_frequencies(_rope_settings(fields.config), head_dim),
        linears=_linears(
            hidden, heads * head_dim, kv_heads * head_dim, fields.size("intermediate_size", "inner"), biases
        ),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        bos_token_id=fields.token("bos_token_id", defaults.bos, vocab),
        eos_token_ids=fields.tokens("eos_token_id", defaults.eos, vocab),
        base_prefix="model.",
        layer_prefix="model.layers.{layer}.",
        embedding="model.embed_tokens",
        input_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        final_norm="model.norm",
    )


def _kv_heads(fields: Fields, heads: int, defaults: _Defaults) -> int:
    absent = "num_key_value_heads" not in fields.config
    default = defaults.kv_heads if absent and defaults.kv_heads else heads
    kv_heads = fields.size("num_key_value_heads", "heads", default)
    if heads % kv_heads:
        raise AgqError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    return kv_heads


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    if fields.get("head_dim") is not None:
        head_dim = fields.size("head_dim", "heads")
    else:
        head_dim = fields.head_dim(hidden, heads, "num_attention_heads", "set head_dim, or correct them")
    if head_dim % 2:
        raise AgqError(f"config.json: head_dim {head_dim} is odd, rotary positions need an even one")
    return head_dim


def _linears(hidden: int, q: int, kv: int, inner: int, biases: Mapping[str, bool]) -> tuple[Linear, ...]:
    qkv, o, mlp = (biases.get(name, False) for name in ("qkv", "o", "mlp"))
    return (
        Linear("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (q, kv, kv), hidden, qkv),
        Linear("o", ("self_attn.o_proj",), (hidden,), q, o),
        Linear("gate_up", ("mlp.gate_proj", "mlp.up_proj"), (inner, inner), hidden, mlp),
        Linear("down", ("mlp.down_proj",), (hidden,), inner, mlp),
    )


def _rope_settings(config: Mapping) -> dict:
    """Bring both spellings to one: the theta and the scaling in one flat dictionary."""
    settings = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise AgqError(f"config.json: {key} must be an object, not {value!r}")
        settings.update(value or {})
    settings.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    settings["rope_type"] = settings.get("rope_type", settings.get("type", "default"))
    for value in (config.get("partial_rotary_factor"), settings.get("partial_rotary_factor")):
        if value not in (None, 1.0):
            raise AgqError(f"config.json: partial_rotary_factor {value!r} is not supported, only 1 is")
    return settings


def _inverse_frequencies(settings: dict, head_dim: int) -> tuple[float, ...]:
    theta = positive(settings["rope_theta"], "rope_theta")
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    kind = settings["rope_type"]
    if kind == "default":
        return tuple(plain)
    if kind == "linear":
        factor = positive(settings.get("factor"), "the factor of linear rope scaling")
        return tuple(f / factor for f in plain)
    if kind == "llama3":
        return tuple(_llama3(f, settings) for f in plain)
    raise AgqError(f"config.json: rope type {kind!r} is not supported, only 'default', 'linear' and 'llama3' are")


def _llama3(frequency: float, settings: dict) -> float:
    """Slow down long waves, keep short ones, and blend between them."""
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, original = (positive(settings.get(n), f"{n} of llama3 rope scaling") for n in names)
    if high <= low:
        raise AgqError(f"config.json: high_freq_factor {high:g} must be above low_freq_factor {low:g}")
    turns = original * frequency / (2 * math.pi)
    if turns < low:
        return frequency / factor
    if turns > high:
        return frequency
    blend = (turns - low) / (high - low)
    return (1 - blend) * frequency / factor + blend * frequency
