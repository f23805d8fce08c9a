"""A tiny random LLaMA model in Hugging Face's format, for tests of every part."""

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


def tiny_config(**overrides) -> dict:
    """Return a config whose inner dimensions 96 and 160 leave short last groups of 64 and 128."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": 256 + len(SPECIAL) + 1,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return config | overrides


def tiny_weights(config: dict, seed: int) -> dict[str, np.ndarray]:
    """Draw float32 weights under which the blocks outweigh the embedding and the logits are peaky."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(describe(config)).items():
        values = rng.standard_normal(shape, dtype="float32")
        if len(shape) == 1:
            values = 1 + 0.1 * values
        elif "layers" in name:
            values *= (2.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0) / shape[1] ** 0.5
        tensors[name] = values
    return tensors


def write_tiny_llama(path: Path, seed: int = 0, dtype: str = "float32", **overrides) -> Path:
    """Write ``config.json``, ``model.safetensors`` and a byte-level tokenizer; return `path`.

    Parameters
    ----------
    path : Path
        A directory; made if need be.
    seed : int
    dtype : str
        What the weights are stored as, ``"float32"`` or ``"float16"``.
    **overrides
        Values of ``config.json`` to change.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = tiny_config(**overrides)
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
