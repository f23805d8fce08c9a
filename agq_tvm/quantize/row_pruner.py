"""The rows of a pass through the torch reference, of which pruning layers drop some.

A compiled model runs a prompt in chunks over caches, and drops rows of each chunk by itself. Here everything is one
pass, which is the same: a row sees the rows before it that reached its layer, and those keep their order.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from agq_tvm.quantize.forward import AttentionPositions, WatchAttention, start_probabilities
from agq_tvm.quantize.pruning import PruningSchedule, select


class PrunedPass(NamedTuple):
    """What is left of a pass.

    Attributes
    ----------
    logits : float32 array [R, V]
        Of the tokens that reach the end.
    kept : tuple of int64 arrays
        The positions of the tokens that are left at first and after each pruning layer, rising; the last has R.
    """

    logits: np.ndarray
    kept: tuple[np.ndarray, ...]


class RowPruner:
    """Which rows of a pass are left, and how attention knows their positions.

    Parameters
    ----------
    schedule : PruningSchedule
    chunks : sequence of int
        How the prompt is cut: rows of each chunk, from the first token on. Rows after them are never dropped.
    positions : AttentionPositions
        Of all T rows.
    tokens : int
        T.

    Attributes
    ----------
    positions : AttentionPositions
        Of the rows that are left.
    kept : list of int64 arrays
        The positions that are left at first and after each pruning layer passed, rising.
    chosen : int64 tensor
        Of the rows that were left in the pruning layer seen last, those that stay; another pass over the same tokens
        can drop the others, too.
    """

    def __init__(
        self, schedule: PruningSchedule, chunks: Sequence[int], positions: AttentionPositions, tokens: int
    ) -> None:
        self.positions = positions
        self.kept = [np.arange(tokens)]
        self._schedule = schedule
        self._chunks = list(chunks)
        self.chosen = torch.arange(tokens)

    def in_layer(
        self, layer: int, watch: WatchAttention | None
    ) -> tuple[WatchAttention | None, Callable[[Tensor], Tensor] | None]:
        """Return the `watch` and `drop` of `forward.layer_steps` for a layer, counted from 0."""
        if layer + 1 not in self._schedule.layers:
            return watch, None

        def see(q: Tensor, k: Tensor, bias: Tensor | None) -> None:
            self.chosen = torch.from_numpy(self._choose(start_probabilities(q, k, bias).sum(0).numpy()))
            if watch is not None:
                watch(q, k, bias)

        return see, self._drop

    def _drop(self, hidden: Tensor) -> Tensor:
        left = self.chosen
        self.kept.append(self.kept[-1][left.numpy()])
        self.positions = self.positions.of_rows(torch.arange(len(left)) if self._schedule.renumber else left)
        return hidden[left]

    def _choose(self, scores: np.ndarray) -> np.ndarray:
        """Return the rows that stay, of those that are left, and count those of each chunk anew."""
        start, chosen = 0, []
        for i, rows in enumerate(self._chunks):
            always = [0] if i == 0 else []
            always += [rows - 1] if i == len(self._chunks) - 1 else []
            self._chunks[i] = self._schedule.keep(rows)
            chosen.append(start + select(scores[start : start + rows], self._chunks[i], always))
            start += rows
        return np.concatenate([*chosen, np.arange(start, len(scores))])
