"""The 4-bit head: rounded by GPTQ on what it multiplies once the layers are quantized.

A head that shares the embedding's table is rounded for what it does as a head. Nothing comes after it, while a token's
row is normalized, and mixed with others, in every layer.
"""

import numpy as np
import torch
from torch import Tensor

from agq_tvm.errors import AgqError
from agq_tvm.quantize.checkpoint import QuantizedLinear
from agq_tvm.quantize.forward import read_norm
from agq_tvm.quantize.gptq import gptq
from agq_tvm.quantize.operators import FloatLinear
from agq_tvm.quantize.source import Source
from agq_tvm.quantize.streaming import token_weights
from agq_tvm.quantize.tensor_names import TABLE_GROUP

_INDEPENDENT = 1e-3
"""Counted for a channel that is always 0, as a share of the mean: its weights may be those of an embedding."""


class HeadFit:
    """Sums over the inputs of a model's head, and the head that they ask for.

    Parameters
    ----------
    source : Source
    """

    def __init__(self, source: Source) -> None:
        config = source.config
        self.name = config.embedding if config.tied_embeddings else config.head
        self._source = source
        self._norm = read_norm(config, config.final_norm, source.tensor)
        self._project = None
        if config.project_out:
            self._project = FloatLinear(torch.from_numpy(source.tensor(f"{config.project_out}.weight")))
        channels = config.tables["embedding"][1]
        self._hessian, self._drift = torch.zeros(channels, channels), torch.zeros(channels, channels)

    def look(self, hidden: list[Tensor], exact: list[Tensor] | None) -> None:
        """Add up what comes out of the last layer, [T, hidden_size] of each window, and of the float model if known."""
        for window, wanted in zip(hidden, exact or hidden, strict=True):
            x = self._input(window)
            weighted = x * token_weights(x)
            self._hessian.addmm_(weighted.T, x)
            if exact:
                self._drift.addmm_((self._input(wanted) - x).T, weighted)

    def quantized(self) -> QuantizedLinear:
        """Round the head to 4 bits.

        Raises
        ------
        AgqError
            If what was looked at is not finite.
        """
        diagonal = self._hessian.diagonal()
        diagonal[diagonal == 0] = _INDEPENDENT * float(diagonal.mean()) or 1.0
        weight = self._source.tensor(f"{self.name}.weight")
        try:
            table = gptq(weight, self._hessian.numpy(), TABLE_GROUP, False, self._drift.numpy())
        except AgqError as error:
            raise AgqError(f"{self.name}: {error}") from error
        if not np.isfinite(table.scales).all():
            raise AgqError(f"{self.name}: GPTQ left float16's range: take a head of 8 bits")
        return table

    def _input(self, hidden: Tensor) -> Tensor:
        x = hidden if self._norm is None else self._norm(hidden)
        return x if self._project is None else self._project(x)
