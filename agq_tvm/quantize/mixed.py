"""Activation codes of 4 to 7 bits, a number for every group of channels, in a budget of bits for the whole model.

A group of a token has a scale and a zero point of its own, both found from its values:

    x = s · c,   c = 2^a_k · (q - z),   q in 0..2^b - 1,   z in 0..2^b - 1

b is fixed for a group and a_k for a channel, so neither costs anything at run time: channels that are larger than
their neighbours, for all tokens, have coarser steps instead of a coarser scale for all of the group. What a matrix
product reads is c, an integer in -127..127 since b + a_k <= 7; kernels for 8-bit codes take it as it is.
The scale has 3 fractional bits and 32 exponents, 8 bits in all, and the zero point b.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from agq_tvm.errors import AgqError
from agq_tvm.quantize.grouping import to_groups
from agq_tvm.quantize.mixed_format import (
    BITS,
    FRACTION_MASK,
    LARGEST_SCALE,
    SMALLEST_SCALE,
    WIDTH,
    average_bits,
    bit_costs,
)

_THRESHOLDS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class MixedFormat:
    """Bits and steps at the input of a linear.

    Attributes
    ----------
    bits : int64 tensor [G]
        Of each group's codes, one of `BITS`.
    steps : int64 tensor [K]
        a_k, the exponent of each channel's step, at most `WIDTH` less the bits of its group.
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
        c, integers in -127..127.
    scales : float32 tensor [T, G]
    """
    steps = torch.exp2(format.steps.float())
    codes, scales = _grouped_codes(to_groups(x * (1 / steps), group_size), format.bits)
    return codes.flatten(1)[:, : x.shape[1]] * steps, scales[..., 0]


def _grouped_codes(y: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return q - z [T, G, n] and scales [T, G, 1] of values divided by their steps, [T, G, n]."""
    top = torch.exp2(bits.float())[:, None] - 1
    low, high = y.amin(-1, keepdim=True).clamp(max=0), y.amax(-1, keepdim=True).clamp(min=0)
    scales = rounded_scales((high - low) / top)
    inverse = 1 / scales
    zero = torch.minimum(-torch.round(low * inverse), top)
    q = torch.minimum((torch.round(y * inverse) + zero).clamp(min=0), top)
    return q - zero, scales


def rounded_scales(scales: Tensor) -> Tensor:
    """Round float32 scales up to 8 bits: 3 of the fraction, and exponents -20..11."""
    bits = scales.clamp(SMALLEST_SCALE, LARGEST_SCALE).view(torch.int32)
    return ((bits + FRACTION_MASK) & ~FRACTION_MASK).view(torch.float32)


@dataclass(frozen=True)
class MixedErrors:
    """What the groups of an input would cost.

    Attributes
    ----------
    steps : int64 tensor [K]
        Exponents of the channels' steps at 4 bits; more bits leave less room for them, see `format_of`.
    errors : float64 tensor [4, G]
        Expected loss for each of `BITS`.
    """

    steps: Tensor
    errors: Tensor


def format_of(bits: Tensor, steps: Tensor, group_size: int) -> MixedFormat:
    """Return the format of these bits [G], steps [K] lowered to the room that bits leave."""
    room = (WIDTH - bits).repeat_interleave(group_size)[: len(steps)]
    return MixedFormat(bits, torch.minimum(steps, room))


def mixed_errors(x: Tensor, gradient: Tensor, group_size: int) -> MixedErrors:
    """Choose steps, and estimate by how much each number of bits would raise the loss.

    To second order, and with rounding errors that know nothing of each other, the loss rises by half of the sum of
    squared error times squared gradient (the diagonal of Fisher's matrix). Channels get a step by their size
    relative to the median one of their group; of several such rules each group takes the one of least error.

    Parameters
    ----------
    x : float32 tensor [T, K]
    gradient : float32 tensor [T, K]
        Of the loss, for labels drawn from the model's own distribution.
    group_size : int
    """
    channels, fisher = x.shape[1], to_groups(gradient.square() / 2, group_size)
    groups = fisher.shape[1]

    def error(bits: int, steps: Tensor) -> Tensor:
        format = format_of(torch.full((groups,), bits), steps, group_size)
        codes, scales = mixed_codes(x, group_size, format)
        off = to_groups(codes, group_size) * scales[..., None] - to_groups(x, group_size)
        return (off.square() * fisher).sum((0, 2), dtype=torch.float64)

    chosen = torch.zeros(groups, group_size, dtype=torch.int64)
    least = error(BITS[0], chosen.flatten()[:channels])
    for size in (x.abs().amax(0), x.square().mean(0).sqrt()):
        relative = _relative_size(size, group_size)
        for threshold in _THRESHOLDS:
            steps = (relative - threshold).round().clamp(0, WIDTH - BITS[0]).long()
            found = error(BITS[0], steps.flatten()[:channels])
            chosen = torch.where((found < least)[:, None], steps, chosen)
            least = torch.minimum(found, least)
    steps = chosen.flatten()[:channels]
    return MixedErrors(steps, torch.stack([error(bits, steps) for bits in BITS]))


def allocate(errors: Mapping[object, MixedErrors], group_size: int, budget: float) -> dict[object, MixedFormat]:
    """Spend a budget of bits where it lowers the loss most: one bit after the other, by gain per bit stored.

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
    bits = {key: torch.full((found.errors.shape[1],), BITS[0]) for key, found in errors.items()}
    costs = {key: bit_costs(len(found.steps), group_size) for key, found in errors.items()}
    channels = {key: len(found.steps) for key, found in errors.items()}
    least = average_bits([(bits[key].numpy(), channels[key]) for key in errors], group_size)
    if budget < least:
        raise AgqError(
            f"{budget:g} bits are too few: codes of 4 bits in groups of {group_size} take {least:.3f} already"
        )
    left = (budget - least) * sum(channels.values())
    heap = []

    def offer(key, group: int) -> None:
        level = int(bits[key][group]) - BITS[0]
        if level + 1 < len(BITS):
            gain = errors[key].errors[level, group] - errors[key].errors[level + 1, group]
            heapq.heappush(heap, (-float(gain) / float(costs[key][group]), len(heap), key, group))

    for key, found in errors.items():
        for group in range(found.errors.shape[1]):
            offer(key, group)
    while heap:
        *_, key, group = heapq.heappop(heap)
        if costs[key][group] <= left:
            left -= float(costs[key][group])
            bits[key][group] += 1
            offer(key, group)
    return {key: format_of(bits[key], found.steps, group_size) for key, found in errors.items()}


def _relative_size(size: Tensor, group_size: int) -> Tensor:
    """Return log2 of the sizes [K] relative to the median of their group, [G, n]; 0 where a group is all zeros."""
    padded = torch.nn.functional.pad(size, (0, -len(size) % group_size), value=torch.nan).unflatten(0, (-1, group_size))
    median = padded.nanmedian(-1, keepdim=True)[0]
    return torch.log2(padded / median).nan_to_num(0, 2 * WIDTH, -2 * WIDTH)
