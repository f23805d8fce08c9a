"""What passes through a model: outlier channels at the linears' inputs, and attention to the first token.

Agile-Quant rests on these two (figure 1 of arXiv 2312.05693): a few channels, the same for all tokens and much
larger than the rest, make activations hard to quantize, and attention to the start token says which tokens matter.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from agq_tvm.progress import progress
from agq_tvm.quantize.forward import start_probabilities
from agq_tvm.quantize.reference import ReferenceModel


@dataclass(frozen=True)
class InputStatistics:
    """Largest magnitudes at the input of one linear, in each of L layers.

    Attributes
    ----------
    channel_largest : float32 array [L, K]
        Over all tokens of all windows.
    channel_largest_later : float32 array [L, K]
        The same without the first token of every window.
    token_largest : float32 array [L, W, T]
        Over all channels, for each token of each window.
    token_channel : int32 array [L, W, T]
        The channel that holds it.
    """

    channel_largest: np.ndarray
    channel_largest_later: np.ndarray
    token_largest: np.ndarray
    token_channel: np.ndarray


@dataclass(frozen=True)
class Observation:
    """What passed through a model while it read W windows of T tokens.

    Attributes
    ----------
    windows : list of lists of int
    inputs : mapping of InputStatistics
        By the name of the linear.
    start_attention : float32 array [L, H]
        Probability that a head gives to the first token: mean over the queries that see more than it.
    """

    windows: list[list[int]]
    inputs: Mapping[str, InputStatistics]
    start_attention: np.ndarray


def observe(model: ReferenceModel, windows: list[list[int]]) -> Observation:
    """Run windows of one length, 2 tokens or more, through a model and look at what passes.

    Parameters
    ----------
    model : ReferenceModel
    windows : list of lists of int

    Raises
    ------
    AgqError
        If the tokens do not fit the model.
    """
    config = model.config
    layers, tokens = config.num_layers, (config.num_layers, len(windows), len(windows[0]))
    inputs = {
        linear.name: InputStatistics(
            channel_largest=np.zeros((layers, linear.in_features), "float32"),
            channel_largest_later=np.zeros((layers, linear.in_features), "float32"),
            token_largest=np.zeros(tokens, "float32"),
            token_channel=np.zeros(tokens, "int32"),
        )
        for linear in config.linears
    }
    observation = Observation(windows, inputs, np.zeros((layers, config.num_heads), "float32"))
    for i, window in enumerate(progress(windows, "observing", unit="window")):
        model.logits(window, observer=_WindowObserver(observation, i))
    return observation


class _WindowObserver:
    """Adds what it sees of one window to an observation."""

    def __init__(self, observation: Observation, window: int) -> None:
        self._observation = observation
        self._window = window

    def linear_input(self, layer: int, name: str, x: Tensor) -> None:
        seen, magnitudes = self._observation.inputs[name], x.abs()
        largest, channel = magnitudes.max(1)
        for total, values in (
            (seen.channel_largest, magnitudes),
            (seen.channel_largest_later, magnitudes[1:]),
        ):
            np.maximum(total[layer], values.amax(0).numpy(), out=total[layer])
        seen.token_largest[layer, self._window] = largest.numpy()
        seen.token_channel[layer, self._window] = channel.numpy()

    def attention(self, layer: int, q: Tensor, k: Tensor, bias: Tensor | None) -> None:
        mean = start_probabilities(q, k, bias)[:, 1:].mean(1)
        self._observation.start_attention[layer] += mean.numpy() / len(self._observation.windows)


def outlier_ratio(channel_largest: np.ndarray) -> np.ndarray:
    """Return how many times the median channel the largest one is, for each layer.

    Parameters
    ----------
    channel_largest : float32 array [L, K]

    Returns
    -------
    float64 array [L]
        NaN where half of the channels or more are zero.
    """
    median = np.median(channel_largest.astype("float64"), 1)
    return channel_largest.max(1) / np.where(median > 0, median, np.nan)
