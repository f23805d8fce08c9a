"""Random LLaMA models of given shapes, written a layer at a time: for time and memory, not for what they say."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from agq_tvm.files import write_json
from agq_tvm.models.registry import describe
from agq_tvm.quantize.source import tensor_shapes
from tests.tiny import tiny_tokenizer

_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES = {
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}


def write_random_model(path: Path, shape: str, layers: int | None = None) -> Path:
    """Write a model with float16 weights, a file for each layer and one for the rest; return `path`.

    Parameters
    ----------
    path : Path
        A directory; a model that is complete there is left as it is.
    shape : str
        One of `SHAPES`.
    layers : int, optional
        Instead of the shape's own number.
    """
    config = _COMMON | SHAPES[shape]
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    if (path / "config.json").exists() and json.loads((path / "config.json").read_text()) == config:
        return path
    path.mkdir(parents=True, exist_ok=True)
    rng, described = np.random.default_rng(0), describe(config)
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, sizes in tensor_shapes(described).items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = sizes
    for file, shapes in files.items():
        save_file({name: _tensor(rng, sizes) for name, sizes in shapes.items()}, path / file)
    index = {name: file for file, shapes in files.items() for name in shapes}
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    tiny_tokenizer().save(str(path / "tokenizer.json"))
    write_json(path / "config.json", config)
    return path


def _tensor(rng: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    if len(sizes) == 1:
        return np.ones(sizes, "float16")
    values = np.empty(sizes, "float16")
    for start in range(0, sizes[0], 1024):
        rows = rng.standard_normal((len(values[start : start + 1024]), sizes[1]), dtype="float32")
        values[start : start + 1024] = rows / sizes[1] ** 0.5
    return values
