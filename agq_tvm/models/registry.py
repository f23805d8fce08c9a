"""Which decoder families there are."""

from collections.abc import Callable, Mapping

from agq_tvm.errors import AgqError
from agq_tvm.models import bloom, llama, opt
from agq_tvm.models.decoder import DecoderConfig

_FAMILIES: dict[str, Callable[[Mapping], DecoderConfig]] = {
    "bloom": bloom.describe,
    "llama": llama.describe_llama,
    "mistral": llama.describe_mistral,
    "opt": opt.describe,
    "qwen2": llama.describe_qwen2,
}


def describe(config: Mapping) -> DecoderConfig:
    """Describe the decoder of a Hugging Face ``config.json``, by its ``model_type``.

    Raises
    ------
    AgqError
        If the family is not supported or the config is not valid for it.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise AgqError(f"config.json: model_type {family!r} is not supported; supported: {known}")
    return _FAMILIES[family](config)
