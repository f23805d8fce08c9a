"""Calibration that walks through a model layer by layer, every window in step with the others.

Memory is that of the windows' hidden states and the inputs of one linear (for GPTQ, in the float model too), one
linear's weights in float and four matrices of its inner dimension squared.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

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
from agq_tvm.quantize.row_pruner import RowPruner
from agq_tvm.quantize.scheme import Scheme
from agq_tvm.quantize.shifts import check_totals
from agq_tvm.quantize.source import Source, quantize_matrix
from agq_tvm.quantize.trip import StaticRefinement, refine_blocks, refine_per_token, refine_static
from agq_tvm.quantize.weights import grid_of, unpack

_SMALLEST_SQUARE = 1e-30
# Called with a layer, a linear's role, and the static quantizer of its input.
Watch = Callable[[int, str, StaticRefinement], None]
Look = Callable[[list[Tensor], list[Tensor] | None], None]


class _Windows:
    """The hidden states of windows of one length, advanced by one linear at a time.

    Between layers they are `hidden`. With `pruners`, one for each window, rows are dropped in some layers. Those of a
    `leader` do as it does.
    """

    def __init__(
        self,
        source: Source,
        windows: list[list[int]],
        pruners: list[RowPruner] | None = None,
        leader: "_Windows | None" = None,
    ) -> None:
        self._config = source.config
        entry = float_entry(source)
        self.hidden: list[Tensor | None] = [entry(window) for window in windows]
        self._positions = attention_positions(source.config, len(windows[0]))
        self._steps: list[LayerSteps] = []
        self._pruners = leader._pruners if leader else pruners
        self._leads = leader is None

    def enter_layer(self, layer: int, norms: Norms, attend: Attend | None = None) -> list[Tensor]:
        """Begin a layer, counted from 0; return the inputs [T, K] of its first linear."""
        common = {"config": self._config, "norms": norms, "half_cache": False, "attend": attend}
        pruning = [self._pruning(layer, window) for window in range(len(self.hidden))]
        each = zip(drained(self.hidden), pruning, strict=True)
        self._steps = [layer_steps(hidden=hidden, **common, **pruning) for hidden, pruning in each]
        return [next(steps)[1] for steps in self._steps]

    def _pruning(self, layer: int, window: int) -> dict:
        """Return what `layer_steps` is told about positions and rows to drop."""
        if self._pruners is None:
            return {"positions": self._positions}
        pruner = self._pruners[window]
        watch, drop = pruner.in_layer(layer, None)
        if drop is not None and not self._leads:
            # The leader has chosen when it saw queries and keys; it drops its own rows after this.
            watch, drop = None, lambda hidden: hidden[pruner.chosen]
        return {"positions": pruner.positions, "watch": watch, "drop": drop}

    def advance(self, outputs: Iterator[Tensor]) -> list[Tensor]:
        """Give the outputs of a linear; return the inputs of the next, or nothing after the last."""
        inputs = []
        for i, (steps, output) in enumerate(zip(self._steps, outputs, strict=True)):
            try:
                inputs.append(steps.send(output)[1])
            except StopIteration as stop:
                self.hidden[i] = stop.value
        return inputs


def drained(items: list) -> Iterator:
    """Yield the items of a list and forget them in it, so that what is made of them can take their memory."""
    for i in range(len(items)):
        item, items[i] = items[i], None
        yield item
        del item


@torch.inference_mode()
def quantize_layers(
    source: Source,
    scheme: Scheme,
    windows: list[list[int]],
    chunks: Sequence[int] = (),
    watch: Watch | None = None,
    formats: Mapping[tuple[int, str], MixedFormat] | None = None,
    look: Look | None = None,
) -> Iterator[tuple[str, QuantizedLinear]]:
    """Quantize every linear, on inputs that come out of the already quantized ones before it.

    Inputs are rounded as the scheme rounds activations, attention is the scheme's, and tokens are dropped as it says
    (the paper's F_P(X)). GPTQ fits each linear to what the float model gives for the tokens that are left; linears
    that share an input share its Hessian.

    Parameters
    ----------
    source : Source
    scheme : Scheme
    windows : list of lists of int
        Calibration tokens.
    chunks : sequence of int
        For a scheme that prunes: how a window is cut, see `ReferenceModel.prune`; by default it is one chunk.
    watch : callable, optional
        Shown every static quantizer.
    formats : mapping, optional
        Bits and steps of activations, by layer and name of the linear.
    look : callable, optional
        Shown, at the end, the output [T, hidden_size] of the last layer for all windows; for GPTQ the float model's
        as well, else None.

    Yields
    ------
    name : str
        Of the matrix; they come in the order in which they run.
    linear : QuantizedLinear
        With what is calibrated of its input's quantizer, and of the values with quantized attention.
    """
    config = source.config
    states = _Windows(source, windows, _pruners(config, scheme, windows, chunks))
    exact = _Windows(source, windows, leader=states) if scheme.method == "gptq" else None
    for layer in progress(range(config.num_layers), "calibrating", unit="layer"):
        prefix = config.layer_prefix.format(layer=layer)
        norms = read_norms(config, layer, source.tensor)
        attend = Log2Attention(CODE_BOOKS[scheme.attention]) if scheme.attention in CODE_BOOKS else None
        inputs = states.enter_layer(layer, norms, attend)
        wanted = exact.enter_layer(layer, norms) if exact else inputs
        for linear in config.linears:
            names = [prefix + part for part in linear.parts]
            float_operator = float_linear(source, names)
            show = partial(watch, layer, linear.name) if watch else None
            quantizer = _quantizer(inputs, float_operator.weight, linear.name, scheme, show)
            if formats:
                quantizer = replace(quantizer, mixed=formats[layer, linear.name])
            inputs = [quantizer.rounded(x) for x in drained(inputs)]
            if exact:
                parts = _by_gptq(source, names, linear, float_operator, inputs, wanted, scheme)
                wanted = exact.advance(float_operator(x) for x in drained(wanted))
            else:
                parts = tuple(quantize_matrix(source, name, scheme) for name in names)
            parts = tuple(_with_quantizer(*each, quantizer) for each in zip(parts, names, strict=True))
            operator = stacked_weights(parts)
            if attend and linear.name == "qkv":
                attend.value_scales = _value_scales(config, operator, inputs)
                parts = (*parts[:-1], replace(parts[-1], value_scale=attend.value_scales.numpy()))
            yield from zip(names, parts, strict=True)
            inputs = states.advance(operator(x) for x in drained(inputs))
    if look:
        look(states.hidden, exact.hidden if exact else None)


def _pruners(
    config: DecoderConfig, scheme: Scheme, windows: list[list[int]], chunks: Sequence[int]
) -> list[RowPruner] | None:
    if scheme.pruning is None:
        return None
    tokens = len(windows[0])
    positions = attention_positions(config, tokens)
    return [RowPruner(scheme.pruning, chunks or [tokens], positions, tokens) for _ in windows]


def _quantizer(
    inputs: list[Tensor],
    weight: Tensor,
    role: str,
    scheme: Scheme,
    show: Callable[[StaticRefinement], None] | None,
) -> ActivationQuantizer:
    bits = scheme.activation_bits(role)
    group_size = scheme.group_of(weight.shape[1])
    if scheme.activation == "static":
        if scheme.shifts:
            refined = refine_blocks(inputs, scheme.max_refine, bits)
        else:
            refined = refine_static(inputs, group_size, scheme.max_refine, bits)
        if show:
            show(refined)
        return refined.quantizer
    alpha = refine_per_token(inputs, weight, group_size, scheme.max_refine) if scheme.max_refine else None
    return ActivationQuantizer(scheme.activation, group_size, alpha=alpha, bits=bits)


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
    if linear.is_shifted:
        check_totals(name, unpack(linear.qweight, linear.in_features), linear.alpha, quantizer.bits)
        return linear
    for values in grid_of(linear):
        if not np.isfinite((values * np.exp2(linear.alpha, dtype="float32")).astype("float16")).all():
            raise AgqError(f"{name}: scales times 2^{linear.alpha.max()} leave float16's range: lower max_refine")
    return linear


def with_formats(
    config: DecoderConfig,
    linears: Iterable[tuple[str, QuantizedLinear]],
    formats: Mapping[tuple[int, str], MixedFormat],
) -> Iterator[tuple[str, QuantizedLinear]]:
    """Store bits and steps of activations, by layer and name of the linear, with every matrix that reads them."""
    prefixes = [config.layer_prefix.format(layer=layer) for layer in range(config.num_layers)]
    reads = {
        prefix + part: (layer, linear.name)
        for layer, prefix in enumerate(prefixes)
        for linear in config.linears
        for part in linear.parts
    }
    for name, linear in linears:
        yield name, _with_format(linear, formats[reads[name]])


def _with_format(linear: QuantizedLinear, format: MixedFormat) -> QuantizedLinear:
    bits, steps = (values.numpy().astype("uint8") for values in (format.bits, format.steps))
    return replace(linear, act_bits=bits, act_steps=steps)


def _by_gptq(
    source: Source,
    names: list[str],
    linear: Linear,
    exact: FloatLinear,
    inputs: list[Tensor],
    wanted: list[Tensor],
    scheme: Scheme,
) -> tuple[QuantizedLinear, ...]:
    hessian = torch.zeros(linear.in_features, linear.in_features)
    drift = torch.zeros_like(hessian)
    for x, x_float in zip(inputs, wanted, strict=True):
        weighted = x * token_weights(x)
        hessian.addmm_(weighted.T, x)
        drift.addmm_((x_float - x).T, weighted)
    try:
        group_size = scheme.group_of(linear.in_features)
        stacked = gptq(
            exact.weight.numpy(),
            hessian.numpy(),
            group_size,
            scheme.symmetric,
            drift.numpy(),
            scheme.integer_grid,
        )
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
            unit=None if stacked.unit is None else stacked.unit[end - count : end],
        )
        for count, end in zip(rows, ends, strict=True)
    )
