"""Eight-bit activation codes, -127..127 in every mode, in torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

# A row, a group or half a range below this is taken for zeros: the reciprocal of its scale would be infinite.
SMALLEST = 127 * torch.finfo(torch.float32).tiny


def dynamic_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize the last axis with one scale, found from its largest magnitude.

    Parameters
    ----------
    x : float32 tensor [..., n]

    Returns
    -------
    codes : float32 tensor [..., n]
        Integers in -127..127.
    scales : float32 tensor [..., 1]
        ``max|x| / 127``; 1 where all of x is zero.
    """
    largest = x.abs().amax(-1, keepdim=True)
    zero = largest < SMALLEST
    scales = torch.where(zero, 1.0, largest / 127)
    return torch.where(zero, 0.0, torch.round(x * (1 / scales))), scales


def grouped_codes(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Quantize every row in groups of channels, the last one possibly short.

    Parameters
    ----------
    x : float32 tensor [T, K]
    group_size : int

    Returns
    -------
    codes : float32 tensor [T, K]
    scales : float32 tensor [T, G]
    """
    codes, scales = dynamic_codes(to_groups(x, group_size))
    return codes.flatten(1)[:, : x.shape[1]], scales[..., 0]


def static_codes(x: Tensor, scale: float, zero: int) -> Tensor:
    """Quantize with a given scale and zero point: ``x`` is about ``scale * (code - zero)``."""
    inverse = torch.tensor(1.0) / torch.tensor(scale, dtype=torch.float32)
    return torch.clamp(torch.round(x * inverse) + zero, -127, 127)


def static_range(low: float, high: float) -> tuple[float, int]:
    """Return scale and zero point that spread all codes over `low` to `high`, widened to hold 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    span = high - low
    scale = float(torch.tensor(span / 254, dtype=torch.float32)) if span >= 2 * SMALLEST else 1.0
    return scale, max(-127, min(127, round(-127 - low / scale)))


def to_groups(x: Tensor, group_size: int) -> Tensor:
    """Reshape [T, K] to [T, G, group_size], the last group padded with zeros."""
    missing = -x.shape[1] % group_size
    return torch.nn.functional.pad(x, (0, missing)).unflatten(1, (-1, group_size))


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
    """

    mode: str
    group_size: int
    static: tuple[float, int] | None = None

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize rows of activations; not for ``"none"``.

        Parameters
        ----------
        x : float32 tensor [T, K]

        Returns
        -------
        codes : float32 tensor [T, K]
            Integers in -127..127.
        scales : float32 tensor [T, G] for groups, else [T, 1]
        """
        if self.mode == "per-token":
            return dynamic_codes(x)
        if self.mode == "per-token-group":
            return grouped_codes(x, self.group_size)
        scale, zero = self.static
        return static_codes(x, scale, zero), torch.full((len(x), 1), scale)

    def rounded(self, x: Tensor) -> Tensor:
        """Return what the codes of x [T, K] stand for, float32 [T, K]."""
        if self.mode == "none":
            return x
        codes, scales = self.codes(x)
        if self.mode == "static":
            return (codes - self.static[1]) * scales
        if self.mode == "per-token-group":
            scales = scales.repeat_interleave(self.group_size, 1)[:, : x.shape[1]]
        return codes * scales
