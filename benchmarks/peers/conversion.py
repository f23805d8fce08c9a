"""A LLaMA as Hugging Face stores it, for converters; and as a GGUF file of 16-bit floats, for llama.cpp to quantize."""

import json
from pathlib import Path

import numpy as np

_NAMES = {
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
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Weights:
    """The tensors of a Hugging Face directory, each read when it is asked for.

    Parameters
    ----------
    source : Path
    """

    def __init__(self, source: Path):
        from safetensors import safe_open

        self._files = [safe_open(path, framework="numpy") for path in sorted(source.glob("*.safetensors"))]
        self._file_of = {name: file for file in self._files for name in file.keys()}

    def __iter__(self):
        return iter(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file_of[name].get_tensor(name)


def gguf_name(name: str) -> str:
    """Return what GGUF calls a tensor of a LLaMA."""
    stem, kind = name.rsplit(".", 1)
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{kind}"
    number, rest = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{_NAMES[rest]}.{kind}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of q or k [heads · D, K] in llama.cpp's order: the two halves of each head in turns."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(source: Path, target: Path) -> None:
    """Write a GGUF file without a vocabulary: matrices in float16, norms in float32."""
    import gguf

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    part = target.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama", use_temp_file=True)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    weights = Weights(source)
    for name in weights:
        array = weights[name]
        if ".q_proj." in name or ".k_proj." in name:
            array = interleaved(array, heads if ".q_proj." in name else kv_heads)
        writer.add_tensor(gguf_name(name), array.astype("float32" if array.ndim == 1 else "float16"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(target)
