"""A simulation of what the code that Agile-Quant's authors published does, to compare with; nothing compiles it.

It is not what the paper says. The input of every linear has a static scale for each channel, found by minima and
maxima, which does not factor out of an integer product: values are rounded and multiplied in float. Queries, keys and
values have a static scale for each head and are rounded before their rotation, keys and values so as they are cached.
The softmax is computed in float and rounded to 2^0 … 2^-15 or zero. Scales are calibrated with activations in float.
Embedding, head, norms and residuals stay float. Weights are those of a checkpoint; the authors' come from GPTQ with
columns in the order of their activations, which ours does not have.
"""

import torch
from torch import Tensor

from agq_tvm.errors import AgqError
from agq_tvm.models.decoder import DecoderConfig
from agq_tvm.progress import progress
from agq_tvm.quantize.checkpoint import Checkpoint
from agq_tvm.quantize.forward import read_norms
from agq_tvm.quantize.operators import FloatLinear, stacked_weights
from agq_tvm.quantize.reference import Layer, ReferenceModel
from agq_tvm.quantize.source import Source

_LARGEST_CODE = 15


class _Ranges:
    """The largest magnitudes of a linear's input channels, [K], and of the heads that it makes, [heads]."""

    def __init__(self) -> None:
        self.channels = torch.zeros(())
        self.heads = torch.zeros(())


class _Linear:
    """A linear that looks at ranges, or rounds to them.

    Parameters
    ----------
    multiply : FloatLinear
    ranges : _Ranges
    rounds : bool
        Round; otherwise widen `ranges` to what passes.
    head_dim : int
        Channels of a head, for the linear that makes heads; 0 for others.
    """

    def __init__(self, multiply: FloatLinear, ranges: _Ranges, rounds: bool, head_dim: int) -> None:
        self._multiply, self._ranges, self._rounds, self._head_dim = multiply, ranges, rounds, head_dim

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply float32 [T, K] to float32 [T, N]."""
        ranges = self._ranges
        if self._rounds:
            x = round_to_range(x, ranges.channels)
        else:
            ranges.channels = torch.maximum(ranges.channels, x.abs().amax(0))
        y = self._multiply(x)
        if not self._head_dim:
            return y
        heads = y.unflatten(1, (-1, self._head_dim))
        if self._rounds:
            return round_to_range(heads, ranges.heads[:, None]).flatten(1)
        ranges.heads = torch.maximum(ranges.heads, heads.abs().amax((0, 2)))
        return y


def round_to_range(x: Tensor, largest: Tensor) -> Tensor:
    """Round to 8-bit codes -128..127 and back; `largest` broadcasts, and what is always zero stays as it is.

    The scale, ``largest / 127.5``, spreads 256 codes over the whole range, so the largest value itself is clipped.
    """
    scale = torch.where(largest > 0, largest / 127.5, 1.0)
    return torch.clamp(torch.round(x / scale), -128, 127) * scale


def round_probabilities(p: Tensor) -> Tensor:
    """Round probabilities to 2^-c, c = round(-log2 p) in 0..15; smaller ones become 0."""
    code = torch.round(-torch.log2(p))
    return torch.where(code > _LARGEST_CODE, 0.0, torch.exp2(-code.clamp(0, _LARGEST_CODE)))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attend with rounded probabilities, which are not normalized again; see `agq_tvm.quantize.forward.Attend`."""
    shared = len(q) // len(k)
    scores = q @ k.repeat_interleave(shared, 0).mT * q.shape[-1] ** -0.5
    if bias is None:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1) > 0, -torch.inf)
    else:
        scores = scores + bias
    return round_probabilities(scores.softmax(-1)) @ v.repeat_interleave(shared, 0)


def release_model(source: Source, checkpoint: Checkpoint, windows: list[list[int]]) -> ReferenceModel:
    """Simulate the published code on a checkpoint's weights.

    Parameters
    ----------
    source : Source
        The float model, whose embedding, head and norms are used.
    checkpoint : Checkpoint
        Of the same model, best with 4-bit GPTQ weights and float activations: the authors calibrate GPTQ on those.
    windows : list of lists of int
        Calibration tokens; the authors take 10 sequences.

    Raises
    ------
    AgqError
        If the checkpoint is of another model.
    """
    if checkpoint.config != source.config:
        raise AgqError(f"{checkpoint.path} is not a checkpoint of {source.label}: quantize that model")
    config = source.config
    ranges = {(layer, linear.name): _Ranges() for layer in range(config.num_layers) for linear in config.linears}
    watching = ReferenceModel.from_source(source, lambda layer: _layer(source, checkpoint, layer, ranges, False))
    for window in progress(windows, "calibrating", unit="window"):
        watching.logits(window)
    return ReferenceModel.from_source(source, lambda layer: _layer(source, checkpoint, layer, ranges, True))


def _layer(source: Source, checkpoint: Checkpoint, layer: int, ranges: dict, rounds: bool) -> Layer:
    config: DecoderConfig = source.config
    linears = {
        linear.name: _Linear(
            stacked_weights(checkpoint.fused(layer, linear.parts)),
            ranges[layer, linear.name],
            rounds,
            config.head_dim if linear.name == "qkv" else 0,
        )
        for linear in config.linears
    }
    return Layer(read_norms(config, layer, source.tensor), linears, attend if rounds else None)
