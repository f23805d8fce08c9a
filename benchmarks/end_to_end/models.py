"""The models that all engines get: Hugging Face directories of floats, made once."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from agq_tvm.files import write_json
from agq_tvm.quantize.source import open_source, tensor_shapes
from agq_tvm.quantize.texts import load_text
from agq_tvm.runtime.text import load_tokenizer
from benchmarks.peers.base import ORIGIN
from benchmarks.random_model import write_random_model

REAL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Subject:
    """A model, and what is asked of our speed on it.

    Attributes
    ----------
    name : str
    path : Path
        A Hugging Face directory.
    prefill, decode : float
        Times the fastest 4-bit engine with a head of the same bits.
    """

    name: str
    path: Path
    prefill: float
    decode: float

    @property
    def kept(self) -> bool:
        """Whether the model came with a 4-bit grid."""
        return (self.path / ORIGIN).exists()

    @property
    def vocab_size(self) -> int:
        """V."""
        return json.loads((self.path / "config.json").read_text(encoding="utf-8"))["vocab_size"]


def random_subject(work: Path) -> Subject:
    """Make the model of TinyLlama-1.1B's shape with random weights."""
    path = write_random_model(work / "models" / "random-1.1b", "1.1b")
    _write_tokenizer_settings(path)
    return Subject("random 1.1B", path, 1.7, 1.2)


def real_subject(work: Path) -> Subject:
    """Unpack SmolLM2, which comes as 4 bit, into floats."""
    path = work / "models" / "smollm2"
    if not (path / "config.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        source = open_source(REAL)
        shapes = tensor_shapes(source.config)
        save_file({name: np.array(source.tensor(name)) for name in shapes}, path / "model.safetensors")
        source.copy_tokenizer(path)
        _write_tokenizer_settings(path)
        (path / ORIGIN).write_text(REAL, encoding="utf-8")
        write_json(path / "config.json", source.raw_config)
    return Subject("SmolLM2-135M", path, 1.4, 1.2)


def _write_tokenizer_settings(path: Path) -> None:
    """Say that tokenizer.json is all there is: converters of other engines copy it."""
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def text_tokens(subject: Subject, count: int) -> list[int]:
    """Return the first tokens of an excerpt that ships with the package."""
    return load_tokenizer(subject.path).encode(load_text("jargon")[0]).ids[:count]
