"""A model of the same function whose norms are scaled by powers of two, channel by channel."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.models.decoder import DecoderConfig
from agq_tvm.quantize.checkpoint import QuantizedLinear
from agq_tvm.quantize.source import Source


def norm_readers(config: DecoderConfig) -> dict[str, list[str]]:
    """Name the norms of all layers that linears read, each with the modules that do."""
    attention, _, mlp, _ = config.linears
    prefixes = [config.layer_prefix.format(layer=layer) for layer in range(config.num_layers)]
    pairs = ((config.input_norm, attention), (config.mlp_norm, mlp))
    return {prefix + norm: [prefix + part for part in linear.parts] for prefix in prefixes for norm, linear in pairs}


class ScaledNorms(Source):
    """Scales vectors of norms up, and the columns that read them down, as they are read.

    Logits are those of the model it is made of, in float, bit for bit. It has no 4-bit grid: scaled columns leave
    that of the model.

    Parameters
    ----------
    source : Source
    exponents : mapping of int32 arrays [hidden_size]
        By the name of the norm, see `norm_readers`: its outputs become ``2 ** exponent`` times as large.

    Raises
    ------
    AgqError
        If the norms have no weights, or are read by more than linears.
    """

    def __init__(self, source: Source, exponents: Mapping[str, np.ndarray]) -> None:
        super().__init__(source.label, source.raw_config)
        if not self.config.norm.affine or self.config.norm_placement != "before":
            raise AgqError(f"{source.label} has norms that cannot be scaled by channel: leave them as they are")
        self._source = source
        self._norms = exponents
        readers = norm_readers(self.config)
        self._readers = {module: exponents[norm] for norm in exponents for module in readers[norm]}

    def _tensor(self, name: str) -> np.ndarray:
        value = self._source.tensor(name)
        module, kind = name.rsplit(".", 1)
        if module in self._norms:  # weight and bias alike
            return np.ldexp(value, self._norms[module])
        if module in self._readers and kind == "weight":
            return np.ldexp(value, -self._readers[module])
        return value

    def kept_table(self, name: str, bits: int) -> QuantizedLinear | None:
        """Return the grid of a table, which no norm of a layer concerns."""
        return self._source.kept_table(name, bits)

    def copy_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer of the model that this one is made of."""
        self._source.copy_tokenizer(directory)
