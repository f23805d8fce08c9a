"""Perplexity of a compiled bundle, prefilled in chunks as it would be in use."""

import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.flow.evaluate import choose_protocol, evaluate_reference
from agq_tvm.quantize.texts import load_text, title
from agq_tvm.runtime.bundle import MANIFEST, Bundle
from agq_tvm.runtime.engine import Engine
from agq_tvm.runtime.perplexity import Score, score, score_suffix
from agq_tvm.runtime.sessions import check_place, open_session
from agq_tvm.runtime.text import load_tokenizer


def is_bundle(path: str | os.PathLike) -> bool:
    """Tell whether `path` is a directory with a manifest."""
    return (Path(path) / MANIFEST).is_file()


def evaluate_bundle(
    bundle: str | os.PathLike,
    data: str | os.PathLike,
    window: int = 512,
    max_tokens: int | None = None,
    threads: int | None = None,
    protocol: str | None = None,
    tracker: str | None = None,
    key: str | None = None,
) -> Score:
    """Score a text with a bundle.

    Parameters
    ----------
    bundle : path-like
    data : str or path-like
        See `agq_tvm.quantize.texts.load_text`.
    window : int
        Tokens that the model sees at a time.
    max_tokens : int, optional
        Use only so many tokens from the beginning of the text.
    threads : int, optional
        Those of the device by default.
    protocol : str, optional
        See `agq_tvm.flow.evaluate.evaluate_reference`; bundles have no ``"paper-protocol"``.
    tracker, key : str, optional
        A board to run it on, see `agq_tvm.runtime.sessions.open_session`.

    Raises
    ------
    AgqError
        If the bundle does not run there, or the text cannot be read or is too short.
    """
    loaded = Bundle(bundle)
    text, _ = load_text(data)
    context = loaded.manifest["context"]
    if window > context:
        raise AgqError(f"a window of {window} does not fit the bundle's context of {context}")
    prunes = loaded.manifest.get("pruning") is not None
    protocol = choose_protocol(protocol, prunes)
    if protocol == "paper-protocol":
        raise AgqError(f"{bundle} is a bundle, paper-protocol is for checkpoints: choose the protocol suffix")
    tokens = load_tokenizer(loaded.path).encode(text, add_special_tokens=False).ids[:max_tokens]
    with open_session(loaded, threads, tracker, key) as session:
        engine = Engine(loaded, session)
        if protocol == "all":
            return score(partial(_logits, engine), tokens, window)
        scored = score_suffix(partial(suffix_logits, engine), tokens, window)
        return replace(scored, selection="chunk" if prunes else None)


def _logits(engine: Engine, tokens: list[int]) -> np.ndarray:
    engine.reset()
    return engine.prefill(tokens, all_logits=True)


def suffix_logits(engine: Engine, prefix: list[int], suffix: list[int]) -> np.ndarray:
    """Return the predictions of each token of `suffix` after `prefix`, which may be pruned: float32 [n, V]."""
    engine.reset()
    first = engine.prefill(prefix)[None]
    return first if len(suffix) == 1 else np.concatenate([first, engine.prefill(suffix, all_logits=True)[:-1]])


def evaluate(
    model: str | os.PathLike,
    data: str | os.PathLike,
    window: int = 512,
    max_tokens: int | None = None,
    protocol: str | None = None,
    selection: str | None = None,
    threads: int | None = None,
    tracker: str | None = None,
    key: str | None = None,
) -> dict:
    """Score a text with a bundle, a checkpoint or a float model, whichever `model` is.

    `protocol` is one of `agq_tvm.runtime.perplexity.PROTOCOLS`, by default the one that fits the model; for
    `selection` see `agq_tvm.flow.evaluate.evaluate_reference`, and `threads`, `tracker` and
    `key` say where a bundle runs.

    Returns
    -------
    dict
        ``perplexity`` and its standard error ``perplexity_stderr``, ``nll`` and ``nll_stderr`` in nats per token
        (errors are None for a single window), ``tokens`` scored, ``window``, ``protocol``, ``selection`` (None if
        no tokens are dropped), ``text`` and ``text_sha256``.

    Raises
    ------
    AgqError
        See `evaluate_bundle` and `agq_tvm.flow.evaluate.evaluate_reference`.
    """
    check_place(tracker, key)
    if not is_bundle(model):
        if tracker is not None:
            raise AgqError(f"{model} is no bundle, and boards run nothing else: compile it for the board's device")
        result = evaluate_reference(model, data, window, max_tokens, protocol=protocol, selection=selection)
    elif selection is None:
        result = evaluate_bundle(model, data, window, max_tokens, threads, protocol, tracker, key)
    else:
        raise AgqError(f"{model} is a bundle, which selects tokens by chunk: give a checkpoint to compare selections")
    return {
        "perplexity": result.perplexity,
        "perplexity_stderr": _if_known(result.perplexity_stderr),
        "nll": result.nll,
        "nll_stderr": _if_known(result.nll_stderr),
        "tokens": result.tokens,
        "window": result.window,
        "protocol": result.protocol,
        "selection": result.selection,
        "text": title(data),
        "text_sha256": load_text(data)[1],
    }


def _if_known(error: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(error) else error
