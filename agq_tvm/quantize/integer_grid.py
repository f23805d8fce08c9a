"""Integer grids: the scales and offsets of a column's groups are whole multiples of one unit.

    w = unit[n] · (step[n, g] · q + low[n, g])        q 0..15, step 1..17, low -128..127, in brackets -128..127

So a column's 4-bit codes are bytes of one scale, and a product sums them over all channels in integers (two levels of
scales, as QServe by Lin et al., 2024, has them). A group takes 16 bits beside its codes and not 32. As steps and lows
have to be rounded they are chosen for the least error, which is about that of real scales from least to largest weight:
smaller for normal weights, larger where some weights of a column are far larger than its others, as these set its unit
and a step is one unit or more.
"""

import numpy as np

from agq_tvm.errors import AgqError

LARGEST_STEP = 17
"""17 · 15 = 255: the steps of a group reach across all bytes."""
LOWEST, HIGHEST = -128, 127
_CODES = 15
_SIGNIFICANT = 4
"""Bits of a unit's fraction: times step or low it has 11, as many as float16 holds."""
_SMALLEST = 2.0**-24
"""Of float16's numbers, whose multiples the others are."""


def choose_units(weight: np.ndarray) -> np.ndarray:
    """Return the unit of every column of the product, float32 [N], exact in float16.

    Parameters
    ----------
    weight : float array [N, K]

    Raises
    ------
    AgqError
        If weights are so large that float16 does not hold their offsets.
    """
    reach = np.maximum(weight.max(1) / HIGHEST, weight.min(1) / LOWEST).astype("float64")
    quantum = np.maximum(np.exp2(np.frexp(reach)[1].astype("float64") - _SIGNIFICANT), _SMALLEST)
    units = np.ceil(reach / quantum) * quantum
    if units.max(initial=0) * -LOWEST > np.finfo("float16").max:
        raise AgqError("weights are too large for an integer grid: leave out --integer-grid")
    return units.astype("float32")


def choose_grid(group: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose scale and offset of one group for every row: those of the least squared error among a few.

    Steps are the whole numbers beside a fifteenth of the weights' range. With each the grid is put on the middle of
    the range, then moved by the mean error.

    Parameters
    ----------
    group : float array [N, n]
        The weights of the group.
    units : float32 array [N]

    Returns
    -------
    scale, offset : float32 arrays [N]
        Multiples of the unit, exact in float16; NaN where a weight is not finite.
    """
    scaled = group / np.where(units == 0, 1, units)[:, None]
    least, middle = scaled.min(axis=1), (scaled.min(axis=1) + scaled.max(axis=1)) / 2
    below = np.floor((scaled.max(axis=1) - least) / _CODES)
    best_error, best_low = np.full(len(group), np.inf), np.zeros(len(group))
    best_step = np.where(np.isfinite(group).all(axis=1), 1.0, np.nan)
    for more in (-1, 0, 1):
        step = np.clip(below + more, 1, LARGEST_STEP)
        low = middle - _CODES / 2 * step
        for _ in range(2):
            low = np.clip(np.rint(low), LOWEST, HIGHEST - _CODES * step)
            codes = np.clip(np.rint((scaled - low[:, None]) / step[:, None]), 0, _CODES)
            difference = scaled - codes * step[:, None] - low[:, None]
            error = np.einsum("nk,nk->n", difference, difference)
            better = error < best_error
            best_error, best_step = np.where(better, error, best_error), np.where(better, step, best_step)
            best_low = np.where(better, low, best_low)
            low = low + difference.mean(axis=1)
    return (units * best_step).astype("float32"), (units * best_low).astype("float32")


def to_integers(unit: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return steps, uint8 [N, G], and lows, int8 [N, G], of scales and offsets that `choose_grid` made.

    A column of nothing but zeros has the unit 0 and steps of 1.
    """
    unit = unit.astype("float32")[:, None]
    safe = np.where(unit == 0, 1, unit)
    steps = np.where(unit == 0, 1, np.rint(scales.astype("float32") / safe))
    return steps.astype("uint8"), np.rint(offsets.astype("float32") / safe).astype("int8")


def to_scales(unit: np.ndarray, steps: np.ndarray, lows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scales and offsets, float16 [N, G] each, exactly."""
    unit = unit.astype("float32")[:, None]
    return (unit * steps).astype("float16"), (unit * lows).astype("float16")


def is_valid(unit: np.ndarray, steps: np.ndarray, lows: np.ndarray) -> bool:
    """Tell whether no code leaves its byte, and scales and offsets are exact in float16."""
    lows, steps = lows.astype("int32"), steps.astype("int32")
    if not ((steps >= 1).all() and (steps <= LARGEST_STEP).all() and (lows + _CODES * steps <= HIGHEST).all()):
        return False
    wide = unit.astype("float64")[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        exact = all(np.array_equal(wide * whole, (wide * whole).astype("float16")) for whole in (steps, lows))
    return exact and bool((unit >= 0).all())


def count_coarse(weight: np.ndarray, unit: np.ndarray, group_size: int) -> int:
    """Count the groups of different weights that reach over less than 7 units, which leaves them fewer than 8 codes."""
    starts = range(0, weight.shape[1], group_size)
    reach = np.maximum.reduceat(weight, starts, axis=1) - np.minimum.reduceat(weight, starts, axis=1)
    return int(((reach > 0) & (reach < 7 * unit.astype("float32")[:, None])).sum())
