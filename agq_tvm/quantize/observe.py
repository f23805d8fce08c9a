"""What passes through a model: outlier channels at the linears' inputs, and attention to the first token.

Agile-Quant rests on these two (figure 1 of arXiv 2312.05693): a few channels, the same for all tokens and much
larger than the rest, make activations hard to quantize, and attention to the start token says which tokens matter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from agq_tvm.progress import progress
from agq_tvm.quantize.forward import attention_map, start_probabilities
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
        Over all channels, for each token of each window; 0 where a token is pruned.
    token_channel : int32 array [L, W, T]
        The channel that holds it; -1 where a token is pruned.
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
    maps : list of float32 arrays [R, R]
        Of each layer: what each of the R tokens that reach it gives to each, mean over heads, in the first window.
    """

    windows: list[list[int]]
    inputs: Mapping[str, InputStatistics]
    start_attention: np.ndarray
    maps: list[np.ndarray] = field(default_factory=list)


def observe(model: ReferenceModel, windows: list[list[int]], chunks: Sequence[int] | None = None) -> Observation:
    """Run windows of one length, 2 tokens or more, through a model and look at what passes.

    Parameters
    ----------
    model : ReferenceModel
    windows : list of lists of int
    chunks : sequence of int, optional
        Drop tokens as the model does, a window being a prompt cut like this; by default none are dropped.

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
        observer = _WindowObserver(observation, i)
        if chunks is None:
            model.logits(window, observer=observer)
        else:
            _to_positions(model, observation, i, model.prune(window, chunks, observer=observer).kept)
    return observation


def _to_positions(model: ReferenceModel, observation: Observation, window: int, kept: Sequence[np.ndarray]) -> None:
    """Move what was seen of the rows that were left, in order, to their positions in the window."""
    before_drop = [linear.name for linear in model.config.linears[:2]]
    for name, seen in observation.inputs.items():
        for layer in range(model.config.num_layers):
            number = layer if name in before_drop else layer + 1
            positions = kept[sum(pruned <= number for pruned in model.pruning.layers)]
            for values, nothing in ((seen.token_largest, 0), (seen.token_channel, -1)):
                rows = values[layer, window, : len(positions)].copy()
                values[layer, window] = nothing
                values[layer, window, positions] = rows


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
        seen.token_largest[layer, self._window, : len(x)] = largest.numpy()
        seen.token_channel[layer, self._window, : len(x)] = channel.numpy()

    def attention(self, layer: int, q: Tensor, k: Tensor, bias: Tensor | None) -> None:
        mean = start_probabilities(q, k, bias)[:, 1:].mean(1)
        self._observation.start_attention[layer] += mean.numpy() / len(self._observation.windows)
        if self._window == 0:
            self._observation.maps.append(attention_map(q, k, bias).numpy())


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
