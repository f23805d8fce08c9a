"""Pictures of attention maps, and of what pruning tokens does to activations; needs matplotlib. Layers count from 1."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from agq_tvm.flow.pictures import new_figure, pool_columns
from agq_tvm.quantize.observe import Observation
from agq_tvm.quantize.pruning import PruningSchedule

_MOST_MAPS = 4
_MAP_PIXELS = 64
_FAINTEST = 1e-4
_DECADE = 10


def draw_maps(observation: Observation, pruned: Observation | None, title: str, directory: Path) -> None:
    """Draw ``attention-maps.png``: maps of up to four layers, mean over heads; below them those of the pruned model.

    Parameters
    ----------
    observation, pruned : Observation
        Of the same window.
    title : str
        The model's name.
    directory : Path
    """
    layers = np.unique(np.linspace(0, len(observation.maps) - 1, _MOST_MAPS).round().astype(int))
    rows = [("", observation), ("pruned, ", pruned)] if pruned else [("", observation)]
    figure = new_figure(f"{title}: attention, mean over heads", 0)
    maps = figure.subplots(len(rows), len(layers), squeeze=False)
    for axes, (words, seen) in zip(maps, rows, strict=True):
        for place, layer in zip(axes, layers, strict=True):
            image = draw_map(place, seen.maps[layer])
            place.set_title(f"{words}layer {layer + 1}", fontsize="medium")
        axes[0].set(ylabel="query")
    for place in maps[-1]:
        place.set(xlabel="key")
    figure.colorbar(image, ax=maps, label="probability", pad=0.01)
    figure.savefig(directory / "attention-maps.png")


def draw_map(axes: Axes, attention: np.ndarray):
    """Draw a map [R, R]; neighbours that share a pixel show their maximum. Returns the image."""
    rows = len(attention)
    shown = pool_columns(pool_columns(attention, _MAP_PIXELS).T, _MAP_PIXELS).T
    extent = (-0.5, rows - 0.5, rows - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.spines["left"].set_visible(False)  # it would hide the first key
    return axes.imshow(np.maximum(shown, _FAINTEST), norm=LogNorm(_FAINTEST, 1), interpolation="nearest", extent=extent)


def draw_comparison(
    observation: Observation, pruned: Observation, pruning: PruningSchedule, outlier: float, title: str, directory: Path
) -> None:
    """Draw charts over the layers, without pruning and with it.

    Writes ``pruning-activations.png``, the largest magnitude and the number of outlier channels at the input of every
    linear, and ``pruning-attention.png``, the attention to the first token.

    Parameters
    ----------
    observation, pruned : Observation
        Of the same windows.
    pruning : PruningSchedule
    outlier : float
        A channel is an outlier if its largest magnitude is over this many times that of the median channel.
    title : str
        The model's name.
    directory : Path
    """
    figure = new_figure(f"{title}: inputs of the linears", 40)
    charts = figure.subplots(2, len(observation.inputs), squeeze=False)
    for (above, below), name in zip(charts.T, observation.inputs, strict=True):
        pair = [each.inputs[name].channel_largest for each in (observation, pruned)]
        draw_pair(above, *(largest.max(1) for largest in pair), pruning)
        draw_pair(below, *(outlier_channels(largest, outlier) for largest in pair), pruning)
        above.set(title=name, yscale="log" if pair[0].max() > _DECADE * pair[0].max(1).min() else "linear")
        below.yaxis.set_major_locator(MaxNLocator(integer=True))
        below.set_ylim(0, max(1, below.get_ylim()[1]))
    charts[0, 0].set(ylabel="largest |x|")
    charts[1, 0].set(ylabel=f"channels over {outlier:g} times the median")
    charts[0, 0].legend()
    figure.savefig(directory / "pruning-activations.png")
    figure = new_figure(f"{title}: attention to the first token, mean over heads and queries", 0)
    axes = figure.subplots()
    draw_pair(axes, observation.start_attention.mean(1), pruned.start_attention.mean(1), pruning)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(directory / "pruning-attention.png")


def draw_pair(axes: Axes, dense: np.ndarray, pruned: np.ndarray, pruning: PruningSchedule) -> None:
    """Draw a value of every layer [L] without pruning and with it, and where tokens are dropped."""
    layers = np.arange(1, len(dense) + 1)
    axes.plot(layers, dense, marker=".", label="all tokens")
    axes.plot(layers, pruned, marker=".", linestyle="--", label="pruned")
    for i, layer in enumerate(pruning.layers):
        axes.axvline(layer, color="gray", linewidth=1, linestyle=":", label=None if i else "tokens dropped")
    axes.set(xlabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def outlier_channels(largest: np.ndarray, outlier: float) -> np.ndarray:
    """Count the channels of each layer whose largest magnitude [L, K] is over `outlier` times the median one's."""
    return (largest > outlier * np.median(largest, 1, keepdims=True)).sum(1)
