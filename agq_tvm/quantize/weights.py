"""Codes of 4 and 8 bits for weights: the grid of a group, rounding to it, and two 4-bit codes in a byte.

A weight is ``s * q + o`` with q in 0..15. Asymmetric groups put the offset on their smallest weight, as a
real number and not as an integer multiple of the scale: that uses all sixteen codes of the range. Scales and
offsets are rounded to float16 first and the codes are chosen for the rounded values, so a file holds exactly
the grid that the codes were made for.

8-bit codes, of linears and of tables, are symmetric: ``w = s * q`` with q in -127..127.
"""

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.quantize import integer_grid
from agq_tvm.quantize.checkpoint import QuantizedLinear
from agq_tvm.quantize.tensor_names import group_count

_LARGEST = float(np.finfo("float16").max)


def checked(weight: np.ndarray, name: str) -> np.ndarray:
    """Return `weight` if every value is finite and within float16's range.

    Raises
    ------
    AgqError
        Naming the tensor.
    """
    largest = np.maximum(weight.max(initial=0.0), -weight.min(initial=0.0))
    if not np.isfinite(largest):
        raise AgqError(f"tensor {name} has values that are NaN or infinite: the model is damaged")
    if largest > _LARGEST:
        raise AgqError(f"tensor {name} has a value of {largest:g}: 4-bit scales reach only {_LARGEST:g}")
    return weight


def pack(codes: np.ndarray) -> np.ndarray:
    """Pack uint8 codes 0..15 [N, K] into bytes [N, ceil(K / 2)], the even k in the low nibble."""
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).astype("uint8")


def unpack(packed: np.ndarray, in_features: int) -> np.ndarray:
    """Undo `pack`: uint8 codes [N, K]."""
    codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)
    return codes[:, :in_features]


def choose_grid(group: np.ndarray, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Choose scale and offset of one group for every row.

    Parameters
    ----------
    group : float array [N, n]
        The weights of the group.
    symmetric : bool
        Put the offset at -8 scales; code 0 falls on the weight of largest magnitude (so the scale is negative
        if that weight is positive). Otherwise the offset is the smallest weight and code 15 falls on the
        largest.

    Returns
    -------
    scale, offset : float32 arrays [N]
        Already rounded to float16 (the symmetric offset, -8 times the scale, needs no rounding).
    """
    low, high = group.min(axis=1), group.max(axis=1)
    if symmetric:
        extreme = np.where(-low >= high, low, high)
        scale = (extreme / -8).astype("float16").astype("float32")
        return scale, -8 * scale
    scale = ((high - low) / 15).astype("float16").astype("float32")
    return scale, low.astype("float16").astype("float32")


def grid_chooser(weight: np.ndarray, symmetric: bool, integer: bool):
    """Return what chooses scale and offset of a group [N, n]: `choose_grid`, or that of an integer grid, and its units.

    Parameters
    ----------
    weight : float array [N, K]
        All groups, by which the units of an integer grid are chosen.
    symmetric, integer : bool

    Returns
    -------
    choose : callable
        ``f(group) -> (scale, offset)``
    units : float32 array [N] or None
    """
    if not integer:
        return lambda group: choose_grid(group, symmetric), None
    units = integer_grid.choose_units(weight)
    return lambda group: integer_grid.choose_grid(group, units), units


def encode(weight: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Round weights to the nearest code of their grid; the arguments broadcast, the result is uint8 0..15."""
    safe = np.where(scale == 0, 1, scale)
    codes = np.rint((weight - offset) / safe)
    return np.where(scale == 0, 0, np.clip(codes, 0, 15)).astype("uint8")


def rtn(weight: np.ndarray, group_size: int, symmetric: bool, integer: bool = False) -> QuantizedLinear:
    """Round to nearest, group by group.

    Parameters
    ----------
    weight : float32 array [N, K]
        Finite (see `checked`).
    group_size : int
    symmetric : bool
    integer : bool
        Whether the grid is one of integers, see `agq_tvm.quantize.integer_grid`.
    """
    rows, columns = weight.shape
    choose, units = grid_chooser(weight, symmetric, integer)
    codes = np.empty((rows, columns), "uint8")
    scales = np.empty((rows, group_count(columns, group_size)), "float32")
    offsets = np.empty_like(scales)
    for g, start in enumerate(range(0, columns, group_size)):
        group = weight[:, start : start + group_size]
        scales[:, g], offsets[:, g] = choose(group)
        codes[:, start : start + group_size] = encode(group, scales[:, g, None], offsets[:, g, None])
    return assemble(codes, scales, offsets, group_size, symmetric, units)


def assemble(
    codes: np.ndarray,
    scales: np.ndarray,
    offsets: np.ndarray,
    group_size: int,
    symmetric: bool,
    units: np.ndarray | None = None,
) -> QuantizedLinear:
    """Pack codes [N, K] and a float16-exact grid [N, G], perhaps with its units [N], into a `QuantizedLinear`."""
    return QuantizedLinear(
        qweight=pack(codes),
        scales=scales.astype("float16"),
        offsets=None if symmetric else offsets.astype("float16"),
        in_features=codes.shape[1],
        group_size=group_size,
        unit=None if units is None else units.astype("float16"),
    )


def codes_of(linear: QuantizedLinear) -> np.ndarray:
    """Return the codes of a matrix, one to an element: uint8 0..15 or int8 -128..127, [N, K]."""
    return linear.qweight if linear.bits == 8 else unpack(linear.qweight, linear.in_features)


def grid_of(linear: QuantizedLinear) -> tuple[np.ndarray, np.ndarray]:
    """Return scales and offsets of every group, float32 [N, G] each."""
    scales = linear.scales.astype("float32")
    if linear.offsets is not None:
        return scales, linear.offsets.astype("float32")
    return scales, (-8 if linear.bits == 4 else 0) * scales


def dequantize(linear: QuantizedLinear) -> np.ndarray:
    """Return the weights that the codes stand for: float32 [N, K]."""
    scales, offsets = (spread(a, linear.group_size, linear.in_features) for a in grid_of(linear))
    return codes_of(linear) * scales + offsets


def spread(per_group: np.ndarray, group_size: int, in_features: int) -> np.ndarray:
    """Repeat values per group [..., G] for every channel [..., K]."""
    return np.repeat(per_group, group_size, axis=-1)[..., :in_features]


def rtn_8bit(weight: np.ndarray, group_size: int) -> QuantizedLinear:
    """Round a matrix [N, K] to the nearest symmetric 8-bit codes, group by group."""
    codes, scales = round_8bit(weight, group_size)
    return QuantizedLinear(codes, scales, None, in_features=weight.shape[1], group_size=group_size)


def round_8bit(weight: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes -127..127, int8 [N, K], and scales, float16 [N, G], of a finite matrix [N, K]."""
    rows, columns = weight.shape
    codes = np.empty((rows, columns), "int8")
    scales = np.empty((rows, group_count(columns, group_size)), "float16")
    for g, start in enumerate(range(0, columns, group_size)):
        group = weight[:, start : start + group_size]
        largest = np.abs(group).max(axis=1)
        scale = (largest / 127).astype("float16")
        # Subnormal scales are coarse: one that was rounded down could leave the largest weight out of reach.
        scale = np.where(largest > 127.5 * scale.astype("float32"), np.nextafter(scale, np.float16(np.inf)), scale)
        safe = np.where(scale == 0, 1, scale.astype("float32"))[:, None]
        rounded = np.clip(np.rint(group / safe), -127, 127)
        codes[:, start : start + group_size] = np.where(scale[:, None] == 0, 0, rounded)
        scales[:, g] = scale
    return codes, scales
