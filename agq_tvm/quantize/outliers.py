"""Outlier channels made on purpose: a model of the same function whose activations are harder to quantize.

Small models have mild outliers, large ones have strong ones in a few channels, the same at all depths. Scaling a
channel of a norm up, and the weights that read it down, by the same power of two makes such channels to order: floats
are unchanged bit for bit, so all that gets worse is quantization.
"""

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.quantize.scaled_norms import ScaledNorms, norm_readers
from agq_tvm.quantize.source import Source


def with_outliers(source: Source, channels: int, shift: int, seed: int = 0) -> Source:
    """Make outlier channels at the outputs of the two norms of every layer, keeping the model's function.

    Parameters
    ----------
    source : Source
    channels : int
        How many there shall be, the same ones in all layers.
    shift : int
        They become ``2 ** shift`` times as large.
    seed : int
        Chooses them.

    Returns
    -------
    Source
        With the same logits, in float, bit for bit. It has no 4-bit grid: scaled columns leave that of `source`.

    Raises
    ------
    AgqError
        If the model has fewer channels, or its norms have no weights or are read by more than linears.
    """
    size = source.config.hidden_size
    if not 0 <= channels <= size:
        raise AgqError(f"{source.label} has {size} channels, {channels} of them cannot be outliers: ask for fewer")
    exponents = np.zeros(size, "int32")
    exponents[np.random.default_rng(seed).choice(size, channels, replace=False)] = shift
    return ScaledNorms(source, dict.fromkeys(norm_readers(source.config), exponents))
