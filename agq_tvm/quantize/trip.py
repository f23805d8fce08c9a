"""TRIP: powers of two that bring groups of channels to one activation scale (Agile-Quant, section "TRIP").

Activations of group g are divided by 2^alpha[g] before they are rounded, and the group's weight scale is multiplied
by it: exact, and free in the inner loop of a kernel. The paper has an exponent for each channel; here a weight group
has one, so that integer sums of a group stay what they are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from agq_tvm.quantize.activations import ActivationQuantizer, code_limit, static_codes, static_range
from agq_tvm.quantize.grouping import to_groups

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
    limit, channels = code_limit(bits), inputs[0].shape[1]
    low, high = min(float(x.min()) for x in inputs), max(float(x.max()) for x in inputs)
    full, zero = static_range(low, high, limit)
    scale = full / 2**max_refine
    errors = torch.zeros(max_refine + 1, channels, dtype=torch.float64)
    for alpha in range(max_refine + 1):
        step = scale * 2**alpha
        for x in inputs:
            codes = static_codes(x, step, zero, limit)
            errors[alpha] += ((codes - zero) * step - x).square().sum(0, dtype=torch.float64)
    chosen = to_groups(errors, group_size).sum(-1).argmin(0)  # [G]
    steps = scale * torch.exp2(chosen.float()).repeat_interleave(group_size)[:channels]
    clipped = sum(((x / steps + zero).abs() > limit + 0.5).sum(0) for x in inputs) / sum(len(x) for x in inputs)
    alpha = chosen if max_refine else None
    return StaticRefinement(ActivationQuantizer("static", group_size, (scale, zero), alpha, bits), clipped)


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
