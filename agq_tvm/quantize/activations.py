"""Activation codes of 8 bits, -127..127, and of 4 bits, -7..7, in torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from agq_tvm.quantize.grouping import to_groups
from agq_tvm.quantize.mixed import MixedFormat, mixed_codes

# A row, a group or half a range below this is taken for zeros: the reciprocal of its scale would be infinite.
SMALLEST = 127 * torch.finfo(torch.float32).tiny


def code_limit(bits: int) -> int:
    """Return the largest activation code of 8 or 4 bits."""
    return {8: 127, 4: 7}[bits]


def dynamic_codes(x: Tensor, limit: int = 127) -> tuple[Tensor, Tensor]:
    """Quantize the last axis with one scale, found from its largest magnitude.

    Parameters
    ----------
    x : float32 tensor [..., n]
    limit : int
        The largest code.

    Returns
    -------
    codes : float32 tensor [..., n]
        Integers in -limit..limit.
    scales : float32 tensor [..., 1]
        ``max|x| / limit``; 1 where all of x is zero.
    """
    largest = x.abs().amax(-1, keepdim=True)
    zero = largest < SMALLEST
    scales = torch.where(zero, 1.0, largest / limit)
    return torch.where(zero, 0.0, torch.round(x * (1 / scales))), scales


def grouped_codes(x: Tensor, group_size: int, limit: int = 127) -> tuple[Tensor, Tensor]:
    """Quantize every row in groups of channels, the last one possibly short.

    Parameters
    ----------
    x : float32 tensor [T, K]
    group_size : int
    limit : int
        The largest code.

    Returns
    -------
    codes : float32 tensor [T, K]
    scales : float32 tensor [T, G]
    """
    codes, scales = dynamic_codes(to_groups(x, group_size), limit)
    return codes.flatten(1)[:, : x.shape[1]], scales[..., 0]


def static_codes(x: Tensor, scale: float, zero: int, limit: int = 127) -> Tensor:
    """Quantize with a given scale and zero point: ``x`` is about ``scale * (code - zero)``."""
    inverse = torch.tensor(1.0) / torch.tensor(scale, dtype=torch.float32)
    return torch.clamp(torch.round(x * inverse) + zero, -limit, limit)


def static_range(low: float, high: float, limit: int = 127) -> tuple[float, int]:
    """Return scale and zero point that spread all codes over `low` to `high`, widened to hold 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    span = high - low
    scale = float(torch.tensor(span / (2 * limit), dtype=torch.float32)) if span >= 2 * SMALLEST else 1.0
    return scale, max(-limit, min(limit, round(-limit - low / scale)))


@dataclass(frozen=True)
class ActivationQuantizer:
    """How the input of a linear becomes codes.

    Attributes
    ----------
    mode : str
        ``"per-token"``, ``"per-token-group"``, ``"static"`` or ``"none"`` (left as it is).
    group_size : int
        Channels of a group.
    static : pair of float and int, optional
        Scale and zero point, for ``"static"``.
    alpha : tensor of integers [G], optional
        TRIP's exponents (section "TRIP" of the paper, with one exponent for a group of channels): x is divided
        by 2^alpha before it is rounded.
    bits : int
        8 or 4.
    mixed : MixedFormat, optional
        For ``"per-token-group"``: a number of bits for each channel, and zero points.
    """

    mode: str
    group_size: int
    static: tuple[float, int] | None = None
    alpha: Tensor | None = None
    bits: int = 8
    mixed: MixedFormat | None = None

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize rows of activations; not for ``"none"``.

        Parameters
        ----------
        x : float32 tensor [T, K]

        Returns
        -------
        codes : float32 tensor [T, K]
            Integers in -127..127, or -7..7.
        scales : float32 tensor [T, G] for groups, else [T, 1]
            Without the powers of two of `alpha`.
        """
        if self.mixed is not None:
            return mixed_codes(x, self.group_size, self.mixed)
        limit = code_limit(self.bits)
        if self.alpha is not None:
            x = x * self._powers(-self.alpha, x.shape[1])
        if self.mode == "per-token":
            return dynamic_codes(x, limit)
        if self.mode == "per-token-group":
            return grouped_codes(x, self.group_size, limit)
        scale, zero = self.static
        return static_codes(x, scale, zero, limit), torch.full((len(x), 1), scale)

    def rounded(self, x: Tensor) -> Tensor:
        """Return what the codes of x [T, K] stand for, float32 [T, K]."""
        if self.mode == "none":
            return x
        codes, scales = self.codes(x)
        if self.mode == "static":
            codes = codes - self.static[1]
        if self.mode == "per-token-group":
            scales = scales.repeat_interleave(self.group_size, 1)[:, : x.shape[1]]
        if self.alpha is not None:
            scales = scales * self._powers(self.alpha, x.shape[1])
        return codes * scales

    def _powers(self, exponents: Tensor, channels: int) -> Tensor:
        return torch.exp2(exponents.float()).repeat_interleave(self.group_size)[:channels]
