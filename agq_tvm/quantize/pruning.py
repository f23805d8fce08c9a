"""Token pruning: after which layers tokens are dropped, how many, and which (Agile-Quant, "token pruning").

A token's importance at a layer is the attention that it gives to the first token, summed over heads. The first token
and the last one of the prompt always stay: attention rests on the one, and the next token follows from the other.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from agq_tvm.errors import AgqError

_ALWAYS_KEPT = 2


@dataclass(frozen=True)
class PruningSchedule:
    """Where tokens are dropped, and what share of them is gone in the end.

    Attributes
    ----------
    layers : tuple of int
        Numbers of the layers that drop tokens, counted from 1 as the paper does, rising. Attention of such a layer
        still sees every token that reaches it; its MLP is the first to run without the dropped ones.
    beta : float
        Share of the tokens that no longer reach the end of the last of these layers, between 0 and 1; each layer
        drops the same share of what reaches it.
    renumber : bool
        Whether tokens that are left count their positions anew, 0 to r - 1, as in the authors' code; otherwise they
        keep those of the prompt.
    """

    layers: tuple[int, ...]
    beta: float
    renumber: bool = False

    def __post_init__(self) -> None:
        layers = self.layers
        if not layers:
            raise AgqError("pruning needs layers to prune after: name at least one")
        if not all(type(layer) is int and layer > 0 for layer in layers) or any(a >= b for a, b in pairwise(layers)):
            listed = ",".join(map(str, layers))
            raise AgqError(f"pruning layers {listed} are not rising numbers from 1 on: list each once, in order")
        if type(self.beta) not in (int, float) or not 0 < self.beta < 1:
            raise AgqError(f"a pruned share of {self.beta!r} is not between 0 and 1: give e.g. 0.5 for half the tokens")
        if type(self.renumber) is not bool:
            raise AgqError(f"renumber must be true or false, not {self.renumber!r}")

    @property
    def gamma(self) -> float:
        """What share of its tokens one layer drops: 1 - (1 - beta)^(1/m) for m layers."""
        return 1 - (1 - self.beta) ** (1 / len(self.layers))

    def check_layers(self, num_layers: int) -> None:
        """Refuse a layer that a model of `num_layers` layers does not have.

        Raises
        ------
        AgqError
        """
        if self.layers[-1] > num_layers:
            raise AgqError(f"pruning layer {self.layers[-1]} does not exist: the model has layers 1 to {num_layers}")

    def keep(self, rows: int) -> int:
        """Return how many of `rows` tokens one layer keeps: rows - int(rows · gamma), but 2 where there are 2.

        Neither of the two that always stay depends on where a chunk of the prompt stands, so that the number depends
        on the rows alone.
        """
        return max(rows - int(rows * self.gamma), min(rows, _ALWAYS_KEPT))

    def counts(self, rows: int) -> tuple[int, ...]:
        """Return how many of `rows` tokens are there at first, and after each of the m layers: m + 1 numbers."""
        counts = [rows]
        for _ in self.layers:
            counts.append(self.keep(counts[-1]))
        return tuple(counts)

    def sparsity(self, rows: int, num_layers: int) -> float:
        """Return the share of (token, layer) pairs that are pruned, of a prompt of `rows` tokens.

        A layer that drops tokens counts as if it ran without them, as in the paper.
        """
        dropped = 0
        ends = (*self.layers[1:], num_layers + 1)
        for count, first, end in zip(self.counts(rows)[1:], self.layers, ends, strict=True):
            dropped += (rows - count) * (end - first)
        return dropped / (rows * num_layers)


def read_schedule(value) -> PruningSchedule | None:
    """Read the ``pruning`` of a checkpoint's ``quantization_config`` or a bundle's manifest.

    It is null, or has layers, beta and renumber; without the last, positions are kept.

    Raises
    ------
    AgqError
        If it is something else.
    """
    if value is None:
        return None
    wanted = {"layers", "beta", "renumber"}
    known = isinstance(value, dict) and value.keys() | {"renumber"} == wanted and isinstance(value["layers"], list)
    if not known:
        raise AgqError(f"pruning {value!r} is neither null nor a list of layers and a beta")
    return PruningSchedule(tuple(value["layers"]), value["beta"], value.get("renumber", False))


def select(scores: np.ndarray, keep: int, always: Collection[int] = ()) -> np.ndarray:
    """Choose the most important rows.

    Parameters
    ----------
    scores : float array [T]
        Of two equal ones the earlier wins.
    keep : int
        How many, at least the number of rows in `always`.
    always : collection of int
        Rows that are chosen whatever their score.

    Returns
    -------
    int64 array [keep]
        Rising.
    """
    scores = np.array(scores, "float64")
    scores[list(always)] = np.inf
    return np.sort(np.argsort(-scores, kind="stable")[:keep])
