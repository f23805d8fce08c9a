"""What activation codes of 4 to 7 bits are, and how many bits they take: numbers that kernels and checkpoints share."""

from collections.abc import Iterable

import numpy as np

BITS = (4, 5, 6, 7)
"""Of the codes of a group."""
WIDTH = max(BITS)
"""Bits and exponent of a channel's step together are at most this, so that codes stay in -127..127."""
SCALE_BITS = 8
"""Of the scale of a token's group: 3 of the fraction, and 32 exponents."""
SMALLEST_SCALE = 2.0**-20
LARGEST_SCALE = 1.875 * 2.0**11
FRACTION_MASK = 0x000FFFFF
"""What a scale does not keep of the fraction of a float32."""


def average_bits(inputs: Iterable[tuple[np.ndarray, int]], group_size: int) -> float:
    """Return the bits of an activation, scales and zero points included.

    Parameters
    ----------
    inputs : iterable of (integer array [G], int)
        For each input of the model's linears, the bits of every group's codes, and K.
    group_size : int
    """
    stored = total = 0
    for bits, channels in inputs:
        stored += int((bit_costs(channels, group_size) * bits).sum()) + SCALE_BITS * len(bits)
        total += channels
    return stored / total


def bit_costs(channels: int, group_size: int) -> np.ndarray:
    """Return what each bit of a group's codes takes, int64 [G]: one for each channel and one for the zero point."""
    starts = np.arange(0, channels, group_size)
    return np.minimum(group_size, channels - starts) + 1


def is_valid(bits: np.ndarray, steps: np.ndarray, group_size: int) -> bool:
    """Tell whether bits [G] are among `BITS` and leave room for the exponents of steps [K]."""
    room = WIDTH - np.repeat(bits.astype("int64"), group_size)[: len(steps)]
    return bool(bits.min() >= min(BITS) and (steps <= room).all())
