"""What activation codes of 4 to 7 bits are, and how many bits they take: numbers that kernels and checkpoints share."""

from collections.abc import Iterable

import numpy as np

BITS = (4, 5, 6, 7)
"""Of a channel's codes."""
WIDTH = max(BITS)
"""Bits and exponent of a channel's step together are at most this, so that codes stay in -127..127."""
ZERO_BITS = min(BITS)
"""Of the zero point of a token's group."""
SCALE_BITS = 8
"""Of the scale of a token's group: 3 of the fraction, and 32 exponents."""
TOP = 2.0**ZERO_BITS - 1
"""Scales that fit between the smallest and the largest value of a group, each divided by the width of its channel."""
SMALLEST_SCALE = 2.0**-20
LARGEST_SCALE = 1.875 * 2.0**11
FRACTION_MASK = 0x000FFFFF
"""What a scale does not keep of the fraction of a float32."""


def average_bits(inputs: Iterable[np.ndarray], group_size: int) -> float:
    """Return the bits of an activation, scales and zero points included.

    Parameters
    ----------
    inputs : iterable of integer arrays [K]
        For each input of the model's linears, the bits of every channel's codes.
    group_size : int
    """
    stored = total = 0
    for bits in inputs:
        stored += int(bits.sum(dtype="int64")) + (SCALE_BITS + ZERO_BITS) * -(-len(bits) // group_size)
        total += len(bits)
    return stored / total


def widths(bits, steps):
    """Return the exponents of channels' widths, 2^exponent times `TOP` scales, from integer arrays or tensors [K]."""
    return bits + steps - ZERO_BITS


def is_valid(bits: np.ndarray, steps: np.ndarray) -> bool:
    """Tell whether bits [K] are among `BITS` and leave room for the exponents of steps [K]."""
    return bool(bits.min() >= min(BITS) and (bits.astype("int64") + steps <= WIDTH).all())
