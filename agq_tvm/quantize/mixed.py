"""Activation codes of 4 to 7 bits, a number for every channel, in a budget of bits for the whole model.

A group of a token has a scale s and a zero point z of its own, both found from its values. Channel k has b_k bits and
a step of 2^a_k scales, which are the same for all tokens and cost nothing at run time:

    x = s · c,   c = 2^a_k · q,   q in -2^e z..2^e (15 - z) with e = b_k - 4,   z in 0..15

The channel so reaches 15 · 2^w scales, w = a_k + e: channels that are larger than their neighbours, for all tokens,
are wider instead of making the scale coarser for all of the group, and those that matter have finer steps. What a
matrix product reads is c, an integer within -120..120 since w is at most 3; kernels for 8-bit codes take it as it is.
The scale has 3 fractional bits and 32 exponents, 8 bits in all, and the zero point 4.
"""

import heapq
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agq_tvm.errors import AgqError
from agq_tvm.quantize.grouping import to_groups
from agq_tvm.quantize.mixed_format import (
    BITS,
    FRACTION_MASK,
    LARGEST_SCALE,
    SMALLEST_SCALE,
    TOP,
    WIDTH,
    ZERO_BITS,
    average_bits,
    widths,
)

_WIDEST = WIDTH - ZERO_BITS
_THRESHOLDS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class MixedFormat:
    """Bits and steps at the input of a linear.

    Attributes
    ----------
    bits : int64 tensor [K]
        b_k, of each channel's codes, one of `BITS`.
    steps : int64 tensor [K]
        a_k, the exponent of each channel's step, at most `WIDTH` less its bits.
    """

    bits: Tensor
    steps: Tensor


def mixed_codes(x: Tensor, group_size: int, format: MixedFormat) -> tuple[Tensor, Tensor]:
    """Quantize rows of activations.

    Parameters
    ----------
    x : float32 tensor [T, K]
    group_size : int
    format : MixedFormat

    Returns
    -------
    codes : float32 tensor [T, K]
        c, integers in -120..120.
    scales : float32 tensor [T, G]
    """
    exponents = widths(format.bits, format.steps), format.bits - BITS[0], format.steps
    width, extra, step = (torch.exp2(each.float()) for each in exponents)
    y = x * (1 / width)
    scales, zero = _grids(to_groups(y, group_size))
    inverse, zero = (_spread(values, group_size, x.shape[1]) for values in (1 / scales, zero))
    q = torch.round(y * inverse * extra)
    return torch.minimum(torch.maximum(q, -zero * extra), (TOP - zero) * extra) * step, scales


def _grids(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and zero points [T, G] of values divided by their widths, [T, G, n]."""
    low, high = y.amin(-1).clamp(max=0), y.amax(-1).clamp(min=0)
    scales = rounded_scales((high - low) / TOP)
    return scales, (-torch.round(low * (1 / scales))).clamp(max=TOP)


def rounded_scales(scales: Tensor) -> Tensor:
    """Round float32 scales up to 8 bits: 3 of the fraction, and exponents -20..11."""
    bits = scales.clamp(SMALLEST_SCALE, LARGEST_SCALE).view(torch.int32)
    return ((bits + FRACTION_MASK) & ~FRACTION_MASK).view(torch.float32)


def _spread(per_group: Tensor, group_size: int, channels: int) -> Tensor:
    return per_group.repeat_interleave(group_size, 1)[:, :channels]


@dataclass(frozen=True)
class MixedErrors:
    """What the channels of an input cost.

    Attributes
    ----------
    widths : int64 tensor [K]
        Exponents of the channels' widths relative to each other.
    errors : float64 tensor [K]
        Expected rise of the loss with codes of 4 bits.
    """

    widths: Tensor
    errors: Tensor


def mixed_errors(x: Tensor, gradient: Tensor, group_size: int) -> MixedErrors:
    """Choose widths, and estimate by how much codes of 4 bits would raise the loss.

    To second order, and with rounding errors that know nothing of each other, the loss rises by half of the sum of
    squared error times squared gradient (the diagonal of Fisher's matrix). Channels get a width by their size
    relative to the median one of their group; of several such rules each group takes the one of least error.

    Parameters
    ----------
    x : float32 tensor [T, K]
    gradient : float32 tensor [T, K]
        Of the loss, for labels drawn from the model's own distribution.
    group_size : int
    """
    channels, fisher = x.shape[1], gradient.square() / 2
    four = torch.full((channels,), BITS[0])

    def error(wide: Tensor) -> Tensor:
        codes, scales = mixed_codes(x, group_size, MixedFormat(four, wide))
        off = codes * _spread(scales, group_size, channels) - x
        return (off.square() * fisher).sum(0, dtype=torch.float64)

    def grouped(values: Tensor) -> Tensor:
        return to_groups(values[None], group_size)[0]

    chosen = torch.zeros(channels, dtype=torch.int64)
    least = error(chosen)
    for size in (x.abs().amax(0), x.square().mean(0).sqrt()):
        relative = _relative_size(size, group_size)
        for threshold in _THRESHOLDS:
            wide = (relative - threshold).round().clamp(0, _WIDEST).long().flatten()[:channels]
            found = error(wide)
            better = grouped(found).sum(-1, keepdim=True) < grouped(least).sum(-1, keepdim=True)
            better = better.expand(-1, group_size).flatten()[:channels]
            chosen, least = torch.where(better, wide, chosen), torch.where(better, found, least)
    return MixedErrors(chosen, least)


def _relative_size(size: Tensor, group_size: int) -> Tensor:
    """Return log2 of the sizes [K] relative to the median of their group, [G, n]; 0 where a group is all zeros."""
    padded = torch.nn.functional.pad(size, (0, -len(size) % group_size), value=torch.nan).unflatten(0, (-1, group_size))
    median = padded.nanmedian(-1, keepdim=True)[0]
    return torch.log2(padded / median).nan_to_num(0, 2 * WIDTH, -2 * WIDTH)


def allocate(errors: Mapping[Hashable, MixedErrors], group_size: int, budget: float) -> dict[Hashable, MixedFormat]:
    """Spend a budget of bits where it lowers the loss most, one bit of one channel after the other.

    A bit more makes a channel's error a quarter. It needs room below the step: the widths of the other channels of
    its group grow, and where one would grow too wide the bit goes elsewhere.

    Parameters
    ----------
    errors : mapping
        By input of the model's linears.
    group_size : int
    budget : float
        Average bits of an activation, see `average_bits`.

    Raises
    ------
    AgqError
        If the budget is less than 4-bit codes take.
    """
    wide = {key: found.widths.numpy() for key, found in errors.items()}
    extra = {key: np.zeros(len(values), "int64") for key, values in wide.items()}
    least = average_bits([values + BITS[0] for values in extra.values()], group_size)
    if budget < least:
        raise AgqError(f"{budget:g} bits are too few: codes of 4 bits and their scales take {least:.3f}, ask for more")
    left = int((budget - least) * sum(map(len, extra.values())) + 1e-6)
    heap = [(-float(e), i, key, k) for i, (key, found) in enumerate(errors.items()) for k, e in enumerate(found.errors)]
    heapq.heapify(heap)
    while heap and left:
        error, order, key, k = heapq.heappop(heap)
        group = slice(k // group_size * group_size, (k // group_size + 1) * group_size)
        extra[key][k] += 1
        if wide[key][group].max() + _shift(wide[key][group], extra[key][group]) > _WIDEST:
            extra[key][k] -= 1
            continue
        left -= 1
        heapq.heappush(heap, (error / 4, order, key, k))
    return {key: _format(wide[key], extra[key], group_size) for key in errors}


def _shift(wide: np.ndarray, extra: np.ndarray) -> int:
    """Return by how much all widths of a group grow, so that every step is a whole number of scales."""
    return max(int((extra - wide).max()), 0)


def _format(wide: np.ndarray, extra: np.ndarray, group_size: int) -> MixedFormat:
    starts = range(0, len(wide), group_size)
    shifts = [_shift(wide[start : start + group_size], extra[start : start + group_size]) for start in starts]
    steps = wide + np.repeat(shifts, group_size)[: len(wide)] - extra
    return MixedFormat(torch.from_numpy(extra + BITS[0]), torch.from_numpy(steps))
