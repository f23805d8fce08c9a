"""From a float or 4-bit model to a quantized checkpoint."""

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.files import fresh_directory
from agq_tvm.models.decoder import DecoderConfig
from agq_tvm.progress import progress, say
from agq_tvm.quantize.calibration_report import CalibrationReport
from agq_tvm.quantize.checkpoint import QuantizedLinear, Table, stored, write_checkpoint
from agq_tvm.quantize.fold import folded
from agq_tvm.quantize.integer_grid import count_coarse
from agq_tvm.quantize.mixed_format import average_bits
from agq_tvm.quantize.pruning import PruningSchedule
from agq_tvm.quantize.scheme import GROUP_SIZES, Scheme, check_roles, roles_of
from agq_tvm.quantize.source import Source, open_source, quantize_matrix
from agq_tvm.quantize.tables import quantize_table
from agq_tvm.quantize.tensor_names import group_count, linear_shapes, table_shapes, vector_shapes
from agq_tvm.quantize.texts import load_text, title
from agq_tvm.quantize.weights import dequantize
from agq_tvm.runtime.engine import prompt_chunks

if TYPE_CHECKING:
    from agq_tvm.quantize.head import HeadFit

KEPT_GROUP = 32


@dataclass(frozen=True)
class Calibration:
    """The text that GPTQ, static activations and the scales of values look at.

    Attributes
    ----------
    text : str
        See `agq_tvm.quantize.texts.load_text`.
    samples : int
        Windows taken from it.
    length : int
        Tokens of a window.
    seed : int or None
        Draws the windows at random; None spreads them evenly.
    """

    text: str = "calibration"
    samples: int = 64
    length: int = 512
    seed: int | None = None


def quantize(
    model: str | os.PathLike | Source,
    output: str | os.PathLike,
    method: str | None = None,
    group_size: int | str | None = None,
    symmetric: bool = False,
    activation: str = "per-token-group",
    max_refine: int = 0,
    four_bit: tuple[str, ...] = (),
    calibration: Calibration | None = None,
    pruning: PruningSchedule | None = None,
    attention: str = "float",
    shifts: bool = False,
    weight_bits: int = 4,
    mixed_bits: float = 0,
    fold: bool = False,
    head_bits: int = 8,
    integer_grid: bool = False,
) -> dict:
    """Quantize a model and write the checkpoint.

    Parameters
    ----------
    model : str, path-like or Source
        See `agq_tvm.quantize.source.open_source`.
    output : path-like
        The directory to write; an earlier checkpoint there is replaced.
    method : {"gptq", "rtn", "keep"}, optional
        Default: ``"rtn"`` for 8 bits; ``"keep"`` if every matrix of the model is 4 bit already, and neither `fold` nor
        `integer_grid` asks for other weights; else ``"gptq"``.
    group_size : int or str, optional
        32, 64, 128, or ``"column"`` for one scale of each output column. Default: the model's own 32 for
        ``"keep"``; else 128 if it divides the inner dimension of every matrix, and 64 if not.
    symmetric : bool
        Leave out the offsets; ``"keep"`` takes over what the model has, and 8-bit weights never have any.
    activation : {"per-token-group", "per-token", "static", "none"}
    max_refine : int
        TRIP's largest exponent, 0 for none; for ``"per-token"`` and ``"static"``.
    four_bit : tuple of str
        The linears, e.g. ``("o", "gate_up", "down")``, whose inputs get 4-bit codes; ``"gate_up"`` and ``"up"`` are
        the same, whether there is a gate or not.
    calibration : Calibration, optional
        Used by ``"gptq"``, by static activations, by TRIP, by quantized attention and by a head of 4 bits.
    pruning : PruningSchedule, optional
        Drop tokens of a prompt in some layers; by default none are. Calibration drops them, too, in the chunks of a
        compiled model.
    attention : {"float", "log2", "log2-paper"}
        What probabilities of attention are rounded to, see `agq_tvm.quantize.codebooks.CODE_BOOKS`; unless
        ``"float"``, values are cached as int8.
    shifts : bool
        TRIP in the paper's integer-only form, with `group_size` ``"column"``, static activations and `max_refine`.
    weight_bits : {4, 8}
        Of the linears' weight codes.
    mixed_bits : float
        Not 0: the largest average of bits of an activation, scales included. Channels get codes of 4 to 7 bits
        by what their errors do to the loss. For ``"per-token-group"``.
    fold : bool
        First move powers of two from the norms into the weights that read them, which changes no float. Not with
        ``"keep"``.
    head_bits : {4, 8, 16}
        Of embedding, head and projections outside the layers; 16 is float16, and a head of 4 bits is calibrated.
        Where a model has such a table with a grid of 4 or 8 bits in groups of 32, that is kept.
    integer_grid : bool
        Scales and offsets of a column's groups are whole multiples of one unit, for ``"per-token"`` and ``"static"``;
        not with ``"keep"``, see `agq_tvm.quantize.integer_grid`.

    Returns
    -------
    dict
        ``method``, ``group_size``, ``symmetric``, ``activation``, ``max_refine``, ``four_bit``, ``pruning`` (None,
        or ``layers``, ``beta`` and ``renumber``), ``attention``, ``shifts``, ``weight_bits``, ``mixed_bits``, ``fold``,
        ``head_bits``, ``integer_grid``,
        ``calibration`` (None, or the ``text`` with its ``sha256``, and the ``samples``, ``length`` and ``seed`` of its
        windows), ``activation_bits`` (the average at the inputs of the layers' linears, scales included; 32 for float
        ones), ``bytes`` of the weights file, ``bits_per_weight`` of the matrices with scales and offsets,
        ``relative_weight_error`` (root of the summed squared error over that of the weights), ``coarse_groups`` (share
        of the groups on an integer grid that have fewer than 8 codes), ``clipped`` (None, or for
        static activations what `agq_tvm.quantize.calibration_report.CalibrationReport.summary` returns; the report
        itself lies beside the weights), and ``seconds``.

    Raises
    ------
    AgqError
        If the model cannot be read, the arguments do not fit it, or the output cannot be written.
    """
    started = time.perf_counter()
    source = open_source(model)
    if not method and weight_bits == 4 and (fold or integer_grid):
        method = "gptq"
    chosen = _choose_weights(source, method, group_size, symmetric, weight_bits)
    scheme = Scheme(
        *chosen,
        activation,
        max_refine,
        roles_of(source.config, four_bit),
        pruning,
        attention,
        shifts=shifts,
        weight_bits=weight_bits,
        mixed_bits=mixed_bits,
        fold=fold,
        head_bits=head_bits,
        integer_grid=integer_grid,
    )
    source = folded(source) if fold else source
    check_roles(source.config, scheme.four_bit)
    if pruning is not None:
        pruning.check_layers(source.config.num_layers)
    calibration = calibration or Calibration()
    with fresh_directory(output, "checkpoint") as directory:
        source.copy_tokenizer(directory)
        windows = _windows(directory, calibration, scheme, source)
        looked_at = None if windows is None else _described(calibration, windows)
        say(f"quantizing {source.label}: {scheme.method}, {scheme.weight_scales}")
        report = CalibrationReport()
        head = _head_fit(source, scheme)
        weights = _Weights(source, _linears(source, scheme, windows, report, head))
        tables = ((name, _table(source, name, head_bits, head)) for name in table_shapes(source.config))
        vectors = ((name, source.tensor(name)) for name in vector_shapes(source.config))
        write_checkpoint(directory, source.raw_config, scheme, weights, tables, vectors, looked_at)
        if report.linears:
            report.write(directory)
        size = (directory / "model.safetensors").stat().st_size
    return {
        **asdict(scheme),
        "calibration": looked_at,
        "activation_bits": weights.activation_bits(source.config, scheme),
        "bytes": size,
        "bits_per_weight": weights.bits,
        "relative_weight_error": weights.relative_error,
        "coarse_groups": weights.coarse_groups,
        "clipped": report.summary() or None,
        "seconds": time.perf_counter() - started,
    }


def _choose_weights(
    source: Source, method: str | None, group_size: int | str | None, symmetric: bool, weight_bits: int
) -> tuple[str, int | str, bool]:
    """Return method, group size and whether it is symmetric."""
    if weight_bits == 8:
        method, symmetric = method or "rtn", True
    method = method or ("keep" if source.is_four_bit else "gptq")
    if method == "keep" and weight_bits != 8:
        if not source.is_four_bit:
            raise AgqError(f"{source.label} is not 4 bit, there is no grid to keep: choose gptq or rtn")
        if group_size not in (None, KEPT_GROUP):
            raise AgqError(f"keep leaves the model's own groups of {KEPT_GROUP}: choose gptq or rtn for others")
        if symmetric and not source.is_symmetric:
            raise AgqError(f"{source.label} has offsets, keep cannot make it symmetric: choose gptq or rtn")
        return method, KEPT_GROUP, source.is_symmetric
    largest = max(GROUP_SIZES)
    if group_size is None:
        fits = all(linear.in_features % largest == 0 for linear in source.config.linears)
        group_size = largest if fits else 64
    return method, group_size, symmetric


def _windows(directory: Path, calibration: Calibration, scheme: Scheme, source: Source) -> list[list[int]] | None:
    if not scheme.is_calibrated:
        return None
    from agq_tvm.quantize.calibration import cut_windows

    length = min(calibration.length, source.config.context_length)
    return cut_windows(directory / "tokenizer.json", calibration.text, calibration.samples, length, calibration.seed)


def _described(calibration: Calibration, windows: list[list[int]]) -> dict:
    """Say what was looked at, for the record."""
    return {
        "text": title(calibration.text, "train"),
        "sha256": load_text(calibration.text, "train")[1],
        "samples": len(windows),
        "length": len(windows[0]),
        "seed": calibration.seed,
    }


def _linears(
    source: Source,
    scheme: Scheme,
    windows: list[list[int]] | None,
    report: CalibrationReport,
    head: "HeadFit | None",
) -> Iterable[tuple[str, QuantizedLinear]]:
    """Quantize the matrices; `report` is told of static activations, and `head` of what comes out of the layers."""
    if windows is not None:
        from agq_tvm.quantize.sensitivity import choose_formats
        from agq_tvm.quantize.streaming import quantize_layers, with_formats

        formats = None
        if scheme.mixed_bits:
            formats = choose_formats(source, windows, scheme.group_size, scheme.mixed_bits)
            if not replace(scheme, mixed_bits=0).is_calibrated:
                linears = ((name, quantize_matrix(source, name, scheme)) for name in linear_shapes(source.config))
                return with_formats(source.config, linears, formats)
        look = head.look if head else None
        return quantize_layers(source, scheme, windows, prompt_chunks(len(windows[0])), report.add, formats, look)
    names = progress(linear_shapes(source.config), "quantizing")
    return ((name, quantize_matrix(source, name, scheme)) for name in names)


def _head_fit(source: Source, scheme: Scheme) -> "HeadFit | None":
    """Return what rounds the head, for one of 4 bits that has no grid yet."""
    if scheme.head_bits != 4:
        return None
    from agq_tvm.quantize.head import HeadFit

    head = HeadFit(source)
    return head if source.kept_table(head.name, 4) is None else None


def _table(source: Source, name: str, bits: int, head: "HeadFit | None") -> Table:
    kept = source.kept_table(name, bits)
    if kept is not None:
        return kept
    if head and name == head.name:
        return head.quantized()
    return quantize_table(source.tensor(f"{name}.weight"), bits)


_WEIGHT_FIELDS = ("qweight", "scales", "offsets", "unit", "step", "low")


class _Weights:
    """Quantized matrices as they are made; what passes is measured, and not kept."""

    def __init__(self, source: Source, linears: Iterable[tuple[str, QuantizedLinear]]) -> None:
        self._source = source
        self._linears = linears
        self._stored_bytes = self._count = self._coarse = self._groups = 0
        self._error = self._total = 0.0
        self._activation_bits: dict[str, np.ndarray] = {}

    def __iter__(self) -> Iterator[tuple[str, QuantizedLinear]]:
        for name, linear in self._linears:
            self._measure(name, linear)
            yield name, linear

    def _measure(self, name: str, linear: QuantizedLinear) -> None:
        weight = self._source.tensor(f"{name}.weight")
        self._stored_bytes += sum(value.nbytes for field, value in stored(linear) if field in _WEIGHT_FIELDS)
        self._count += weight.size
        if linear.act_bits is not None:
            self._activation_bits[name] = linear.act_bits
        if linear.unit is not None:
            self._coarse += count_coarse(weight, linear.unit, linear.group_size)
            self._groups += linear.scales.size
        difference = dequantize(linear)
        difference -= weight
        self._error += _squares(difference)
        self._total += _squares(weight)

    @property
    def bits(self) -> float:
        """Bits of a weight, with its scales and offsets."""
        return 8 * self._stored_bytes / self._count

    @property
    def coarse_groups(self) -> float:
        """Share of the groups on an integer grid that have fewer than 8 codes."""
        return self._coarse / max(self._groups, 1)

    def activation_bits(self, config: DecoderConfig, scheme: Scheme) -> float:
        """Return the average bits of the activations that the layers' linears read, their scales included."""
        if not scheme.mixed_bits:
            return _uniform_bits(config, scheme)
        prefixes = [config.layer_prefix.format(layer=layer) for layer in range(config.num_layers)]
        first = [prefix + linear.parts[0] for prefix in prefixes for linear in config.linears]
        return average_bits([self._activation_bits[name] for name in first], scheme.group_size)

    @property
    def relative_error(self) -> float:
        """Root of the summed squared error over that of the weights."""
        return float(np.sqrt(self._error / self._total)) if self._total else 0.0


def _squares(values: np.ndarray) -> float:
    """Sum the squares of a float32 array [N, K], without a copy of it."""
    return float(np.einsum("nk,nk->n", values, values).sum(dtype="float64"))


def _uniform_bits(config: DecoderConfig, scheme: Scheme) -> float:
    """Return the average bits of the activations that the layers' linears read, where all have the scheme's."""
    if scheme.activation == "none":
        return 32.0
    stored = channels = 0
    for linear in config.linears:
        groups = group_count(linear.in_features, scheme.group_of(linear.in_features))
        scales = {"per-token": 1, "per-token-group": groups, "static": 0}[scheme.activation]
        stored += scheme.activation_bits(linear.name) * linear.in_features + 32 * scales
        channels += linear.in_features
    return stored / channels
