"""The LLaMA family (`model_type` "llama"): from a Hugging Face config to a decoder description."""

import math
from collections.abc import Mapping

from agq_tvm.errors import AgqError
from agq_tvm.models.decoder import DecoderConfig

# The largest value taken seriously for each size, so that a damaged config cannot ask for absurd memory.
_LIMITS = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 10,
    "num_key_value_heads": 1 << 10,
    "head_dim": 1 << 10,
    "max_position_embeddings": 1 << 24,
}


def describe(config: Mapping) -> DecoderConfig:
    """Describe a LLaMA model.

    Parameters
    ----------
    config : mapping
        The contents of a Hugging Face ``config.json``. Both spellings of the rotary settings are read:
        ``rope_theta`` with ``rope_scaling``, and ``rope_parameters``.

    Returns
    -------
    DecoderConfig

    Raises
    ------
    AgqError
        If a value is missing, out of bounds or contradicts another, or if the model needs something that is
        not supported (biases, another activation function, another kind of rope scaling).
    """
    _refuse_unsupported(config)
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    kv_heads = _size(config, "num_key_value_heads", heads)
    if config.get("head_dim") is None and hidden % heads:
        raise AgqError(
            f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}: "
            "set head_dim, or correct them"
        )
    head_dim = _size(config, "head_dim", hidden // heads)
    if heads % kv_heads:
        raise AgqError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise AgqError(f"config.json: head_dim {head_dim} is odd, rotary positions need an even one")
    vocab = _size(config, "vocab_size")
    return DecoderConfig(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size"),
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=_size(config, "max_position_embeddings"),
        norm_epsilon=_positive(config.get("rms_norm_eps", 1e-6), "rms_norm_eps", most=1.0),
        tied_embeddings=_flag(config, "tie_word_embeddings"),
        rope_inverse_frequencies=_inverse_frequencies(_rope_settings(config), head_dim),
        bos_token_id=_token(config.get("bos_token_id", 1), "bos_token_id", vocab),
        eos_token_ids=_tokens(config.get("eos_token_id", 2), "eos_token_id", vocab),
    )


def _refuse_unsupported(config: Mapping) -> None:
    for name in ("attention_bias", "mlp_bias"):
        if _flag(config, name):
            raise AgqError(f"config.json: {name} is true: LLaMA models with biases are not supported")
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise AgqError(f"config.json: hidden_act {act!r} is not supported, only 'silu' is")


def _size(config: Mapping, name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise AgqError(f"config.json has no {name}: it does not describe a LLaMA model")
    if type(value) is not int or not 1 <= value <= _LIMITS[name]:
        raise AgqError(f"config.json: {name} must be an integer in 1..{_LIMITS[name]}, not {value!r}")
    return value


def _flag(config: Mapping, name: str) -> bool:
    value = config.get(name)
    if value is not None and type(value) is not bool:
        raise AgqError(f"config.json: {name} must be true or false, not {value!r}")
    return bool(value)


def _positive(value: object, name: str, most: float = 1e30) -> float:
    number = type(value) in (int, float)
    if not number or not math.isfinite(value) or not 0 < value <= most:
        raise AgqError(f"config.json: {name} must be a number above 0 and at most {most:g}, not {value!r}")
    return float(value)


def _token(value: object, name: str, vocab: int) -> int | None:
    if value is not None and (type(value) is not int or not 0 <= value < vocab):
        raise AgqError(f"config.json: {name} must be a token below {vocab}, not {value!r}")
    return value


def _tokens(value: object, name: str, vocab: int) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(token for v in values if (token := _token(v, name, vocab)) is not None)


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
    theta = _positive(settings["rope_theta"], "rope_theta")
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    kind = settings["rope_type"]
    if kind == "default":
        return tuple(plain)
    if kind == "linear":
        factor = _positive(settings.get("factor"), "the factor of linear rope scaling")
        return tuple(f / factor for f in plain)
    if kind == "llama3":
        return tuple(_llama3(f, settings) for f in plain)
    raise AgqError(f"config.json: rope type {kind!r} is not supported, only 'default', 'linear' and 'llama3' are")


def _llama3(frequency: float, settings: dict) -> float:
    """Slow down long waves, keep short ones, and blend between them."""
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, original = (_positive(settings.get(n), f"{n} of llama3 rope scaling") for n in names)
    if high <= low:
        raise AgqError(f"config.json: high_freq_factor {high:g} must be above low_freq_factor {low:g}")
    turns = original * frequency / (2 * math.pi)
    if turns < low:
        return frequency / factor
    if turns > high:
        return frequency
    blend = (turns - low) / (high - low)
    return (1 - blend) * frequency / factor + blend * frequency
