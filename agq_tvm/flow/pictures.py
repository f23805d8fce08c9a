"""Pictures of what passes through a model; needs matplotlib."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agq_tvm.quantize.observe import Observation, outlier_ratio

# A row of pixels holds about a thousand: half as many columns keep a single channel visible.
_COLUMNS = 500
_DPI = 110


def draw(observation: Observation, title: str, directory: Path, suffix: str = "") -> None:
    """Draw an observation.

    Writes ``channels-<linear>.png``, the largest magnitude of every channel in every layer; the chart
    ``outlier-ratio.png``; and ``attention-to-start.png``.

    Parameters
    ----------
    observation : Observation
    title : str
        The model's name.
    directory : Path
    suffix : str
        What the names of the files end with.
    """
    for name, seen in observation.inputs.items():
        figure = new_figure(f"{title}: input of {name}", len(seen.channel_largest))
        draw_channels(figure.subplots(), seen.channel_largest)
        figure.savefig(directory / f"channels-{name}{suffix}.png")
    figure = new_figure(f"{title}: largest channel over median channel", 0)
    draw_ratios(figure.subplots(), observation)
    figure.savefig(directory / f"outlier-ratio{suffix}.png")
    figure = new_figure(f"{title}: attention to the first token", len(observation.start_attention))
    heads, mean = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    draw_start_heads(heads, observation.start_attention)
    draw_start_mean(mean, observation.start_attention)
    figure.savefig(directory / f"attention-to-start{suffix}.png")


def draw_channels(axes: Axes, largest: np.ndarray) -> None:
    """Draw the largest magnitudes [L, K] as a map of layers by channels; neighbours that share a column show
    their maximum."""
    layers, channels = largest.shape
    shown = pool_columns(largest, _COLUMNS)
    positive = shown[shown > 0]
    # A few dead channels must not stretch the colours over decades.
    low = np.percentile(positive, 1) if positive.size else 0.1
    norm = LogNorm(low, max(shown.max(), 1.001 * low))
    extent = (-0.5, channels - 0.5, layers - 0.5, -0.5)
    image = axes.imshow(np.maximum(shown, low), norm=norm, aspect="auto", interpolation="nearest", extent=extent)
    axes.set(xlabel="channel", ylabel="layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(image, ax=axes, label="largest |x|", pad=0.01)


def pool_columns(values: np.ndarray, most: int) -> np.ndarray:
    """Take the maximum of neighbouring columns, as few together as leave `most` columns or fewer."""
    width = -(-values.shape[1] // most)
    return np.maximum.reduceat(values, np.arange(0, values.shape[1], width), axis=1)


def draw_ratios(axes: Axes, observation: Observation) -> None:
    """Draw the ratio of the largest channel to the median one, a line for each linear's input."""
    for i, (name, seen) in enumerate(observation.inputs.items()):
        axes.plot(outlier_ratio(seen.channel_largest), color=f"C{i}", marker=".", label=name)
        axes.plot(outlier_ratio(seen.channel_largest_later), color=f"C{i}", linestyle="--", linewidth=1)
    axes.plot([], [], color="gray", linestyle="--", linewidth=1, label="without the first token")
    axes.set(xlabel="layer", ylabel="largest |x| of a channel: maximum / median", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, which="both")
    axes.legend()


def draw_start_heads(axes: Axes, attention: np.ndarray) -> None:
    """Draw the attention to the first token [L, H] as a map of layers by heads."""
    image = axes.imshow(attention, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set(xlabel="head", ylabel="layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(image, ax=axes, label="mean over queries", pad=0.02)


def draw_start_mean(axes: Axes, attention: np.ndarray) -> None:
    """Draw the mean over heads of the attention to the first token [L, H], a bar for each layer."""
    axes.barh(range(len(attention)), attention.mean(1))
    axes.set(xlabel="mean over heads", xlim=(0, 1))
    axes.grid(alpha=0.3, axis="x")


def new_figure(title: str, layers: int) -> Figure:
    """Make a figure as high as its number of layers asks for."""
    figure = Figure(figsize=(11, max(4.5, 1.5 + 0.14 * layers)), dpi=_DPI, layout="constrained")
    figure.suptitle(title)
    return figure
