"""Writes a tiny LLaMA as GGUF with the `gguf` package, an implementation that is not ours."""

from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from tests.tiny import CHAT_TEMPLATE, SPECIAL, tiny_config, tiny_weights

WIDTH = 128  # inner dimensions must be multiples of 32
CONFIG = tiny_config(
    hidden_size=WIDTH, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, head_dim=32
)
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt"]
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TYPES = gguf.GGMLQuantizationType


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of a tensor."""
    module = name.removesuffix(".weight")
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        return f"blk.{layer}.{_NAMES[module]}.weight"
    return f"{_NAMES[module]}.weight"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of q or k as llama.cpp's converter does."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def stored_kind(name: str, linears, tables) -> _TYPES:
    """Choose the GGML type of a tensor; `linears` may be a function of the name."""
    if name.endswith(("norm.weight",)):
        return _TYPES.F32
    if "layers" not in name:
        return tables
    return linears(name) if callable(linears) else linears


def write_gguf(
    path: Path, linears=_TYPES.Q4_1, tables=_TYPES.Q8_0, config: dict | None = None, metadata=None
) -> dict[str, np.ndarray]:
    """Write a model and return its stored values as Hugging Face tensors, dequantized by `gguf`.

    Parameters
    ----------
    path : Path
    linears, tables : GGMLQuantizationType
    config : dict, optional
        Changes to `CONFIG`.
    metadata : callable, optional
        Called with the writer to add or replace values.
    """
    config = CONFIG | (config or {})
    writer = gguf.GGUFWriter(path, "llama")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    _write_metadata(writer, config)
    if metadata is not None:
        metadata(writer)
    values = {}
    for name, weight in tiny_weights(config, seed=7).items():
        kind = stored_kind(name, linears, tables)
        plain = kind in (_TYPES.F32, _TYPES.F16)
        count = heads.get(name.split(".")[-2])
        data = gguf.quantize(permute(weight, count) if count else weight, kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=None if plain else kind)
        values[name] = gguf.dequantize(gguf.quantize(weight, kind), kind).reshape(weight.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def _write_metadata(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
