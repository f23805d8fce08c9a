"""The matrices outside the layers (embedding, head and projections) in 16, 8 or 4 bits.

16   float16
8    symmetric codes -127..127 in groups of 32
4    codes 0..15 with offsets in groups of 32, fitted by least squares; the head has a fit of its own
     (`agq_tvm.quantize.head`)
"""

import numpy as np

from agq_tvm.quantize.checkpoint import QuantizedLinear, Table
from agq_tvm.quantize.tensor_names import TABLE_GROUP, group_count
from agq_tvm.quantize.weights import assemble, dequantize, encode, rtn_8bit

_ROWS = 4096
_STARTS = (0.0, 0.06)
"""Shares of a group's range that its first grid leaves out at either end."""
_FITS = 4


def quantize_table(weight: np.ndarray, bits: int) -> Table:
    """Round an embedding or output matrix.

    Parameters
    ----------
    weight : float32 array [V, K]
        Finite and within float16's range (see `agq_tvm.quantize.weights.checked`).
    bits : {16, 8, 4}
    """
    if bits == 16:
        return weight.astype("float16")
    return rtn_8bit(weight, TABLE_GROUP) if bits == 8 else _fitted(weight)


def dequantize_table(table: Table) -> np.ndarray:
    """Return the matrix that a table stands for: float32 [V, K]."""
    return dequantize(table) if isinstance(table, QuantizedLinear) else table.astype("float32")


def _fitted(weight: np.ndarray) -> QuantizedLinear:
    """Round to 4 bits, with the scale and offset of each group that give it the smallest squared error."""
    rows, columns = weight.shape
    codes = np.empty((rows, columns), "uint8")
    scales = np.empty((rows, group_count(columns, TABLE_GROUP)), "float32")
    offsets = np.empty_like(scales)
    for first in range(0, rows, _ROWS):
        some = slice(first, first + _ROWS)
        for g, start in enumerate(range(0, columns, TABLE_GROUP)):
            channels = slice(start, start + TABLE_GROUP)
            codes[some, channels], scales[some, g], offsets[some, g] = _fit(weight[some, channels])
    return assemble(codes, scales, offsets, TABLE_GROUP, symmetric=False)


def _fit(group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes uint8 [N, n], scales and offsets float32 [N] of a group; both are float16 already.

    Codes are chosen for a grid, then the grid is fitted to the codes, and so on; the best of all is taken.
    """
    low, high = group.min(axis=1), group.max(axis=1)
    best, least = None, np.full(len(group), np.inf, "float32")
    for share in _STARTS:
        scale, offset = _half((high - low) * ((1 - 2 * share) / 15)), _half(low + share * (high - low))
        for _ in range(_FITS + 1):
            codes = encode(group, scale[:, None], offset[:, None])
            error = np.square(codes * scale[:, None] + offset[:, None] - group).sum(axis=1)
            better, least = error < least, np.minimum(error, least)
            found = codes, scale, offset
            best = found if best is None else tuple(map(_where, (better,) * 3, found, best))
            scale, offset = _least_squares(group, codes, scale)
    return best


def _least_squares(group: np.ndarray, codes: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the best scale and offset for these codes; codes that are all alike leave the scale as it is."""
    mean, level = group.mean(axis=1), codes.mean(axis=1, dtype="float32")
    centered = codes - level[:, None]
    square = np.square(centered).sum(axis=1)
    product = (centered * (group - mean[:, None])).sum(axis=1)
    scale = _half(np.where(square > 0, product / np.where(square > 0, square, 1), scale))
    return scale, _half(mean - scale * level)


def _half(values: np.ndarray) -> np.ndarray:
    return values.astype("float16").astype("float32")


def _where(better: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.where(better[:, None] if new.ndim == 2 else better, new, old)
