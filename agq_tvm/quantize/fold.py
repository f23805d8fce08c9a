"""Powers of two taken out of norms and put into the weights that read them, before anything is quantized.

A channel of a norm that is made large, for weights that are as much smaller, costs both: the activations that share
its scale lose bits, and so do the small weights beside the others of their group. Moved by a power of two floats stay
what they are, bit for bit, and every column of the weights comes to a like size. Nothing but the weights is looked
at. Of balanced sizes of both sides instead, as SmoothQuant has them, the weights' rounding errors grew on SmolLM2.
"""

import numpy as np

from agq_tvm.quantize.scaled_norms import ScaledNorms, norm_readers
from agq_tvm.quantize.source import Source


def folded(source: Source) -> Source:
    """Return a model of the same function in which the columns of weights that read a norm are of like sizes.

    Parameters
    ----------
    source : Source

    Raises
    ------
    AgqError
        If its norms have no weights, or are read by more than linears.
    """
    exponents = {}
    for norm, readers in norm_readers(source.config).items():
        squares = [np.square(source.tensor(f"{reader}.weight"), dtype="float64").sum(0) for reader in readers]
        exponents[norm] = relative_exponents(np.sqrt(sum(squares)))
    return ScaledNorms(source, exponents)


def relative_exponents(sizes: np.ndarray) -> np.ndarray:
    """Return the powers of two nearest to sizes relative to their median.

    Parameters
    ----------
    sizes : float64 array [K]
        Not negative.

    Returns
    -------
    int32 array [K]
        0 where a size is zero. A size scaled by 2^s has s more, unless that moves the median.
    """
    known = sizes > 0
    if not known.any():
        return np.zeros(len(sizes), "int32")
    relative = np.where(known, sizes, 1) / np.median(sizes[known])
    return np.where(known, np.rint(np.log2(relative)), 0).astype("int32")
