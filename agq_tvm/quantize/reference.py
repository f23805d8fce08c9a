"""The torch reference: what a quantized model means, and the float model that it is measured against."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from agq_tvm.errors import AgqError
from agq_tvm.models.decoder import DecoderConfig
from agq_tvm.quantize.checkpoint import Checkpoint, QuantizedLinear
from agq_tvm.quantize.codebooks import CODE_BOOKS
from agq_tvm.quantize.forward import (
    Attend,
    Entry,
    Norm,
    Norms,
    attention_positions,
    layer_steps,
    read_entry,
    read_norm,
    read_norms,
    run_layer,
)
from agq_tvm.quantize.log2 import Log2Attention
from agq_tvm.quantize.operators import (
    TERMS,
    FloatLinear,
    Operator,
    QuantizedOperator,
    ShiftedOperator,
    TableOperator,
    float_linear,
    stacked_weights,
)
from agq_tvm.quantize.pruning import PruningSchedule
from agq_tvm.quantize.row_pruner import PrunedPass, RowPruner
from agq_tvm.quantize.scheme import ACTIVATIONS
from agq_tvm.quantize.source import Source
from agq_tvm.quantize.tables import dequantize_table

# Called with "layers.3.qkv", codes int8 [T, K], scales float32 [T, GA] and sums int32 [T, G, N].
Trace = Callable[[str, np.ndarray, np.ndarray, np.ndarray], None]
# Float weights of all layers are kept in memory up to this many bytes, else made again for every pass.
_KEPT_BYTES = 6 << 30


class Observer(Protocol):
    """Is shown what passes through the layers."""

    def linear_input(self, layer: int, name: str, x: Tensor) -> None:
        """See the input of a linear, float32 [T, K], before it is quantized."""

    def attention(self, layer: int, q: Tensor, k: Tensor, bias: Tensor | None) -> None:
        """See queries [H, T, D] and keys [KV heads, T, D] as attention multiplies them, and what it adds [H, T, T]."""


class Layer(NamedTuple):
    """One layer: its norms, its linears by their name, and its attention if that is not float."""

    norms: Norms
    linears: Mapping[str, Operator]
    attend: Attend | None = None


@dataclass(frozen=True)
class Exit:
    """What makes logits of the last layer's output.

    Attributes
    ----------
    norm : Norm or None
    project : Operator or None
        From [T, hidden_size] to [T, E].
    head : Operator
        From [T, E] to [T, V].
    """

    norm: Norm | None
    project: Operator | None
    head: Operator

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits, float32 [T, V]."""
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.project is not None:
            hidden = self.project(hidden)
        return self.head(hidden)


class ReferenceModel:
    """A decoder run in one causal pass.

    Made by `from_checkpoint` or `from_source`.

    Attributes
    ----------
    config : DecoderConfig
    pruning : PruningSchedule or None
        What `prune` follows; `logits` does not.
    """

    def __init__(
        self,
        config: DecoderConfig,
        load_layer: Callable[[int], Layer],
        entry: Entry,
        exit: Exit,
        half_cache: bool,
        pruning: PruningSchedule | None = None,
    ) -> None:
        self.config = config
        self.pruning = pruning
        self._layer = cache(load_layer) if _layer_bytes(config) <= _KEPT_BYTES else load_layer
        self._entry = entry
        self._exit = exit
        self._half_cache = half_cache

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, activation: str | None = None) -> "ReferenceModel":
        """Take a quantized checkpoint.

        Parameters
        ----------
        checkpoint : Checkpoint
        activation : str, optional
            Instead of the checkpoint's own; ``"none"`` keeps activations float. Static activations need a
            checkpoint that was calibrated for them.
        """
        config, activation = checkpoint.config, activation or checkpoint.scheme.activation
        if activation not in ACTIVATIONS:
            raise AgqError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if activation == "static" and checkpoint.scheme.activation != "static":
            raise AgqError(f"{checkpoint.path} has no static activation scales: quantize with static activations")

        def load_layer(layer: int) -> Layer:
            linears = {}
            for linear in config.linears:
                parts = checkpoint.fused(layer, linear.parts)
                linears[linear.name] = _operator(parts, activation, checkpoint.scheme.activation_bits(linear.name))
            attend = None
            if checkpoint.scheme.attention in CODE_BOOKS:
                scales = torch.from_numpy(checkpoint.value_scale(layer))
                attend = Log2Attention(CODE_BOOKS[checkpoint.scheme.attention], scales)
            return Layer(read_norms(config, layer, checkpoint.vector), linears, attend)

        def table(name: str) -> Tensor:
            return torch.from_numpy(dequantize_table(checkpoint.table(name)))

        bits = checkpoint.scheme.head_bits
        operator = FloatLinear if activation == "none" or bits == 16 else partial(TableOperator, terms=TERMS[bits])
        entry, exit = _ends(config, table, operator, checkpoint.vector)
        return cls(config, load_layer, entry, exit, half_cache=True, pruning=checkpoint.scheme.pruning)

    @classmethod
    def from_source(cls, source: Source, load_layer: Callable[[int], Layer] | None = None) -> "ReferenceModel":
        """Take a model as it is, in float32 throughout.

        Parameters
        ----------
        source : Source
        load_layer : callable, optional
            Makes layers to use instead of the model's own.
        """
        config = source.config

        def own_layer(layer: int) -> Layer:
            prefix = config.layer_prefix.format(layer=layer)
            linears = {
                linear.name: float_linear(source, [prefix + part for part in linear.parts]) for linear in config.linears
            }
            return Layer(read_norms(config, layer, source.tensor), linears)

        entry, exit = _ends(config, partial(_weight, source), FloatLinear, source.tensor)
        return cls(config, load_layer or own_layer, entry, exit, half_cache=False)

    def altered(self, change: Callable[[int, Layer], Layer]) -> "ReferenceModel":
        """Return a model whose layers are changed, to see what a part costs; this one stays as it is.

        Parameters
        ----------
        change : callable
            From the index of a layer and the layer to what stands in its place.
        """
        layer = self._layer
        model = copy(self)
        model._layer = cache(lambda index: change(index, layer(index)))
        return model

    @torch.inference_mode()
    def logits(self, tokens: list[int], trace: Trace | None = None, observer: Observer | None = None) -> np.ndarray:
        """Run one causal pass from an empty cache, without pruning.

        Parameters
        ----------
        tokens : list of int
        trace : callable, optional
            Called for every quantized linear; the pass then sums exactly as the contract says.
        observer : Observer, optional

        Returns
        -------
        float32 array [T, vocab_size]
        """
        return self._run(tokens, None, trace, observer)

    @torch.inference_mode()
    def prune(
        self,
        tokens: list[int],
        chunks: Sequence[int],
        trace: Trace | None = None,
        observer: Observer | None = None,
    ) -> PrunedPass:
        """Run one causal pass from an empty cache, dropping rows of the prompt as `pruning` says.

        Parameters
        ----------
        tokens : list of int
            The prompt, then tokens that are not dropped, as if they were decoded.
        chunks : sequence of int
            How the prompt is cut: rows are chosen in each chunk by itself. ``[len(prompt)]`` chooses in all of it;
            `agq_tvm.runtime.engine.chunks` says how compiled models cut it.
        trace, observer : optional
            See `logits`; later layers have fewer rows.
        """
        if self.pruning is None or not 0 < sum(chunks) <= len(tokens) or min(chunks) < 1:
            raise ValueError(f"cannot prune {len(tokens)} tokens by {self.pruning} in chunks of {list(chunks)}")
        pruner = RowPruner(self.pruning, chunks, attention_positions(self.config, len(tokens)), len(tokens))
        return PrunedPass(self._run(tokens, pruner, trace, observer), tuple(pruner.kept))

    def _run(
        self, tokens: list[int], pruner: RowPruner | None, trace: Trace | None, observer: Observer | None
    ) -> np.ndarray:
        self._check_tokens(tokens)
        hidden = self._entry(tokens)
        positions, drop = attention_positions(self.config, len(tokens)), None
        for i in range(self.config.num_layers):
            layer = self._layer(i)
            watch = None if observer is None else partial(observer.attention, i)
            if pruner is not None:
                positions = pruner.positions
                watch, drop = pruner.in_layer(i, watch)
            steps = layer_steps(
                self.config, layer.norms, hidden, positions, self._half_cache, watch, drop, layer.attend
            )
            hidden = run_layer(steps, _linear_of(layer, i, trace, observer))
        return self._exit(hidden).numpy()

    def _check_tokens(self, tokens: list[int]) -> None:
        if not 0 < len(tokens) <= self.config.context_length:
            raise AgqError(f"{len(tokens)} tokens do not fit the model: give 1 to {self.config.context_length}")
        if not 0 <= min(tokens) <= max(tokens) < self.config.vocab_size:
            raise AgqError(f"there are tokens outside the model's vocabulary of {self.config.vocab_size}")


def float_entry(source: Source) -> Entry:
    """Return what makes hidden states of tokens, as the model has it."""
    return read_entry(source.config, partial(_weight, source), FloatLinear, source.tensor)


def float_exit(source: Source) -> Exit:
    """Return what makes logits of the last layer's output, as the model has it."""
    return _ends(source.config, partial(_weight, source), FloatLinear, source.tensor)[1]


def _ends(
    config: DecoderConfig,
    table: Callable[[str], Tensor],
    operator: Callable[[Tensor], Operator],
    vector: Callable[[str], np.ndarray],
) -> tuple[Entry, Exit]:
    """Read what stands before and after the layers; `operator` multiplies with a table's matrix."""
    entry = read_entry(config, table, operator, vector)
    norm = read_norm(config, config.final_norm, vector)
    project = operator(table(config.project_out)) if config.project_out else None
    head = entry.embedding if config.tied_embeddings else table(config.head)
    return entry, Exit(norm, project, operator(head))


def _operator(parts: tuple[QuantizedLinear, ...], activation: str, bits: int) -> Operator:
    if activation == "none":
        return stacked_weights(parts)
    if parts[0].is_shifted and activation == "static":
        return ShiftedOperator(parts, bits)
    if parts[0].is_shifted:  # other activations than the checkpoint's own have no exponents of channels
        parts = tuple(replace(part, alpha=None) for part in parts)
    return QuantizedOperator(parts, activation, bits)


def _weight(source: Source, name: str) -> Tensor:
    return torch.from_numpy(source.tensor(f"{name}.weight"))


def _linear_of(
    layer: Layer, index: int, trace: Trace | None, observer: Observer | None
) -> Callable[[str, Tensor], Tensor]:
    def linear(name: str, x: Tensor) -> Tensor:
        if observer is not None:
            observer.linear_input(index, name, x)
        operator = layer.linears[name]
        if trace is None or not isinstance(operator, QuantizedOperator):
            return operator(x)
        y, codes, scales, sums = operator.exact(x)
        trace(f"layers.{index}.{name}", codes.numpy(), scales.numpy(), sums.numpy())
        return y

    return linear


def _layer_bytes(config: DecoderConfig) -> int:
    return 4 * config.num_layers * sum(sum(linear.rows) * linear.in_features for linear in config.linears)
