"""Perplexity of a float model or a quantized checkpoint, by the torch reference."""

import os
import tempfile
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.files import read_json
from agq_tvm.quantize.calibration import encode_text
from agq_tvm.quantize.checkpoint import quantization_config, read_checkpoint
from agq_tvm.quantize.source import open_source
from agq_tvm.quantize.texts import load_text
from agq_tvm.runtime.perplexity import Score, score


def evaluate_reference(
    model: str | os.PathLike,
    data: str | os.PathLike,
    window: int = 512,
    max_tokens: int | None = None,
    activation: str | None = None,
) -> Score:
    """Score a text with the torch reference.

    Parameters
    ----------
    model : str or path-like
        A quantized checkpoint, or a float model (see `agq_tvm.quantize.source.open_source`).
    data : str or path-like
        See `agq_tvm.quantize.texts.load_text`.
    window : int
        Tokens that the model sees at a time.
    max_tokens : int, optional
        Use only so many tokens from the beginning of the text.
    activation : str, optional
        For a checkpoint: instead of its own way to quantize activations, see
        `ReferenceModel.from_checkpoint`.

    Raises
    ------
    AgqError
        If the model or the text cannot be read, or they do not fit each other.
    """
    from agq_tvm.quantize.reference import ReferenceModel

    text, _ = load_text(data)
    if is_checkpoint(model):
        checkpoint = read_checkpoint(model)
        reference = ReferenceModel.from_checkpoint(checkpoint, activation)
        tokens = encode_text(checkpoint.path / "tokenizer.json", text)
    else:
        if activation not in (None, "none"):
            raise AgqError(f"{model} is not quantized: {activation} activations need a checkpoint")
        source = open_source(model)
        reference = ReferenceModel.from_source(source)
        with tempfile.TemporaryDirectory() as scratch:
            source.copy_tokenizer(Path(scratch))
            tokens = encode_text(Path(scratch) / "tokenizer.json", text)
    if window > reference.config.context_length:
        raise AgqError(f"a window of {window} is more than the model's {reference.config.context_length} tokens")
    return score(reference.logits, tokens[:max_tokens], window)


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Tell whether `path` is a directory that says it is a quantized checkpoint of ours."""
    config = Path(path) / "config.json"
    return config.is_file() and quantization_config(read_json(config, "model")) is not None
