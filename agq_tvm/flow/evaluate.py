"""Perplexity of a float model or a quantized checkpoint, by the torch reference."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.files import read_json
from agq_tvm.flow.quantize import Calibration
from agq_tvm.progress import say
from agq_tvm.quantize.calibration import cut_windows, encode_text
from agq_tvm.quantize.checkpoint import quantization_config, read_checkpoint
from agq_tvm.quantize.source import Source, open_source
from agq_tvm.quantize.texts import load_text
from agq_tvm.runtime.engine import prompt_chunks
from agq_tvm.runtime.perplexity import PROTOCOLS, Score, score, score_suffix, score_survivors

if TYPE_CHECKING:
    from agq_tvm.quantize.reference import ReferenceModel

RELEASE_CALIBRATION = Calibration(samples=10)
"""The authors' number of windows."""
SELECTIONS: dict[str, Callable[[int], list[int]]] = {"chunk": prompt_chunks, "prompt": lambda tokens: [tokens]}
"""In which parts of a prompt the tokens that stay are chosen, each by itself."""


def evaluate_reference(
    model: str | os.PathLike | Source,
    data: str | os.PathLike,
    window: int = 512,
    max_tokens: int | None = None,
    activation: str | None = None,
    protocol: str | None = None,
    selection: str | None = None,
) -> Score:
    """Score a text with the torch reference.

    Parameters
    ----------
    model : str, path-like or Source
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
    protocol : str, optional
        See `agq_tvm.runtime.perplexity`; ``"suffix"`` by default for a model that prunes, and else ``"all"``.
    selection : {"chunk", "prompt"}, optional
        For a model that prunes: whether the tokens that stay are chosen in each chunk of a compiled model by itself
        (the default), or in the whole prompt, as the paper does (always for ``"paper-protocol"``).

    Raises
    ------
    AgqError
        If the model or the text cannot be read, or they or the protocol do not fit each other.
    """
    text, _ = load_text(data)
    with tempfile.TemporaryDirectory() as scratch:
        reference, tokenizer = open_reference(model, Path(scratch), activation)
        tokens = encode_text(tokenizer, text)
    return score_reference(reference, tokens[:max_tokens], window, protocol, selection)


def score_reference(
    reference: "ReferenceModel",
    tokens: list[int],
    window: int,
    protocol: str | None = None,
    selection: str | None = None,
) -> Score:
    """Score tokens with a model that is in memory; see `evaluate_reference`."""
    if window > reference.config.context_length:
        raise AgqError(f"a window of {window} is more than the model's {reference.config.context_length} tokens")
    protocol = choose_protocol(protocol, reference.pruning is not None)
    cut = _chooser(selection, protocol, reference.pruning is not None)
    if protocol == "all":
        return score(reference.logits, tokens, window)
    if protocol == "suffix":
        selection = (selection or "chunk") if reference.pruning else None
        return replace(score_suffix(partial(suffix_logits, reference, cut), tokens, window), selection=selection)
    say("paper-protocol scores only what follows tokens that were not pruned: it does not compare with other scores")
    return replace(score_survivors(partial(_survivors, reference), tokens, window), selection="prompt")


def evaluate_release(
    model: str | os.PathLike | Source,
    checkpoint: str | os.PathLike,
    data: str | os.PathLike,
    window: int = 512,
    max_tokens: int | None = None,
    calibration: Calibration = RELEASE_CALIBRATION,
) -> Score:
    """Score a text with the simulation of the authors' published code, `agq_tvm.quantize.release`.

    Parameters
    ----------
    model : str, path-like or Source
        The float model.
    checkpoint : path-like
        Of that model: its weights, see `release_model`.
    data, window, max_tokens
        As for `evaluate_reference`.
    calibration : Calibration
        What the static scales are found on; windows no longer than the model takes.

    Raises
    ------
    AgqError
        If something cannot be read, or does not fit the rest.
    """
    from agq_tvm.quantize.release import release_model

    source, opened = open_source(model), read_checkpoint(checkpoint)
    tokenizer = opened.path / "tokenizer.json"
    length = min(calibration.length, source.config.context_length)
    windows = cut_windows(tokenizer, calibration.text, calibration.samples, length)
    tokens = encode_text(tokenizer, load_text(data)[0])[:max_tokens]
    return score(release_model(source, opened, windows).logits, tokens, window)


def choose_protocol(protocol: str | None, prunes: bool) -> str:
    """Return the protocol for a model that prunes or does not.

    Raises
    ------
    AgqError
        If they do not fit each other.
    """
    protocol = protocol or ("suffix" if prunes else "all")
    if protocol not in PROTOCOLS:
        raise AgqError(f"unknown protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    if prunes and protocol == "all":
        raise AgqError("a model that prunes has no logits for all tokens: choose the protocol suffix")
    if protocol == "paper-protocol" and not prunes:
        raise AgqError("paper-protocol is for models that prune, this one does not: choose the protocol suffix")
    return protocol


def _chooser(selection: str | None, protocol: str, prunes: bool) -> Callable[[int], list[int]]:
    """Return what says in which parts of a prompt tokens are chosen, after a check that it fits."""
    if selection not in (None, *SELECTIONS):
        raise AgqError(f"unknown selection {selection!r}: choose one of {', '.join(SELECTIONS)}")
    if selection is not None and not prunes:
        raise AgqError(f"the model drops no tokens, there are none to select by {selection}: leave that out")
    if selection == "chunk" and protocol == "paper-protocol":
        raise AgqError("paper-protocol selects in the whole prompt: choose the protocol suffix to select by chunk")
    return SELECTIONS[selection or "chunk"]


def suffix_logits(
    reference: "ReferenceModel", cut: Callable[[int], list[int]], prefix: list[int], suffix: list[int]
) -> np.ndarray:
    """Predict the tokens after a prompt that is pruned if the model prunes.

    Parameters
    ----------
    reference : ReferenceModel
    cut : callable
        From the number of tokens of the prompt to the parts in which they are chosen, see `SELECTIONS`.
    prefix, suffix : list of int
        The prompt, and the n tokens after it.

    Returns
    -------
    float32 array [n, vocab_size]
    """
    tokens = prefix + suffix
    if reference.pruning is None:
        logits = reference.logits(tokens)
    else:
        logits = reference.prune(tokens, cut(len(prefix))).logits
    return logits[-1 - len(suffix) : -1]


def _survivors(reference: "ReferenceModel", tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    left = reference.prune(tokens, [len(tokens)])
    return left.logits, left.kept[-1]


def open_reference(
    model: str | os.PathLike | Source, scratch: Path, activation: str | None = None
) -> tuple["ReferenceModel", Path]:
    """Open a model in torch.

    Parameters
    ----------
    model : str, path-like or Source
    scratch : Path
        A directory for the tokenizer of a model that holds it in another form.
    activation : str, optional
        As for `evaluate_reference`.

    Returns
    -------
    reference : ReferenceModel
    tokenizer : Path
        Its ``tokenizer.json``.

    Raises
    ------
    AgqError
        If the model cannot be read.
    """
    from agq_tvm.quantize.reference import ReferenceModel

    if not isinstance(model, Source) and is_checkpoint(model):
        checkpoint = read_checkpoint(model)
        return ReferenceModel.from_checkpoint(checkpoint, activation), checkpoint.path / "tokenizer.json"
    source = open_source(model)
    if activation not in (None, "none"):
        raise AgqError(f"{source.label} is not quantized: {activation} activations need a checkpoint")
    source.copy_tokenizer(scratch)
    return ReferenceModel.from_source(source), scratch / "tokenizer.json"


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Tell whether `path` is a directory that says it is a quantized checkpoint of ours."""
    config = Path(path) / "config.json"
    return config.is_file() and quantization_config(read_json(config, "model")) is not None
