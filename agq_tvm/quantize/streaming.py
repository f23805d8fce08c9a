"""Calibration that walks through a model layer by layer, every window in step with the others.

Memory is that of the windows' hidden states (for GPTQ, in the float model too), one layer's weights in float and
two matrices of a linear's inner dimension squared.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from agq_tvm.errors import AgqError
from agq_tvm.models.decoder import DecoderConfig, Linear
from agq_tvm.progress import progress
from agq_tvm.quantize.activations import ActivationQuantizer
from agq_tvm.quantize.checkpoint import QuantizedLinear
from agq_tvm.quantize.codebooks import CODE_BOOKS
from agq_tvm.quantize.forward import Attend, LayerSteps, Norms, attention_positions, layer_steps, read_norms
from agq_tvm.quantize.gptq import gptq
from agq_tvm.quantize.log2 import Log2Attention, value_scales
from agq_tvm.quantize.mixed import MixedFormat
from agq_tvm.quantize.operators import FloatLinear, float_linear, stacked_weights
from agq_tvm.quantize.reference import float_entry
from agq_tvm.quantize.scheme import Scheme
from agq_tvm.quantize.source import Source, quantize_matrix
from agq_tvm.quantize.trip import refine_per_token, refine_static
from agq_tvm.quantize.weights import grid_of

_SMALLEST_SQUARE = 1e-30


class _Windows:
    """The hidden states of windows of one length, advanced by one linear at a time."""

    def __init__(self, source: Source, windows: list[list[int]]) -> None:
        self._config = source.config
        entry = float_entry(source)
        self._hidden = [entry(window) for window in windows]
        self._positions = attention_positions(source.config, len(windows[0]))
        self._steps: list[LayerSteps] = []

    def enter_layer(self, norms: Norms, attend: Attend | None = None) -> list[Tensor]:
        """Begin a layer; return the inputs [T, K] of its first linear."""
        common = {"config": self._config, "norms": norms, "positions": self._positions, "attend": attend}
        self._steps = [layer_steps(hidden=hidden, half_cache=False, **common) for hidden in self._hidden]
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
def quantize_layers(
    source: Source,
    scheme: Scheme,
    windows: list[list[int]],
    formats: Mapping[tuple[int, str], MixedFormat] | None = None,
) -> dict[str, QuantizedLinear]:
    """Quantize every linear, on inputs that come out of the already quantized ones before it.

    Inputs are rounded as the scheme rounds activations, and attention is the scheme's. GPTQ fits each linear to what
    the float model gives; linears that share an input share its Hessian.

    Parameters
    ----------
    source : Source
    scheme : Scheme
    windows : list of lists of int
        Calibration tokens.
    formats : mapping, optional
        Bits and steps of activations, by layer and name of the linear.

    Returns
    -------
    dict
        By the name of the matrix, with what is calibrated of its input's quantizer, and of the values with quantized
        attention.
    """
    config = source.config
    states = _Windows(source, windows)
    exact = _Windows(source, windows) if scheme.method == "gptq" else None
    quantized: dict[str, QuantizedLinear] = {}
    for layer in progress(range(config.num_layers), "calibrating", unit="layer"):
        prefix = config.layer_prefix.format(layer=layer)
        norms = read_norms(config, layer, source.tensor)
        attend = Log2Attention(CODE_BOOKS[scheme.attention]) if scheme.attention in CODE_BOOKS else None
        inputs = states.enter_layer(norms, attend)
        wanted = exact.enter_layer(norms) if exact else inputs
        for linear in config.linears:
            names = [prefix + part for part in linear.parts]
            float_operator = float_linear(source, names)
            quantizer = _quantizer(inputs, float_operator.weight, linear.name, scheme)
            if formats:
                quantizer = replace(quantizer, mixed=formats[layer, linear.name])
            inputs = [quantizer.rounded(x) for x in inputs]
            if exact:
                parts = _by_gptq(source, names, linear, inputs, wanted, scheme)
                wanted = exact.advance(float_operator(x) for x in wanted)
            else:
                parts = tuple(quantize_matrix(source, name, scheme) for name in names)
            parts = tuple(_with_quantizer(*each, quantizer) for each in zip(parts, names, strict=True))
            operator = stacked_weights(parts)
            if attend and linear.name == "qkv":
                attend.value_scales = _value_scales(config, operator, inputs)
                parts = (*parts[:-1], replace(parts[-1], value_scale=attend.value_scales.numpy()))
            quantized |= zip(names, parts, strict=True)
            inputs = states.advance(operator(x) for x in inputs)
    return quantized


def _quantizer(inputs: list[Tensor], weight: Tensor, role: str, scheme: Scheme) -> ActivationQuantizer:
    bits = scheme.activation_bits(role)
    if scheme.activation == "static":
        return refine_static(inputs, scheme.group_size, scheme.max_refine, bits).quantizer
    alpha = refine_per_token(inputs, weight, scheme.group_size, scheme.max_refine) if scheme.max_refine else None
    return ActivationQuantizer(scheme.activation, scheme.group_size, alpha=alpha, bits=bits)


def _value_scales(config: DecoderConfig, qkv: FloatLinear, inputs: list[Tensor]) -> Tensor:
    """Return the scale of each KV head's values, float32 [KV]; they are the last columns of `qkv`."""
    columns = config.num_kv_heads * config.head_dim
    values = FloatLinear(qkv.weight[-columns:], None if qkv.bias is None else qkv.bias[-columns:])
    largest = [values(x).view(-1, config.num_kv_heads, config.head_dim).abs().amax((0, 2)) for x in inputs]
    return value_scales(torch.stack(largest).amax(0))


def _with_quantizer(linear: QuantizedLinear, name: str, quantizer: ActivationQuantizer) -> QuantizedLinear:
    """Store what is calibrated of a quantizer with a matrix that reads what it made."""
    if quantizer.static:
        scale, zero = quantizer.static
        linear = replace(linear, act_scale=np.array([scale], "float32"), act_zero=np.array([zero], "int32"))
    if quantizer.mixed:
        linear = _with_format(linear, quantizer.mixed)
    if quantizer.alpha is None:
        return linear
    linear = replace(linear, alpha=quantizer.alpha.numpy().astype("int8"))
    for values in grid_of(linear):
        if not np.isfinite((values * np.exp2(linear.alpha, dtype="float32")).astype("float16")).all():
            raise AgqError(f"{name}: scales times 2^{linear.alpha.max()} leave float16's range: lower max_refine")
    return linear


def with_formats(
    config: DecoderConfig, linears: dict[str, QuantizedLinear], formats: Mapping[tuple[int, str], MixedFormat]
) -> dict[str, QuantizedLinear]:
    """Store bits and steps of activations, by layer and name of the linear, with every matrix that reads them."""
    return {
        name: _with_format(linears[name], format)
        for (layer, role), format in formats.items()
        for linear in config.linears
        if linear.name == role
        for name in (config.layer_prefix.format(layer=layer) + part for part in linear.parts)
    }


def _with_format(linear: QuantizedLinear, format: MixedFormat) -> QuantizedLinear:
    bits, steps = (values.numpy().astype("uint8") for values in (format.bits, format.steps))
    return replace(linear, bits=bits, steps=steps)


def _by_gptq(
    source: Source, names: list[str], linear: Linear, inputs: list[Tensor], wanted: list[Tensor], scheme: Scheme
) -> tuple[QuantizedLinear, ...]:
    hessian = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)
    drift = torch.zeros_like(hessian)
    for x, x_float in zip(inputs, wanted, strict=True):
        weighted = x * token_weights(x)
        hessian += weighted.T @ x
        drift += (x_float - x).T @ weighted
    weight = np.concatenate([source.tensor(f"{name}.weight") for name in names])
    try:
        stacked = gptq(weight, hessian.numpy(), scheme.group_size, scheme.symmetric, drift.numpy())
    except AgqError as error:
        raise AgqError(f"{names[0]}: {error}") from error
    if not np.isfinite(stacked.scales).all():
        raise AgqError(f"{names[0]}: GPTQ left float16's range: use rtn")
    parts = _split(stacked, linear.rows)
    return tuple(replace(part, bias=source.bias(name)) for part, name in zip(parts, names, strict=True))


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
