"""TRIP: powers of two that bring groups of channels to one activation scale (Agile-Quant, section "TRIP").

Activations of group g are divided by 2^alpha[g] before they are rounded, and the group's weight scale is multiplied
by it: exact, and free in the inner loop of a kernel. The paper has an exponent for each channel; here a weight group
has one, so that integer sums of a group stay what they are. The paper's own form is here, too: see `refine_blocks`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from agq_tvm.quantize.activations import ActivationQuantizer, code_limit, static_codes, static_range
from agq_tvm.quantize.grouping import to_groups
from agq_tvm.quantize.shifts import BLOCK, channel_order

_SAMPLED_TOKENS = 4096
_SWEEPS = 8


@dataclass(frozen=True)
class StaticRefinement:
    """A static quantizer and what it does to the values it was made for.

    Attributes
    ----------
    quantizer : ActivationQuantizer
    clipped : float32 tensor [K]
        Share of every channel's values that no code reaches.
    """

    quantizer: ActivationQuantizer
    clipped: Tensor


def refine_static(inputs: list[Tensor], group_size: int, max_refine: int, bits: int) -> StaticRefinement:
    """Choose scale, zero point and exponents of a static quantizer (the paper's TRIP).

    The scale is that of the whole range divided by 2^max_refine, so exponent `max_refine` reaches every value and
    smaller ones round more finely. Each group takes the exponent of least squared error over all inputs; of equal
    ones the smaller.

    Parameters
    ----------
    inputs : list of float32 tensors [T, K]
    group_size : int
    max_refine : int
        0 gives the plain static quantizer, its exponents left out.
    bits : int
        Of the codes, 8 or 4.
    """
    scale, zero, errors = _static_errors(inputs, max_refine, bits)
    chosen = to_groups(errors, group_size).sum(-1).argmin(0)  # [G]
    alpha = chosen if max_refine else None
    quantizer = ActivationQuantizer("static", group_size, (scale, zero), alpha, bits)
    steps = scale * torch.exp2(chosen.float()).repeat_interleave(group_size)[: errors.shape[1]]
    return StaticRefinement(quantizer, _clipped(inputs, steps, zero, code_limit(bits)))


def refine_blocks(inputs: list[Tensor], max_refine: int, bits: int) -> StaticRefinement:
    """Choose scale, zero point and an exponent for each channel, such that blocks of channels have one exponent.

    Every channel would have the exponent of its least squared error, as in the paper. Ordered by that, channels are
    cut into blocks, and blocks take falling exponents of the least error possible. They are counted from the last
    one's, which makes it 0 and the scale its step.

    Parameters
    ----------
    inputs : list of float32 tensors [T, K]
    max_refine : int
        1 or more.
    bits : int
        Of the codes, 8 or 4.

    Returns
    -------
    StaticRefinement
        With exponents [K], groups of one channel.
    """
    scale, zero, errors = _static_errors(inputs, max_refine, bits)
    order = torch.from_numpy(channel_order(errors.argmin(0).numpy())).long()
    falling = _falling_exponents(to_groups(errors[:, order], BLOCK).sum(-1))
    alpha = torch.empty(len(order), dtype=torch.long)
    alpha[order] = falling.repeat_interleave(BLOCK)[: len(order)]
    steps = scale * torch.exp2(alpha.float())
    quantizer = ActivationQuantizer("static", 1, (scale * 2 ** int(alpha.min()), zero), alpha - alpha.min(), bits)
    return StaticRefinement(quantizer, _clipped(inputs, steps, zero, code_limit(bits)))


def _static_errors(inputs: list[Tensor], max_refine: int, bits: int) -> tuple[float, int, Tensor]:
    """Return the finest scale, the zero point, and the squared errors of every channel by exponent, float64 [A, K]."""
    limit = code_limit(bits)
    low, high = min(float(x.min()) for x in inputs), max(float(x.max()) for x in inputs)
    full, zero = static_range(low, high, limit)
    scale = full / 2**max_refine
    errors = torch.zeros(max_refine + 1, inputs[0].shape[1], dtype=torch.float64)
    for alpha in range(max_refine + 1):
        step = scale * 2**alpha
        for x in inputs:
            codes = static_codes(x, step, zero, limit)
            errors[alpha] += ((codes - zero) * step - x).square().sum(0, dtype=torch.float64)
    return scale, zero, errors


def _falling_exponents(errors: Tensor) -> Tensor:
    """Return exponents that never rise from one block to the next and have the least sum of errors.

    Parameters
    ----------
    errors : float64 tensor [A, B]
        Of every block, by exponent.

    Returns
    -------
    int64 tensor [B]
    """
    best = [errors[:, 0]]  # of blocks 0..b, the last of which has the exponent
    for b in range(1, errors.shape[1]):
        from_above = best[-1].flip(0).cummin(0).values.flip(0)
        best.append(errors[:, b] + from_above)
    exponents, lowest = [], 0
    for sums in reversed(best):
        lowest += int(sums[lowest:].argmin())
        exponents.append(lowest)
    return torch.tensor(exponents[::-1])


def _clipped(inputs: list[Tensor], steps: Tensor, zero: int, limit: int) -> Tensor:
    """Return the share of every channel's values that no code reaches, float32 [K], for the steps of channels."""
    beyond = sum(((x / steps + zero).abs() > limit + 0.5).sum(0) for x in inputs)
    return beyond / sum(len(x) for x in inputs)


def refine_per_token(inputs: list[Tensor], weight: Tensor, group_size: int, max_refine: int) -> Tensor:
    """Choose exponents for scales of tokens.

    A token's scale is proportional to its largest divided value, and rounding errors of a group to that scale
    times 2^alpha: exponents that bring groups to a like size shrink the scale, but large ones make their own
    group coarse. The sum over tokens of the expected squared error of the outputs, each token counted by the
    inverse of its mean square, is lowered one exponent at a time.

    Parameters
    ----------
    inputs : list of float32 tensors [T, K]
    weight : float32 tensor [N, K]
        What reads them.
    group_size : int
    max_refine : int

    Returns
    -------
    int64 tensor [G]
    """
    x = torch.cat(inputs)
    x = x[:: -(-len(x) // _SAMPLED_TOKENS)]
    tiny = torch.finfo(torch.float32).tiny
    size = x.square().mean(-1, keepdim=True).sqrt().clamp_min(tiny)
    largest = to_groups(x, group_size).abs().amax(-1) / size  # [T, G]
    gain = to_groups(weight, group_size).square().sum((0, 2), dtype=torch.float64)  # [G]
    typical = largest.square().mean(0).sqrt().clamp_min(tiny)
    sized = torch.log2(typical / typical.min()).round().clamp(max=max_refine).long()
    candidates = [_descend(largest, gain, start, max_refine) for start in (torch.zeros_like(sized), sized)]
    alpha = min(candidates, key=lambda candidate: _error(largest, gain, candidate))
    return alpha - alpha.min()


def _error(largest: Tensor, gain: Tensor, alpha: Tensor) -> float:
    """Return the expected squared error, up to a factor."""
    scales = (largest * torch.exp2(-alpha.float())).amax(1)
    return float(scales.square().sum(dtype=torch.float64) * (gain * torch.exp2(2.0 * alpha)).sum())


def _descend(largest: Tensor, gain: Tensor, alpha: Tensor, max_refine: int) -> Tensor:
    """Give one group after the other its best exponent, the others left as they are, until nothing changes."""
    for _ in range(_SWEEPS):
        before = alpha.clone()
        for group in range(len(alpha)):
            others = torch.arange(len(alpha)) != group
            rest = torch.zeros(len(largest))
            if others.any():
                rest = (largest[:, others] * torch.exp2(-alpha[others].float())).amax(1)
            coarse = (gain[others] * torch.exp2(2.0 * alpha[others])).sum()
            errors = [
                torch.maximum(rest, largest[:, group] * 2.0**-exponent).square().sum(dtype=torch.float64)
                * (coarse + gain[group] * 4.0**exponent)
                for exponent in range(max_refine + 1)
            ]
            alpha[group] = int(torch.stack(errors).argmin())
        if torch.equal(alpha, before):
            break
    return alpha
