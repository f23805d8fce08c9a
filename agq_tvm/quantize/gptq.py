"""GPTQ (Frantar et al., 2023): round columns one by one and let the later ones make up for the error."""

import numpy as np
import torch

from agq_tvm.errors import AgqError
from agq_tvm.quantize.checkpoint import QuantizedLinear
from agq_tvm.quantize.tensor_names import group_count
from agq_tvm.quantize.weights import assemble, encode, grid_chooser

DAMPING = 0.05
_BLOCK = 128  # a multiple of every group size that is smaller than a row
_COLUMNS = 1024  # of the factor, made at a time


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    group_size: int,
    symmetric: bool,
    drift: np.ndarray | None = None,
    integer: bool = False,
) -> QuantizedLinear:
    """Quantize a matrix so that its outputs on the calibration inputs change little.

    The grid of a group is chosen when its first column is reached, for the weights as updated by then. The
    inputs x come out of layers that are quantized already, and so differ from those of the float model: given
    `drift`, the weights are first fitted to give the float model's outputs (asymmetric calibration, as in GPTAQ
    by Li et al., 2025).

    Parameters
    ----------
    weight : float32 array [N, K]
    hessian : float array [K, K]
        Sum of ``xᵀ x`` over the calibration inputs x [T, K]; any factor in front of it is the same.
    group_size : int
    symmetric : bool
    drift : float array [K, K], optional
        Sum of ``(x_float - x)ᵀ x``, with the same factor in front as the Hessian.
    integer : bool
        Whether the grid is one of integers, see `agq_tvm.quantize.integer_grid`.

    Raises
    ------
    AgqError
        If the inputs are not finite or no damping makes the Hessian positive definite.
    """
    rows, columns = weight.shape
    weight = weight.astype("float32")  # a copy, updated below
    factor = inverse_factor(hessian)
    if drift is not None:
        weight += weight @ drift.astype("float32", copy=False) @ factor.T @ factor
    weight[:, np.diag(hessian) == 0] = 0
    choose, units = grid_chooser(weight, symmetric, integer)
    codes = np.empty((rows, columns), "uint8")
    scales = np.empty((rows, group_count(columns, group_size)), "float32")
    offsets = np.empty_like(scales)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        block = np.ascontiguousarray(weight[:, start:end].T)  # what is updated column by column lies in a row
        block_codes, errors = np.empty(block.shape, "uint8"), np.empty_like(block)
        for i, k in enumerate(range(start, end)):
            g = k // group_size
            if k % group_size == 0:
                group = np.hstack([block[i : i + group_size].T, weight[:, end : k + group_size]])
                scales[:, g], offsets[:, g] = choose(group)
                scale, offset = scales[:, g].copy(), offsets[:, g].copy()
            block_codes[i] = encode(block[i], scale, offset)
            errors[i] = (block[i] - (block_codes[i] * scale + offset)) / factor[k, k]
            block[i + 1 :] -= np.outer(factor[k, k + 1 : end], errors[i])
        codes[:, start:end] = block_codes.T
        weight[:, end:] -= errors.T @ factor[start:end, end:]
    return assemble(codes, scales, offsets, group_size, symmetric, units)


def inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """Return U, upper triangular float32 [K, K] with ``Uᵀ U = (H + damping)⁻¹``.

    An input that was always zero counts as one that is independent of all others. Damping starts at 5 % of
    the mean diagonal and grows tenfold, twice, if rounding left the matrix indefinite.

    Raises
    ------
    AgqError
        If that does not help or the Hessian is not finite.
    """
    if not np.isfinite(hessian).all():
        raise AgqError("the calibration inputs are not finite: the model is damaged")
    diagonal = np.diag(hessian).astype("float64")
    diagonal[diagonal == 0] = 1.0
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        # With W upper triangular and W Wᵀ the damped Hessian, U is the inverse of W; and W is the usual lower
        # triangular factor with rows and columns in reverse order.
        reverse = torch.from_numpy(hessian).flip(0, 1).double()
        reverse.diagonal().copy_(torch.from_numpy(diagonal + damping * diagonal.mean()).flip(0))
        lower, failed = torch.linalg.cholesky_ex(reverse)
        del reverse
        if not failed:
            return _inverse(lower).numpy()
    raise AgqError("GPTQ cannot invert the calibration inputs: give another text, or use rtn")


def _inverse(lower: torch.Tensor) -> torch.Tensor:
    """Return the inverse, rows and columns in reverse order, of a lower triangular float64 [K, K]; in float32."""
    size = len(lower)
    inverse = torch.zeros(size, size)
    for start in range(0, size, _COLUMNS):
        # Columns of the inverse are zero above the diagonal, and so need only what is right of and below it.
        corner = lower[start:, start:]
        unit = torch.eye(len(corner), min(_COLUMNS, len(corner)), dtype=torch.float64)
        inverse[start:, start : start + _COLUMNS] = torch.linalg.solve_triangular(corner, unit, upper=False)
    return inverse.flip(0, 1)
