"""Tiny random models of every family in Hugging Face's format, for tests of every part."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from agq_tvm.models.registry import describe
from agq_tvm.quantize.source import tensor_shapes

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


_COMMON = {
    "vocab_size": 256 + len(SPECIAL) + 1,
    "hidden_size": 96,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
_CONFIGS = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
    "qwen2": {name: value for name, value in _LLAMA.items() if name != "head_dim"}
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "opt": _COMMON
    | {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "ffn_dim": 160,
        "word_embed_proj_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
    },
    "bloom": _COMMON
    | {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "n_layer": 2,
        "n_head": 6,
        "layer_norm_epsilon": 1e-5,
        "seq_length": 256,
    },
}
FAMILIES = tuple(_CONFIGS)


def tiny_config(family: str = "llama", **overrides) -> dict:
    """Return a config whose inner dimensions, 96 and mostly 160, leave short last groups of 64 and 128."""
    return _CONFIGS[family] | overrides


def tiny_weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Draw float32 weights under which the blocks outweigh the embedding and the logits are peaky."""
    rng = np.random.default_rng(seed)
    described = describe(config)
    outputs = tuple(f"{linear.parts[0]}.weight" for linear in described.linears if linear.name in ("o", "down"))
    projections = (f"{described.project_in}.weight", f"{described.project_out}.weight")
    tensors = {}
    for name, shape in tensor_shapes(described).items():
        values = rng.standard_normal(shape, dtype="float32")
        if name.endswith(".bias"):
            values *= 0.1
        elif len(shape) == 1:
            values = 1 + 0.1 * values
        elif name.startswith(described.layer_prefix.split("{")[0]) or name in projections:
            values *= (2.0 if name.endswith(outputs) else 1.0) / shape[1] ** 0.5
        tensors[name] = values
    return tensors


def write_tiny_llama(path: Path, seed: int = 0, dtype: str = "float32", **overrides) -> Path:
    """Write a LLaMA model, see `write_tiny_model`."""
    return write_tiny_model(path, "llama", seed, dtype, **overrides)


def write_tiny_model(path: Path, family: str, seed: int = 0, dtype: str = "float32", **overrides) -> Path:
    """Write ``config.json``, ``model.safetensors`` and a byte-level tokenizer; return `path`.

    Parameters
    ----------
    path : Path
        A directory; made if need be.
    family : str
        One of `FAMILIES`.
    seed : int
    dtype : str
        What the weights are stored as, ``"float32"`` or ``"float16"``.
    **overrides
        Values of ``config.json`` to change.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, **overrides)
    (path / "config.json").write_text(json.dumps(config))
    save_file({n: w.astype(dtype) for n, w in tiny_weights(config, seed).items()}, path / "model.safetensors")
    tiny_tokenizer().save(str(path / "tokenizer.json"))
    settings = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def tiny_tokenizer() -> Tokenizer:
    """Return a tokenizer of three special tokens and one token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer
