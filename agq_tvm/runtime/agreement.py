"""How closely two sets of logits agree."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """Comparison of logits [T, V] with a reference's.

    Attributes
    ----------
    mean_kl : float
        Mean Kullback-Leibler divergence of the predicted distributions from the reference's, in nats.
    top1 : float
        Share of positions with the same most likely token.
    """

    mean_kl: float
    top1: float


def agreement(reference: np.ndarray, logits: np.ndarray) -> Agreement:
    """Compare logits, float [T, V], with a reference's."""
    expected, got = _log_softmax(reference), _log_softmax(logits)
    divergence = (np.exp(expected) * (expected - got)).sum(-1)
    return Agreement(float(divergence.mean()), float((expected.argmax(-1) == got.argmax(-1)).mean()))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype("float64") - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
