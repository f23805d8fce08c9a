"""What computes a linear in the torch reference: on float weights, or on integer activation codes."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from agq_tvm.quantize.activations import ActivationQuantizer
from agq_tvm.quantize.checkpoint import QuantizedLinear
from agq_tvm.quantize.grouping import to_groups
from agq_tvm.quantize.mixed import MixedFormat
from agq_tvm.quantize.shifts import BLOCK, block_shifts, channel_order
from agq_tvm.quantize.source import Source
from agq_tvm.quantize.tensor_names import TABLE_GROUP
from agq_tvm.quantize.weights import codes_of, dequantize, grid_of

_LARGEST_PRODUCT = 127 * 15
TERMS = {4: 1, 8: 2}
"""Of the activations that tables of so many bits multiply: an error there is softened by nothing after it, but next to
that of 4-bit weights it does not show."""


class Operator(Protocol):
    """A linear: float32 [T, K] to float32 [T, N]."""

    def __call__(self, x: Tensor) -> Tensor: ...


class FloatLinear:
    """``y = x Wᵀ + bias`` in float32.

    Parameters
    ----------
    weight : float32 tensor [N, K]
    bias : float32 tensor [N], optional
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply float32 [T, K] to float32 [T, N]."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


class QuantizedOperator:
    """The linears that share an input, stacked along N, on integer activation codes.

    Calling it multiplies the dequantized codes: equal to the contract but for the rounding of float32 sums.
    `exact` does the contract's own sum, with the integer dot product of every group.

    Parameters
    ----------
    parts : tuple of QuantizedLinear
    activation : str
        ``"per-token"``, ``"per-token-group"`` or ``"static"``.
    bits : int
        Of activation codes, 8 or 4.
    """

    def __init__(self, parts: tuple[QuantizedLinear, ...], activation: str, bits: int = 8) -> None:
        self._parts = parts
        self._float = stacked_weights(parts)
        self._quantizer = _quantizer(parts, activation, bits)

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply float32 [T, K] to float32 [T, N]."""
        return self._float(self._quantizer.rounded(x))

    def exact(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Multiply float32 [T, K] as the contract says.

        Returns
        -------
        y : float32 tensor [T, N]
        codes : int8 tensor [T, K]
        scales : float32 tensor [T, GA]
            GA is 1 or G.
        sums : int32 tensor [T, G, N]
            ``sum over the group of activation code * weight code``.
        """
        codes, scales = self._quantizer.codes(x)
        group_size = self._quantizer.group_size
        q, s, o = self._grid()
        wide = torch.float32 if group_size * _LARGEST_PRODUCT < 1 << 24 else torch.float64
        grouped = to_groups(codes, group_size).transpose(0, 1).to(wide)  # [G, T, g]
        sums = grouped @ to_groups(q, group_size).permute(1, 2, 0).to(wide)  # exact
        per_group = s.T[:, None] * sums + o.T[:, None] * grouped.sum(-1, keepdim=True)  # [G, T, N]
        y = (scales.T[..., None] * per_group).sum(0).float() + self._constant(q, s, o)
        return y, codes.to(torch.int8), scales, sums.transpose(0, 1).to(torch.int32)

    def _grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes [N, K], scales [N, G] and offsets [N, G] in float32, TRIP's powers of two included."""
        q, s, o = _stacked_grid(self._parts)
        if self._quantizer.alpha is None:
            return q, s, o
        powers = torch.exp2(self._quantizer.alpha.float())
        return q, s * powers, o * powers

    def _constant(self, q: Tensor, s: Tensor, o: Tensor) -> Tensor | float:
        constant = 0.0 if self._float.bias is None else self._float.bias
        if self._quantizer.static is None:
            return constant
        (scale, zero), group_size = self._quantizer.static, self._quantizer.group_size
        counts = to_groups(torch.ones(1, q.shape[1]), group_size).sum(-1)
        weights = (s * to_groups(q, group_size).sum(-1) + o * counts).sum(-1)
        return constant - scale * zero * weights


class ShiftedOperator(QuantizedOperator):
    """The same for exponents of channels: `exact` shifts an integer accumulator, see `agq_tvm.quantize.shifts`.

    Parameters
    ----------
    parts : tuple of QuantizedLinear
    bits : int
        Of activation codes, 8 or 4.
    """

    def __init__(self, parts: tuple[QuantizedLinear, ...], bits: int = 8) -> None:
        super().__init__(parts, "static", bits)

    def exact(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Multiply float32 [T, K] with one integer accumulator for each result.

        Returns
        -------
        y : float32 tensor [T, N]
        codes : int8 tensor [T, K]
            In the model's order of channels.
        scales : float32 tensor [T, 1]
        totals : int32 tensor [T, 1, N]
            ``sum of activation code * weight code * 2^alpha``.
        """
        codes, scales = self._quantizer.codes(x)
        q, s, o = _stacked_grid(self._parts)
        alpha = self._parts[0].alpha
        order = torch.from_numpy(channel_order(alpha)).long()
        totals = torch.zeros(len(x), len(q), dtype=torch.int64)
        sums = torch.zeros(len(x), 1, dtype=torch.int64)
        blocks = (tensor[:, order].split(BLOCK, 1) for tensor in (codes, q))
        for shift, x_block, q_block in zip(block_shifts(alpha).tolist(), *blocks, strict=True):
            totals = (totals << shift) + (x_block @ q_block.T).long()  # products below 2^24: exact
            sums = (sums << shift) + x_block.sum(1, keepdim=True).long()
        (scale, zero), powers = self._quantizer.static, torch.from_numpy(np.exp2(alpha, dtype="float32"))
        constant = 0.0 if self._float.bias is None else self._float.bias
        constant = constant - scale * zero * (s[:, 0] * (q @ powers) + o[:, 0] * powers.sum())
        y = scales * (s.T * totals + o.T * sums) + constant
        return y, codes.to(torch.int8), scales, totals[:, None].to(torch.int32)


class TableOperator:
    """A matrix outside the layers (head or projection), its input quantized per token and group of 32.

    With two terms, what the first leaves over is quantized again, so 8-bit products carry about 15 bits.

    Parameters
    ----------
    weight : float32 tensor [N, K]
        The dequantized table.
    terms : int
        1 or 2.
    """

    def __init__(self, weight: Tensor, terms: int) -> None:
        self._weight, self._terms = weight, terms

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply float32 [T, K] to float32 [T, N]."""
        quantizer = ActivationQuantizer("per-token-group", TABLE_GROUP)
        first = quantizer.rounded(x)
        return (first if self._terms == 1 else first + quantizer.rounded(x - first)) @ self._weight.T


def float_linear(source: Source, names: list[str]) -> FloatLinear:
    """Return the modules `names`, which share an input, stacked along N, as the model has them."""
    weight = torch.cat([torch.from_numpy(source.tensor(f"{name}.weight")) for name in names])
    biases = [source.bias(name) for name in names]
    return FloatLinear(weight, None if biases[0] is None else torch.from_numpy(np.concatenate(biases)))


def stacked_weights(parts: tuple[QuantizedLinear, ...]) -> FloatLinear:
    """Dequantize linears that share an input and stack them along N."""
    weight = torch.from_numpy(np.concatenate([dequantize(part) for part in parts]))
    if all(part.bias is None for part in parts):
        return FloatLinear(weight)
    biases = [np.zeros(len(part.qweight), "float32") if part.bias is None else part.bias for part in parts]
    return FloatLinear(weight, torch.from_numpy(np.concatenate(biases)))


def _stacked_grid(parts: tuple[QuantizedLinear, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [N, K], scales [N, G] and offsets [N, G] of stacked linears in float32."""
    codes = [codes_of(part).astype("float32") for part in parts]
    grids = [grid_of(part) for part in parts]
    stacks = (codes, [s for s, _ in grids], [o for _, o in grids])
    return tuple(torch.from_numpy(np.concatenate(stack)) for stack in stacks)


def _quantizer(parts: tuple[QuantizedLinear, ...], activation: str, bits: int) -> ActivationQuantizer:
    """Return the quantizer of the input that some linears share."""
    first, static = parts[0], None
    if activation == "static":
        static = float(first.act_scale[0]), int(first.act_zero[0])
    alpha = None if first.alpha is None else torch.from_numpy(first.alpha.astype("int32"))
    mixed = None
    if first.act_bits is not None and activation == "per-token-group":
        values = (torch.from_numpy(array.astype("int64")) for array in (first.act_bits, first.act_steps))
        mixed = MixedFormat(*values)
    group_size = 1 if first.is_shifted else first.group_size
    return ActivationQuantizer(activation, group_size, static, alpha, bits, mixed)
