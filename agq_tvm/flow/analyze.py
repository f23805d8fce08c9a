"""What a model's activations look like: outlier channels and attention to the first token, as JSON and pictures."""

import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.files import fresh_directory, write_json
from agq_tvm.flow.evaluate import open_reference
from agq_tvm.quantize.calibration import cut_windows
from agq_tvm.quantize.pruning import PruningSchedule
from agq_tvm.quantize.texts import load_text, title
from agq_tvm.runtime.engine import prompt_chunks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from agq_tvm.quantize.observe import InputStatistics, Observation

OUTLIER = 6.0
"""A channel is an outlier if its largest magnitude is over this many times that of the median channel."""
WINDOWS = 8
WINDOW = 512
_TOP_TOKENS = 5
_DIGITS = 5


def analyze(
    model: str | os.PathLike,
    output: str | os.PathLike = "agq-analysis",
    data: str | os.PathLike = "calibration",
    pruning: PruningSchedule | None = None,
) -> dict:
    """Run a text through a model and write down what passes: ``analysis.json`` and pictures.

    The text is read in up to 8 windows of 512 tokens (or the model's context), evenly spread. ``analysis.json``
    holds for each linear's input and layer the largest magnitude of every channel, the ratio of the largest
    channel to the median one, with and without the first token of each window, the channels over `OUTLIER`
    times the median, and the tokens with the largest values; and for each head what attention it gives to the
    first token (figure 1 of the paper).

    If tokens are pruned, all of it is there twice, without and with (``pruned``), a window being a prompt cut into
    the chunks of a compiled model; pictures compare the two.

    Parameters
    ----------
    model : str or path-like
        A quantized checkpoint, run with its own activation codes, or a float model (see
        `agq_tvm.quantize.source.open_source`).
    output : path-like
        The directory to write; an earlier analysis there is replaced.
    data : str or path-like
        See `agq_tvm.quantize.texts.load_text`.
    pruning : PruningSchedule, optional
        Instead of the checkpoint's own.

    Returns
    -------
    dict
        ``model``, ``text``, ``text_sha256``, ``windows``, ``window_tokens``, ``outlier_threshold``;
        ``inputs``: by the linear's name the ``ratio`` of the layer where it is highest, that ``layer``, its
        largest ``channel`` and ``ratio_without_first_token``, and how many ``outlier_channels`` all layers have;
        ``attention_to_start``: ``mean``, ``uniform`` (what equal attention to all tokens would give) and, where
        it is highest, ``layer`` and ``layer_mean``; ``pruned`` (None, or ``schedule``, and by the linear's name
        ``largest`` and ``outlier_channels``, means over the layers that see fewer tokens, without and with pruning);
        ``files``; and ``seconds``.

    Raises
    ------
    AgqError
        If matplotlib is missing, the model or the text cannot be read, the text is shorter than a window, a
        layer to prune in does not exist, or the output cannot be written.
    """
    started = time.perf_counter()
    need_matplotlib()
    _, text_sha256 = load_text(data, "train")
    with fresh_directory(output, "analysis") as directory:
        observations, tokenizer, pruning = _observe(model, data, pruning)
        observation, *pruned = observations
        about = {
            "model": str(model),
            "text": title(data, "train"),
            "text_sha256": text_sha256,
            "windows": len(observation.windows),
            "window_tokens": len(observation.windows[0]),
            "outlier_threshold": OUTLIER,
        }
        described, *after = (_described(each, tokenizer) for each in observations)
        schedule = asdict(pruning) if pruning else None
        last = {"schedule": schedule, **after[0]} if after else None
        write_json(directory / "analysis.json", {**about, **described, "pruned": last})
        _draw(observation, pruned[0] if pruned else None, pruning, Path(model).name, directory)
        files = sorted(path.name for path in directory.iterdir())
    return {
        **about,
        "inputs": {name: _summary(layers) for name, layers in described["inputs"].items()},
        "attention_to_start": _start_summary(described["attention_to_start"]),
        "pruned": _pruned_summary(schedule, described, after[0]) if after else None,
        "files": files,
        "seconds": time.perf_counter() - started,
    }


def need_matplotlib() -> None:
    """Refuse to go on without what pictures are drawn with.

    Raises
    ------
    AgqError
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise AgqError("drawing pictures needs matplotlib: pip install 'agq-tvm[plot]'") from error


def _draw(
    observation: "Observation",
    pruned: "Observation | None",
    pruning: PruningSchedule | None,
    title: str,
    directory: Path,
) -> None:
    from agq_tvm.flow.pictures import draw
    from agq_tvm.flow.pruning_pictures import draw_comparison, draw_maps

    draw(observation, title, directory)
    draw_maps(observation, pruned, title, directory)
    if pruned is not None:
        draw(pruned, f"{title}, pruned", directory, "-pruned")
        draw_comparison(observation, pruned, pruning, OUTLIER, title, directory)


def _observe(
    model: str | os.PathLike, data: str | os.PathLike, pruning: PruningSchedule | None
) -> tuple[list["Observation"], "Tokenizer", PruningSchedule | None]:
    """Return what passes without pruning, and with it if there is any; the tokenizer; and the schedule."""
    from tokenizers import Tokenizer

    from agq_tvm.quantize.observe import observe

    with tempfile.TemporaryDirectory() as scratch:
        reference, tokenizer = open_reference(model, Path(scratch))
        windows = cut_windows(tokenizer, data, WINDOWS, min(WINDOW, reference.config.context_length))
        reference.pruning = pruning or reference.pruning
        ways = [None]
        if reference.pruning is not None:
            reference.pruning.check_layers(reference.config.num_layers)
            ways.append(prompt_chunks(len(windows[0])))
        seen = [observe(reference, windows, chunks) for chunks in ways]
        return seen, Tokenizer.from_file(str(tokenizer)), reference.pruning


def _described(observation: "Observation", tokenizer: "Tokenizer") -> dict:
    inputs = {name: _layers(seen, observation.windows, tokenizer) for name, seen in observation.inputs.items()}
    return {"inputs": inputs, "attention_to_start": _start_attention(observation)}


def _layers(seen: "InputStatistics", windows: list[list[int]], tokenizer: "Tokenizer") -> list[dict]:
    from agq_tvm.quantize.observe import outlier_ratio

    ratios, later = outlier_ratio(seen.channel_largest), outlier_ratio(seen.channel_largest_later)
    return [
        {
            "layer": layer,
            "largest": _rounded(channels.max()),
            "largest_channel": int(channels.argmax()),
            "median_channel": _rounded(np.median(channels)),
            "ratio": _rounded(ratios[layer]),
            "ratio_without_first_token": _rounded(later[layer]),
            "outlier_channels": _outliers(channels),
            "windows_where_first_token_is_largest": int((seen.token_largest[layer].argmax(1) == 0).sum()),
            "largest_tokens": _largest_tokens(seen, layer, windows, tokenizer),
            "channel_largest": [_rounded(value) for value in channels],
        }
        for layer, channels in enumerate(seen.channel_largest)
    ]


def _outliers(channels: np.ndarray) -> list[dict]:
    """Name the channels over `OUTLIER` times the median, the largest first."""
    found = [channel for channel in np.argsort(-channels) if channels[channel] > OUTLIER * np.median(channels)]
    return [{"channel": int(channel), "largest": _rounded(channels[channel])} for channel in found]


def _largest_tokens(
    seen: "InputStatistics", layer: int, windows: list[list[int]], tokenizer: "Tokenizer"
) -> list[dict]:
    magnitudes = seen.token_largest[layer]
    order = np.argsort(-magnitudes, axis=None)[:_TOP_TOKENS]
    found = []
    for window, position in zip(*np.unravel_index(order, magnitudes.shape), strict=True):
        token = windows[window][position]
        found.append(
            {
                "window": int(window),
                "position": int(position),
                "token": token,
                "text": tokenizer.decode([token], skip_special_tokens=False),
                "channel": int(seen.token_channel[layer, window, position]),
                "largest": _rounded(magnitudes[window, position]),
            }
        )
    return found


def _start_attention(observation: "Observation") -> dict:
    heads, length = observation.start_attention, len(observation.windows[0])
    return {
        "uniform": _rounded(np.mean(1 / np.arange(2, length + 1))),
        "layers": [_rounded(value) for value in heads.mean(1)],
        "heads": [[_rounded(value) for value in layer] for layer in heads],
    }


def _summary(layers: list[dict]) -> dict:
    most = max(layers, key=lambda layer: layer["ratio"] or 0)
    return {
        "ratio": most["ratio"],
        "layer": most["layer"],
        "channel": most["largest_channel"],
        "ratio_without_first_token": most["ratio_without_first_token"],
        "outlier_channels": sum(len(layer["outlier_channels"]) for layer in layers),
    }


def _pruned_summary(schedule: dict, dense: dict, pruned: dict) -> dict:
    """Compare the layers that see fewer tokens; the one that drops them does so before its MLP."""
    inputs = {}
    for i, (name, layers) in enumerate(dense["inputs"].items()):
        start = schedule["layers"][0] - (i >= 2)
        if start < len(layers):
            pair = [layers[start:], pruned["inputs"][name][start:]]
            inputs[name] = {
                "largest": [_mean(each["largest"] for each in some) for some in pair],
                "outlier_channels": [_mean(len(each["outlier_channels"]) for each in some) for some in pair],
            }
    return {"schedule": schedule, "inputs": inputs, "attention_to_start": _start_summary(pruned["attention_to_start"])}


def _start_summary(start: dict) -> dict:
    means = start["layers"]
    layer = int(np.argmax(means))
    return {
        "mean": _rounded(np.mean(means)),
        "uniform": start["uniform"],
        "layer": layer,
        "layer_mean": means[layer],
    }


def _mean(values: Iterable[float]) -> float:
    return _rounded(np.mean(list(values)))


def _rounded(value: float) -> float | None:
    """Round to a few digits, enough for a picture; NaN, which JSON has no word for, becomes None."""
    return None if np.isnan(value) else float(f"{value:.{_DIGITS}g}")
