"""From a float or 4-bit model to a quantized checkpoint."""

import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.files import fresh_directory
from agq_tvm.progress import progress, say
from agq_tvm.quantize.checkpoint import (
    QuantizedLinear,
    QuantizedTable,
    group_count,
    linear_shapes,
    table_shapes,
    vector_shapes,
    write_checkpoint,
)
from agq_tvm.quantize.fold import folded
from agq_tvm.quantize.mixed_format import average_bits
from agq_tvm.quantize.pruning import PruningSchedule
from agq_tvm.quantize.scheme import GROUP_SIZES, Scheme, check_roles
from agq_tvm.quantize.source import Source, open_source, quantize_matrix
from agq_tvm.quantize.weights import dequantize, quantize_table

KEPT_GROUP = 32


@dataclass(frozen=True)
class Calibration:
    """The text that GPTQ, static activations and the scales of values look at.

    Attributes
    ----------
    text : str
        A name of `agq_tvm.quantize.texts.TEXTS` or a file.
    samples : int
        Windows taken from it, evenly spread.
    length : int
        Tokens of a window.
    """

    text: str = "calibration"
    samples: int = 64
    length: int = 512


def quantize(
    model: str | os.PathLike | Source,
    output: str | os.PathLike,
    method: str | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    activation: str = "per-token-group",
    max_refine: int = 0,
    four_bit: tuple[str, ...] = (),
    calibration: Calibration | None = None,
    pruning: PruningSchedule | None = None,
    attention: str = "float",
    mixed_bits: float = 0,
    fold: bool = False,
) -> dict:
    """Quantize a model and write the checkpoint.

    Parameters
    ----------
    model : str, path-like or Source
        See `agq_tvm.quantize.source.open_source`.
    output : path-like
        The directory to write; an earlier checkpoint there is replaced.
    method : {"gptq", "rtn", "keep"}, optional
        Default: ``"keep"`` if every matrix of the model is 4 bit already, else ``"gptq"``.
    group_size : int, optional
        32, 64 or 128. Default: the model's own 32 for ``"keep"``; else 128 if it divides the inner dimension
        of every matrix, and 64 if not.
    symmetric : bool
        Leave out the offsets; ``"keep"`` takes over what the model has.
    activation : {"per-token-group", "per-token", "static", "none"}
    max_refine : int
        TRIP's largest exponent, 0 for none; for ``"per-token"`` and ``"static"``.
    four_bit : tuple of str
        The linears, e.g. ``("o", "gate_up", "down")``, whose inputs get 4-bit codes.
    calibration : Calibration, optional
        Used by ``"gptq"``, by static activations, by TRIP and by quantized attention.
    pruning : PruningSchedule, optional
        Drop tokens of a prompt in some layers; by default none are. Calibration runs without.
    attention : {"float", "log2", "log2-paper"}
        What probabilities of attention are rounded to, see `agq_tvm.quantize.codebooks.CODE_BOOKS`; unless
        ``"float"``, values are cached as int8.
    mixed_bits : float
        Not 0: the largest average of bits of an activation, scales included. Channels get codes of 4 to 7 bits
        by what their errors do to the loss. For ``"per-token-group"``.
    fold : bool
        First move powers of two from the norms into the weights that read them, which changes no float. Not with
        ``"keep"``.

    Returns
    -------
    dict
        ``method``, ``group_size``, ``symmetric``, ``activation``, ``max_refine``, ``four_bit``, ``pruning`` (None,
        or ``layers`` and ``beta``), ``attention``, ``mixed_bits``, ``fold``, ``activation_bits`` (the average at the
        inputs of the layers' linears, scales included; 32 for float ones), ``bytes`` of the weights file,
        ``bits_per_weight`` of the matrices with their scales and offsets, ``relative_weight_error``
        (root of the summed squared error over that of the weights), and ``seconds``.

    Raises
    ------
    AgqError
        If the model cannot be read, the arguments do not fit it, or the output cannot be written.
    """
    started = time.perf_counter()
    source = open_source(model)
    weights = _choose_weights(source, method, group_size, symmetric)
    scheme = Scheme(
        *weights, activation, max_refine, tuple(four_bit), pruning, attention, mixed_bits=mixed_bits, fold=fold
    )
    source = folded(source) if fold else source
    check_roles(source.config, scheme.four_bit)
    if pruning is not None:
        pruning.check_layers(source.config.num_layers)
    calibration = calibration or Calibration()
    with fresh_directory(output, "checkpoint") as directory:
        source.copy_tokenizer(directory)
        windows = _windows(directory, calibration, scheme, source)
        say(f"quantizing {source.label}: {scheme.method}, groups of {scheme.group_size}")
        linears = _linears(source, scheme, windows)
        tables = {name: _table(source, name) for name in table_shapes(source.config)}
        vectors = {name: source.tensor(name) for name in vector_shapes(source.config)}
        error = _relative_error(source, linears)
        write_checkpoint(directory, source.raw_config, scheme, linears, tables, vectors)
        size = (directory / "model.safetensors").stat().st_size
    return {
        **asdict(scheme),
        "activation_bits": _activation_bits(source, scheme, linears),
        "bytes": size,
        "bits_per_weight": _bits_per_weight(linears),
        "relative_weight_error": error,
        "seconds": time.perf_counter() - started,
    }


def _choose_weights(
    source: Source, method: str | None, group_size: int | None, symmetric: bool
) -> tuple[str, int, bool]:
    """Return method, group size and whether it is symmetric."""
    method = method or ("keep" if source.is_four_bit else "gptq")
    if method == "keep":
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
    return cut_windows(directory / "tokenizer.json", calibration.text, calibration.samples, length)


def _linears(source: Source, scheme: Scheme, windows: list[list[int]] | None) -> dict[str, QuantizedLinear]:
    if windows is not None:
        from agq_tvm.quantize.sensitivity import choose_formats
        from agq_tvm.quantize.streaming import quantize_layers, with_formats

        formats = None
        if scheme.mixed_bits:
            formats = choose_formats(source, windows, scheme.group_size, scheme.mixed_bits)
            if not replace(scheme, mixed_bits=0).is_calibrated:
                linears = {name: quantize_matrix(source, name, scheme) for name in linear_shapes(source.config)}
                return with_formats(source.config, linears, formats)
        return quantize_layers(source, scheme, windows, formats)
    names = progress(linear_shapes(source.config), "quantizing")
    return {name: quantize_matrix(source, name, scheme) for name in names}


def _table(source: Source, name: str) -> QuantizedTable:
    return source.kept_table(name) or quantize_table(source.tensor(f"{name}.weight"))


def _relative_error(source: Source, linears: dict[str, QuantizedLinear]) -> float:
    error = total = 0.0
    for name, linear in progress(linears.items(), "comparing", total=len(linears)):
        weight = source.tensor(f"{name}.weight")
        error += float(np.square(dequantize(linear) - weight, dtype="float64").sum())
        total += float(np.square(weight, dtype="float64").sum())
    return float(np.sqrt(error / total)) if total else 0.0


def _activation_bits(source: Source, scheme: Scheme, linears: dict[str, QuantizedLinear]) -> float:
    """Return the average bits of the activations that the layers' linears read, their scales included."""
    config = source.config
    if scheme.activation == "none":
        return 32.0
    if scheme.mixed_bits:
        prefixes = [config.layer_prefix.format(layer=layer) for layer in range(config.num_layers)]
        first = [prefix + linear.parts[0] for prefix in prefixes for linear in config.linears]
        return average_bits([linears[name].bits for name in first], scheme.group_size)
    stored = channels = 0
    for linear in config.linears:
        groups = group_count(linear.in_features, scheme.group_size)
        scales = {"per-token": 1, "per-token-group": groups, "static": 0}[scheme.activation]
        stored += scheme.activation_bits(linear.name) * linear.in_features + 32 * scales
        channels += linear.in_features
    return stored / channels


def _bits_per_weight(linears: dict[str, QuantizedLinear]) -> float:
    stored = weights = 0
    for linear in linears.values():
        stored += linear.qweight.nbytes + linear.scales.nbytes
        stored += 0 if linear.offsets is None else linear.offsets.nbytes
        weights += len(linear.qweight) * linear.in_features
    return 8 * stored / weights
