"""A LLaMA model in a GGUF file as a source: its names, its row order and its grids brought to ours."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.quantize.checkpoint import QuantizedLinear
from agq_tvm.quantize.gguf_file import GgufTensor, read_gguf
from agq_tvm.quantize.gguf_tokenizer import write_tokenizer
from agq_tvm.quantize.source import Source, check_shapes
from agq_tvm.quantize.tensor_names import TABLE_GROUP, linear_shapes
from agq_tvm.quantize.weights import pack

_GROUP = 32
_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class GgufSource(Source):
    """A ``.gguf`` file of architecture "llama" with F32, F16, BF16, Q8_0, Q4_1 or Q4_0 tensors.

    llama.cpp stores the rows of q and k in the order of its own rotary embedding, which pairs neighbouring
    channels; they are brought back to Hugging Face's order, which pairs the two halves of a head.
    """

    def __init__(self, path: Path) -> None:
        self._metadata, tensors = read_gguf(path)
        self._tensors = {_hugging_face_name(path, name): tensor for name, tensor in tensors.items()}
        super().__init__(str(path), _config(path, self._metadata, self._tensors))
        check_shapes(self.label, self.config, {name: tensor.shape for name, tensor in self._tensors.items()})
        self._linear_kinds = {self._tensors[f"{name}.weight"].kind for name in linear_shapes(self.config)}

    @property
    def is_four_bit(self) -> bool:
        """Whether every linear is Q4_0 or Q4_1."""
        return self._linear_kinds <= {"Q4_0", "Q4_1"}

    @property
    def is_symmetric(self) -> bool:
        """Whether every linear is Q4_0."""
        return self._linear_kinds == {"Q4_0"}

    def kept_linear(self, name: str) -> QuantizedLinear | None:
        """Take over codes, scales and minima of Q4_1, or codes and scales of Q4_0.

        In a file with both, a Q4_0 tensor gets its offsets, -8 scales, written out.
        """
        tensor = self._tensors[f"{name}.weight"]
        if tensor.kind not in ("Q4_0", "Q4_1"):
            return None
        scales, offsets, codes = _four_bit(tensor)
        rows = self._row_order(name, tensor.shape[0])
        return QuantizedLinear(
            qweight=pack(codes[rows]),
            scales=self._finite(scales[rows], name),
            offsets=None if self.is_symmetric else self._finite(offsets[rows], name),
            in_features=tensor.shape[1],
            group_size=_GROUP,
        )

    def kept_table(self, name: str, bits: int) -> QuantizedLinear | None:
        """Take over codes and scales of Q8_0, or those of Q4_0 and Q4_1 with their offsets."""
        tensor = self._tensors[f"{name}.weight"]
        if (tensor.kind, bits) == ("Q8_0", 8):
            scales, codes = _eight_bit(tensor)
            return QuantizedLinear(codes, self._finite(scales, name), None, tensor.shape[1], TABLE_GROUP)
        if tensor.kind not in ("Q4_0", "Q4_1") or bits != 4:
            return None
        scales, offsets, codes = _four_bit(tensor)
        scales, offsets = self._finite(scales, name), self._finite(offsets, name)
        return QuantizedLinear(pack(codes), scales, offsets, tensor.shape[1], TABLE_GROUP)

    def copy_tokenizer(self, directory: Path) -> None:
        """Build the tokenizer from the file's vocabulary and merges."""
        write_tokenizer(self.label, self._metadata, self.config.vocab_size, directory)

    def _tensor(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        return _to_float(tensor)[self._row_order(name.removesuffix(".weight"), tensor.shape[0])]

    def _row_order(self, module: str, rows: int) -> np.ndarray | slice:
        if not module.endswith((".q_proj", ".k_proj")):
            return slice(None)
        half = self.config.head_dim // 2
        return np.arange(rows).reshape(-1, half, 2).swapaxes(1, 2).reshape(-1)

    def _finite(self, values: np.ndarray, name: str) -> np.ndarray:
        if not np.isfinite(values).all():
            raise AgqError(f"{self.label}: {name} has scales that are NaN or infinite: the model is damaged")
        return values


def _hugging_face_name(path: Path, name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if kind == "weight" and stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.weight"
    parts = stem.split(".")
    if kind == "weight" and len(parts) == 3 and parts[0] == "blk" and parts[2] in _MODULES:
        return f"model.layers.{parts[1]}.{_MODULES[parts[2]]}.weight"
    if stem == "rope_freqs":
        raise AgqError(f"{path} has its own rotary frequencies: quantize the Hugging Face model instead")
    raise AgqError(f"{path} has a tensor {name}, which a plain LLaMA model does not have")


def _config(path: Path, metadata: Mapping, tensors: Mapping[str, GgufTensor]) -> dict:
    """Say in Hugging Face's words what the metadata says; `describe` checks the values."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise AgqError(f"{path}: architecture {architecture!r} is not supported, only 'llama' is")
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise AgqError(f"{path} has no tensor token_embd.weight: the model is incomplete")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": embedding.shape[0],
        "hidden_size": metadata.get("llama.embedding_length"),
        "intermediate_size": metadata.get("llama.feed_forward_length"),
        "num_hidden_layers": metadata.get("llama.block_count"),
        "num_attention_heads": metadata.get("llama.attention.head_count"),
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv"),
        "head_dim": metadata.get("llama.attention.key_length"),
        "max_position_embeddings": metadata.get("llama.context_length"),
        "rms_norm_eps": _shortest(metadata.get("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(metadata.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(metadata),
    }
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        factor = metadata.get("llama.rope.scaling.factor")
        config["rope_scaling"] = {"rope_type": scaling, "factor": _shortest(factor)}
    rotary = metadata.get("llama.rope.dimension_count")
    config = {name: value for name, value in config.items() if value is not None or "token" in name}
    if rotary is not None and "head_dim" not in config:
        config["head_dim"] = rotary
    if rotary is not None and rotary != config["head_dim"]:
        raise AgqError(f"{path}: only {rotary!r} channels of a head are rotated, which is not supported")
    return config


def _end_tokens(metadata: Mapping) -> list:
    names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return list(dict.fromkeys(metadata[name] for name in names if name in metadata))


def _shortest(value: object) -> object:
    """Write a float32 as the shortest decimal that means it, 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _four_bit(tensor: GgufTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scales and offsets [N, G] in float16 and codes uint8 [N, K] of a Q4_0 or Q4_1 tensor."""
    header = 2 if tensor.kind == "Q4_0" else 4
    halves = np.ascontiguousarray(tensor.data[..., :header]).view("<f2")
    scales = halves[..., 0]
    offsets = halves[..., 1] if tensor.kind == "Q4_1" else -8 * scales
    packed = tensor.data[..., header:]
    codes = np.concatenate((packed & 15, packed >> 4), axis=-1)  # the low nibbles come first
    return scales, offsets, codes.reshape(tensor.shape)


def _eight_bit(tensor: GgufTensor) -> tuple[np.ndarray, np.ndarray]:
    """Return scales float16 [V, G] and codes int8 [V, K] of a Q8_0 tensor."""
    scales = np.ascontiguousarray(tensor.data[..., :2]).view("<f2")[..., 0]
    return scales, np.ascontiguousarray(tensor.data[..., 2:]).view("i1").reshape(tensor.shape)


def _to_float(tensor: GgufTensor) -> np.ndarray:
    """Dequantize a tensor of any kind that is read to float32."""
    if tensor.kind == "BF16":
        return (tensor.data.view("<u2").astype("<u4") << 16).view("<f4").reshape(tensor.shape)
    if tensor.kind in ("F32", "F16"):
        values = tensor.data.view("<f4" if tensor.kind == "F32" else "<f2")
        return values.astype("float32").reshape(tensor.shape)
    if tensor.kind == "Q8_0":
        scales, codes = _eight_bit(tensor)
        return codes * np.repeat(scales.astype("float32"), _GROUP, axis=-1)
    scales, offsets, codes = _four_bit(tensor)
    wide = (np.repeat(a.astype("float32"), _GROUP, axis=-1) for a in (scales, offsets))
    scales, offsets = wide
    return codes * scales + offsets
