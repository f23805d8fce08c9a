"""Calibration that walks through a model layer by layer, every window in step with the others.

Memory is that of the windows' hidden states, one layer's weights in float and one Hessian.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from agq_tvm.errors import AgqError
from agq_tvm.models.decoder import Linear
from agq_tvm.progress import progress
from agq_tvm.quantize.activations import static_range
from agq_tvm.quantize.checkpoint import QuantizedLinear, Scheme
from agq_tvm.quantize.forward import LayerSteps, Norms, attention_positions, layer_steps, read_norms
from agq_tvm.quantize.gptq import gptq
from agq_tvm.quantize.reference import float_entry, stacked_weights
from agq_tvm.quantize.source import Source

_SMALLEST_SQUARE = 1e-30


class _Windows:
    """The hidden states of windows of one length, advanced by one linear at a time."""

    def __init__(self, source: Source, windows: list[list[int]]) -> None:
        self._config = source.config
        entry = float_entry(source)
        self._hidden = [entry(window) for window in windows]
        self._positions = attention_positions(source.config, len(windows[0]))
        self._steps: list[LayerSteps] = []

    def enter_layer(self, norms: Norms) -> list[Tensor]:
        """Begin a layer; return the inputs [T, K] of its first linear."""
        config, positions = self._config, self._positions
        self._steps = [layer_steps(config, norms, hidden, positions, half_cache=False) for hidden in self._hidden]
        return [next(steps)[1] for steps in self._steps]

    def advance(self, outputs: Iterator[Tensor]) -> list[Tensor]:
        """Give the outputs of a linear; return the inputs of the next, or nothing after the last."""
        inputs = []
        for i, (steps, output) in enumerate(zip(self._steps, outputs, strict=True)):
            try:
                inputs.append(steps.send(output)[1])
            except StopIteration as stop:
                self._hidden[i] = stop.value
        return inputs


@torch.inference_mode()
def quantize_layers(source: Source, scheme: Scheme, windows: list[list[int]]) -> dict[str, QuantizedLinear]:
    """Quantize every linear by GPTQ, on inputs that come out of the already quantized ones before it.

    Linears that share an input share its Hessian. Activations stay float.

    Parameters
    ----------
    source : Source
    scheme : Scheme
    windows : list of lists of int
        Calibration tokens.
    """
    config = source.config
    states = _Windows(source, windows)
    quantized: dict[str, QuantizedLinear] = {}
    for layer in progress(range(config.num_layers), "GPTQ", unit="layer"):
        prefix = config.layer_prefix.format(layer=layer)
        inputs = states.enter_layer(read_norms(config, layer, source.tensor))
        for linear in config.linears:
            parts = _quantize_linear(source, prefix, linear, inputs, scheme)
            quantized |= zip((prefix + part for part in linear.parts), parts, strict=True)
            operator = stacked_weights(parts)
            inputs = states.advance(operator(x) for x in inputs)
    return quantized


def _quantize_linear(
    source: Source, prefix: str, linear: Linear, inputs: list[Tensor], scheme: Scheme
) -> tuple[QuantizedLinear, ...]:
    hessian = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)
    for x in inputs:
        hessian += (x * token_weights(x)).T @ x
    weights = [source.tensor(f"{prefix}{part}.weight") for part in linear.parts]
    try:
        stacked = gptq(np.concatenate(weights), hessian.numpy(), scheme.group_size, scheme.symmetric)
    except AgqError as error:
        raise AgqError(f"{prefix}{linear.parts[0]}: {error}") from error
    if not np.isfinite(stacked.scales).all():
        raise AgqError(f"{prefix}{linear.parts[0]}: GPTQ left float16's range: use rtn")
    parts = zip(linear.parts, _split(stacked, linear.rows), strict=True)
    return tuple(replace(part, bias=source.bias(prefix + name)) for name, part in parts)


def token_weights(x: Tensor) -> Tensor:
    """Return what each token counts in a Hessian: the inverse of its mean square, so that all count alike.

    The first token of a window can be thousands of times larger than the others (a sink of attention). Counted
    by its size it drowns them, and their errors are left to chance; left out, its own error ruins the model.

    Parameters
    ----------
    x : float32 tensor [T, K]

    Returns
    -------
    float32 tensor [T, 1]
    """
    return 1 / x.square().mean(-1, keepdim=True).clamp_min(_SMALLEST_SQUARE)


def _split(stacked: QuantizedLinear, rows: tuple[int, ...]) -> tuple[QuantizedLinear, ...]:
    ends = np.cumsum(rows)
    return tuple(
        QuantizedLinear(
            qweight=stacked.qweight[end - count : end],
            scales=stacked.scales[end - count : end],
            offsets=None if stacked.offsets is None else stacked.offsets[end - count : end],
            in_features=stacked.in_features,
            group_size=stacked.group_size,
        )
        for count, end in zip(rows, ends, strict=True)
    )


@torch.inference_mode()
def static_ranges(
    source: Source,
    linears: Mapping[str, QuantizedLinear],
    windows: list[list[int]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Find scale and zero point of every linear's input, from its smallest and largest calibration value.

    Parameters
    ----------
    source : Source
        Embedding and norms are its own.
    linears : mapping of QuantizedLinear
        Run with float activations.
    windows : list of lists of int

    Returns
    -------
    dict
        By the name of the linear: scale float32 [1] and zero point int32 [1]; linears that share an input
        share them.
    """
    config = source.config
    states = _Windows(source, windows)
    ranges = {}
    for layer in progress(range(config.num_layers), "calibrating", unit="layer"):
        prefix = config.layer_prefix.format(layer=layer)
        inputs = states.enter_layer(read_norms(config, layer, source.tensor))
        for linear in config.linears:
            names = [prefix + part for part in linear.parts]
            low, high = min(float(x.min()) for x in inputs), max(float(x.max()) for x in inputs)
            scale, zero = static_range(low, high)
            ranges |= dict.fromkeys(names, (np.array([scale], "float32"), np.array([zero], "int32")))
            operator = stacked_weights(tuple(linears[name] for name in names))
            inputs = states.advance(operator(x) for x in inputs)
    return ranges
