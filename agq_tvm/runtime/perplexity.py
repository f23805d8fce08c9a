"""Perplexity with its uncertainty, and the paired difference between two models on the same tokens.

Which tokens of a window are scored is a protocol:

``all``             every token but the first
``suffix``          the last quarter of the window; only the tokens before it may be pruned
``paper-protocol``  Agile-Quant's own: what follows the tokens that survive pruning
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.progress import progress

PROTOCOLS = ("all", "suffix", "paper-protocol")
_ROWS = 64


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    Attributes
    ----------
    window : int
        Tokens that the model saw at a time.
    losses : float64 array [windows, tokens]
        Negative log-likelihood of the tokens of each window that are scored, in nats.
    protocol : str
        One of `PROTOCOLS`.
    selection : {"chunk", "prompt"} or None
        Where tokens that stay were chosen; None if all did.
    """

    window: int
    losses: np.ndarray
    protocol: str = "all"
    selection: str | None = None

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

    @property
    def perplexity_stderr(self) -> float:
        """Standard error of `perplexity`, to first order."""
        return self.perplexity * self.nll_stderr


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

    def losses(cut: list[int]) -> np.ndarray:
        logits = logits_of(cut)
        return _losses(_checked(logits, len(cut))[:-1], cut[1:])

    return Score(window, _each_window(losses, tokens, window, show_progress))


def score_suffix(
    logits_of: Callable[[list[int], list[int]], np.ndarray],
    tokens: Sequence[int],
    window: int,
    show_progress: bool = True,
) -> Score:
    """Score the last quarter of each window, after three quarters of which a model may prune tokens.

    Models that prune and models that do not are scored on the same tokens, and no token is left out because it was
    hard.

    Parameters
    ----------
    logits_of : callable
        From the tokens that may be pruned and the n tokens after them to float logits [n, vocab_size]: the
        prediction of each of the n.
    tokens, window, show_progress
        See `score`.

    Raises
    ------
    AgqError
        See `score`.
    """
    start = window * 3 // 4

    def losses(cut: list[int]) -> np.ndarray:
        logits = logits_of(cut[:start], cut[start:])
        return _losses(_checked(logits, window - start), cut[start:])

    return Score(window, _each_window(losses, tokens, window, show_progress), "suffix")


def score_survivors(
    logits_of: Callable[[list[int]], tuple[np.ndarray, np.ndarray]],
    tokens: Sequence[int],
    window: int,
    show_progress: bool = True,
) -> Score:
    """Score what follows the tokens that survive pruning, as Agile-Quant's evaluation does.

    These are fewer tokens, and not drawn at random: the result does not compare with that of a model that prunes
    none or others.

    Parameters
    ----------
    logits_of : callable
        From the tokens of a window to float logits [r, vocab_size] of the survivors and their positions [r], rising,
        the last token among them; r the same for all windows.
    tokens, window, show_progress
        See `score`.

    Raises
    ------
    AgqError
        See `score`.
    """

    def losses(cut: list[int]) -> np.ndarray:
        logits, positions = logits_of(cut)
        return _losses(_checked(logits, len(positions))[:-1], [cut[i + 1] for i in positions[:-1]])

    return Score(window, _each_window(losses, tokens, window, show_progress), "paper-protocol")


def compare(score: Score, baseline: Score) -> Difference:
    """Compare two scores of the same tokens, token by token.

    Raises
    ------
    AgqError
        If they were not made with the same windows and protocol.
    """
    if (score.losses.shape, score.protocol) != (baseline.losses.shape, baseline.protocol):
        raise AgqError("the two scores are of different tokens or windows: score both with the same")
    difference = score.losses - baseline.losses
    return Difference(float(difference.mean()), _standard_error(difference))


def _each_window(
    losses_of: Callable[[list[int]], np.ndarray], tokens: Sequence[int], window: int, show_progress: bool
) -> np.ndarray:
    """Return the losses of all windows, float64 [windows, tokens]."""
    if window < 2:
        raise AgqError(f"a window of {window} scores nothing: give at least 2")
    starts = range(0, len(tokens) - window + 1, window)
    if not starts:
        raise AgqError(f"the text has {len(tokens)} tokens, less than one window of {window}: give a longer one")
    if show_progress:
        starts = progress(starts, "scoring", unit="window")
    return np.stack([losses_of([int(token) for token in tokens[start : start + window]]) for start in starts])


def _checked(logits: np.ndarray, count: int) -> np.ndarray:
    if logits.ndim != 2 or len(logits) != count:
        raise AgqError(f"the model gave logits of shape {list(logits.shape)} for {count} tokens")
    return logits


def _losses(logits: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """Return -log softmax [n, V] of each of n targets, float64 [n], some rows at a time."""
    targets = np.asarray(targets)
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
