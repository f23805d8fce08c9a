"""TRIP in the paper's integer-only form: exponents of channels become shifts of an accumulator.

Channels stand in falling order of their exponents, cut into blocks that have one exponent each. With the difference
d between a block's exponent and the one before,

    total = (total << d) + Σ_{k in block} q_x[k] · q_w[k]          =  Σ_k 2^alpha[k] · q_x[k] · q_w[k] in the end,

because the last exponent is 0. What a shift multiplies must fit: the largest |total| that any activations can give
is checked against an int32, for the weights and exponents as they are.
"""

import numpy as np

from agq_tvm.errors import AgqError

BLOCK = 32
"""Channels of one exponent: a k-block of the kernels."""
INT32_LARGEST = (1 << 31) - 1
_LARGEST_CODE = 15
_ACTIVATION_LIMIT = {8: 127, 4: 7}


def channel_order(alpha: np.ndarray) -> np.ndarray:
    """Return the channels in falling order of their exponents, the earlier of equal ones first: int32 [K]."""
    return np.argsort(-alpha.astype("int32"), kind="stable").astype("int32")


def block_shifts(alpha: np.ndarray) -> np.ndarray:
    """Return by how much the accumulator is shifted left before each block, int32 [ceil(K / 32)]; first 0."""
    falling = alpha[channel_order(alpha)][::BLOCK].astype("int32")
    return -np.diff(falling, prepend=falling[:1])


def is_blocked(alpha: np.ndarray) -> bool:
    """Tell whether exponents [K] in falling order are those of whole blocks, and end at 0."""
    falling = alpha[channel_order(alpha)]
    return falling[-1] == 0 and bool((falling == np.repeat(falling[::BLOCK], BLOCK)[: len(falling)]).all())


def check_sum(name: str, channels: int, activation_bits: int) -> None:
    """Check that an int32 holds any sum over so many channels without shifts.

    Raises
    ------
    AgqError
        If it does not.
    """
    largest = channels * _LARGEST_CODE * _ACTIVATION_LIMIT[activation_bits]
    if largest > INT32_LARGEST:
        raise AgqError(
            f"{name}: a sum over {channels} channels may reach {largest}, beyond the {INT32_LARGEST} of an int32: "
            "choose groups, whose sums are combined in float"
        )


def largest_total(codes: np.ndarray, alpha: np.ndarray, activation_bits: int) -> int:
    """Return the largest magnitude that an accumulator can have for any activations.

    Parameters
    ----------
    codes : uint8 array [N, K]
        0..15, as kernels multiply them.
    alpha : integer array [K]
    activation_bits : int

    Returns
    -------
    int
        ``L max(max_n Σ_k codes[n, k] 2^alpha[k], 8 Σ_k 2^alpha[k])`` for activation codes -L..L. The latter is for
        kernels that subtract 8 from codes, before they multiply or after they have summed.
    """
    powers = np.exp2(alpha.astype("float64"))  # exact: below 2^53
    products = float((codes @ powers).max(initial=0.0))
    return _ACTIVATION_LIMIT[activation_bits] * int(max(products, 8 * float(powers.sum())))


def check_totals(name: str, codes: np.ndarray, alpha: np.ndarray, activation_bits: int) -> None:
    """Check that no activations can make the accumulators of a matrix overflow.

    Raises
    ------
    AgqError
        Naming the matrix and the bound, if they can.
    """
    largest = largest_total(codes, alpha, activation_bits)
    if largest > INT32_LARGEST:
        raise AgqError(
            f"{name}: sums over {len(alpha)} channels with exponents up to {alpha.max()} may reach {largest}, beyond "
            f"the {INT32_LARGEST} of an int32: lower max_refine, or leave out shifts and choose groups, whose sums "
            "are combined in float"
        )
