"""Perplexity with its uncertainty, and the paired difference between two models on the same tokens."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.progress import progress

_ROWS = 64


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    Attributes
    ----------
    window : int
        Tokens that the model saw at a time.
    losses : float64 array [windows, window - 1]
        Negative log-likelihood of every token but the first of its window, in nats.
    """

    window: int
    losses: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens that were scored."""
        return self.losses.size

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return float(self.losses.mean())

    @property
    def nll_stderr(self) -> float:
        """Standard error of `nll`, windows taken as independent; NaN for a single window."""
        return _standard_error(self.losses)

    @property
    def perplexity(self) -> float:
        """``exp(nll)``."""
        return math.exp(self.nll)


@dataclass(frozen=True)
class Difference:
    """How much worse one score is than another on the same tokens.

    Attributes
    ----------
    nll : float
        Mean difference of the negative log-likelihood of a token, in nats; positive is worse.
    nll_stderr : float
        Its standard error, windows taken as independent; NaN for a single window.
    """

    nll: float
    nll_stderr: float

    @property
    def perplexity_change(self) -> float:
        """Relative change of the perplexity: 0.01 is one percent more."""
        return math.expm1(self.nll)

    @property
    def perplexity_change_stderr(self) -> float:
        """Standard error of `perplexity_change`, to first order."""
        return math.exp(self.nll) * self.nll_stderr


def score(
    logits_of: Callable[[list[int]], np.ndarray],
    tokens: Sequence[int],
    window: int,
    show_progress: bool = True,
) -> Score:
    """Score a text in windows that do not overlap, each from an empty cache and without a begin token.

    The first token of a window has nothing before it and is not scored; an incomplete last window is left
    out.

    Parameters
    ----------
    logits_of : callable
        From n tokens to float logits [n, vocab_size].
    tokens : sequence of int
    window : int
        At least 2.
    show_progress : bool
        Show a bar on standard error.

    Raises
    ------
    AgqError
        If the text has fewer tokens than one window, or the model gives logits that are not finite.
    """
    if window < 2:
        raise AgqError(f"a window of {window} scores nothing: give at least 2")
    starts = range(0, len(tokens) - window + 1, window)
    if not starts:
        raise AgqError(f"the text has {len(tokens)} tokens, less than one window of {window}: give a longer one")
    losses = []
    for start in progress(starts, "scoring", unit="window") if show_progress else starts:
        cut = [int(token) for token in tokens[start : start + window]]
        losses.append(_losses(logits_of(cut), cut))
    return Score(window, np.stack(losses))


def compare(score: Score, baseline: Score) -> Difference:
    """Compare two scores of the same tokens, token by token.

    Raises
    ------
    AgqError
        If they were not made with the same windows.
    """
    if score.losses.shape != baseline.losses.shape:
        raise AgqError("the two scores are of different tokens or windows: score both with the same")
    difference = score.losses - baseline.losses
    return Difference(float(difference.mean()), _standard_error(difference))


def _losses(logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Return -log softmax of the next token, float64 [n - 1], some rows at a time."""
    if logits.ndim != 2 or len(logits) != len(tokens):
        raise AgqError(f"the model gave logits of shape {list(logits.shape)} for {len(tokens)} tokens")
    targets = np.asarray(tokens[1:])
    losses = np.empty(len(targets))
    for start in range(0, len(targets), _ROWS):
        next_tokens = targets[start : start + _ROWS]
        rows = logits[start : start + len(next_tokens)].astype("float64")
        rows -= rows.max(axis=1, keepdims=True)
        chosen = rows[np.arange(len(rows)), next_tokens]
        losses[start : start + len(rows)] = np.log(np.exp(rows).sum(axis=1)) - chosen
    if not np.isfinite(losses).all():
        raise AgqError("the model gave logits that are not finite: it is damaged or was quantized too hard")
    return losses


def _standard_error(losses: np.ndarray) -> float:
    means = losses.mean(axis=1)
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan
