"""Outlier channels made on purpose: a model of the same function whose activations are harder to quantize.

Small models have mild outliers, large ones have strong ones in a few channels, the same at all depths. Scaling a
channel of a norm up, and the weights that read it down, by the same power of two makes such channels to order: floats
are unchanged bit for bit, so all that gets worse is quantization.
"""

from pathlib import Path

import numpy as np

from agq_tvm.errors import AgqError
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
    norm = source.config.norm
    if not norm.affine or source.config.norm_placement != "before":
        raise AgqError(f"{source.label} has norms that cannot be scaled by channel: choose another model for outliers")
    size = source.config.hidden_size
    if not 0 <= channels <= size:
        raise AgqError(f"{source.label} has {size} channels, {channels} of them cannot be outliers: ask for fewer")
    chosen = np.random.default_rng(seed).choice(size, channels, replace=False)
    return _OutlierSource(source, chosen, shift)


class _OutlierSource(Source):
    """Scales vectors of norms up, and columns that read them down, as they are read."""

    def __init__(self, source: Source, channels: np.ndarray, shift: int) -> None:
        super().__init__(source.label, source.raw_config)
        self._source = source
        self._exponents = np.zeros(self.config.hidden_size, "int32")
        self._exponents[channels] = shift
        config = self.config
        attention, _, mlp, _ = config.linears  # these read a norm's output
        prefixes = [config.layer_prefix.format(layer=layer) for layer in range(config.num_layers)]
        self._norms = {prefix + norm for prefix in prefixes for norm in (config.input_norm, config.mlp_norm)}
        self._readers = {prefix + part for prefix in prefixes for part in attention.parts + mlp.parts}

    def _tensor(self, name: str) -> np.ndarray:
        value = self._source.tensor(name)
        module, kind = name.rsplit(".", 1)
        if module in self._norms:  # weight and bias alike
            return np.ldexp(value, self._exponents)
        if module in self._readers and kind == "weight":
            return np.ldexp(value, -self._exponents)
        return value

    def copy_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer of the model that this one was made of."""
        self._source.copy_tokenizer(directory)
