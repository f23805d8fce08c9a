"""The quantized checkpoint: what it holds, writing it, and reading it without trusting it."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import numpy as np
from safetensors import SafetensorError, safe_open

from agq_tvm.errors import AgqError
from agq_tvm.files import read_json, write_json
from agq_tvm.models.decoder import DecoderConfig
from agq_tvm.models.registry import describe
from agq_tvm.quantize.integer_grid import is_valid as is_on_grid
from agq_tvm.quantize.integer_grid import to_integers, to_scales
from agq_tvm.quantize.mixed_format import is_valid
from agq_tvm.quantize.pruning import read_schedule
from agq_tvm.quantize.scheme import Scheme, check_roles
from agq_tvm.quantize.shifts import BLOCK, is_blocked
from agq_tvm.quantize.tensor_file import write_tensors
from agq_tvm.quantize.tensor_names import (
    TABLE_GROUP,
    check_tensors,
    damaged,
    expected_tensors,
    linear_shapes,
    table_shapes,
    value_scale_names,
)

FORMAT_VERSION = 1
_FIELDS = (
    "qweight",
    "scales",
    "offsets",
    "bias",
    "act_scale",
    "act_zero",
    "alpha",
    "value_scale",
    "act_bits",
    "act_steps",
    "unit",
)


@dataclass(frozen=True)
class QuantizedLinear:
    """A matrix of 4-bit or 8-bit codes: ``w[n, k] = scales[n, k // g] * q[n, k] + offsets[n, k // g]``.

    Attributes
    ----------
    qweight : uint8 array [N, ceil(K / 2)], or int8 array [N, K]
        4 bit: codes 0..15, two to a byte, the even k in the low nibble. 8 bit: codes -127..127.
    scales : float16 array [N, G]
        G is ``ceil(K / group_size)``. A scale may be negative (GGUF's Q4_0 has such).
    offsets : float16 or float32 array [N, G], or None
        None if symmetric: -8 times the scale for 4 bit, 0 for 8 bit.
    in_features : int
        K.
    group_size : int
    bias : float32 array [N] or None
    act_scale : float32 array [1] or None
        Static activations only: ``x = act_scale * (code - act_zero)``.
    act_zero : int32 array [1] or None
    alpha : int8 array [G], or [K], or None
        TRIP's exponents: activations of a group are divided by 2^alpha before they are rounded; with shifts those
        of a channel (see `agq_tvm.quantize.shifts`).
    value_scale : float32 array [KV] or None
        The matrix that values come from, with quantized attention only: static scale of every KV head's values,
        ``v = value_scale * code``.
    act_bits : uint8 array [K] or None
        With a budget of activation bits: those of each channel's codes, see `agq_tvm.quantize.mixed`.
    act_steps : uint8 array [K] or None
        The exponent of each channel's step then.
    unit : float16 array [N] or None
        With an integer grid: what scales and offsets are whole multiples of, see `agq_tvm.quantize.integer_grid`.
        A file has the multiples instead of these.
    """

    qweight: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None
    in_features: int
    group_size: int
    bias: np.ndarray | None = None
    act_scale: np.ndarray | None = None
    act_zero: np.ndarray | None = None
    alpha: np.ndarray | None = None
    value_scale: np.ndarray | None = None
    act_bits: np.ndarray | None = None
    act_steps: np.ndarray | None = None
    unit: np.ndarray | None = None

    @property
    def is_shifted(self) -> bool:
        """Whether exponents are those of channels, and shift the accumulator."""
        return self.alpha is not None and len(self.alpha) > self.scales.shape[1]

    @property
    def bits(self) -> int:
        """Of a code: 4 or 8."""
        return 8 if self.qweight.dtype == np.int8 else 4


Table = QuantizedLinear | np.ndarray
"""A matrix outside the layers: float16 [V, K], or codes of 8 bits (symmetric) or 4 bits in groups of 32."""


def quantization_config(raw_config: Mapping) -> dict | None:
    """Return our part of a ``config.json``, or None if it is not of a checkpoint of ours."""
    ours = raw_config.get("quantization_config")
    return ours if isinstance(ours, dict) and ours.get("quant_method") == "agq" else None


def write_checkpoint(
    directory: str | os.PathLike,
    raw_config: Mapping,
    scheme: Scheme,
    linears: Iterable[tuple[str, QuantizedLinear]],
    tables: Iterable[tuple[str, Table]],
    vectors: Iterable[tuple[str, np.ndarray]],
    calibration: Mapping | None = None,
) -> None:
    """Write ``model.safetensors`` and ``config.json`` into an existing directory.

    Parameters
    ----------
    directory : path-like
    raw_config : mapping
        The source model's Hugging Face config.
    scheme : Scheme
    linears, tables, vectors : iterable
        With the names of `linear_shapes`, `table_shapes` and `vector_shapes`; each is written when it comes, and not
        kept.
    calibration : mapping, optional
        What was looked at, for the record.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    directory = Path(directory)
    names = expected_tensors(describe(dict(raw_config)), scheme)
    tensors = _tensors(linears, tables, vectors)
    write_tensors(directory / "model.safetensors", names, tensors, {"format": "agq"})
    described = {"quant_method": "agq", "format_version": FORMAT_VERSION, **asdict(scheme)}
    described |= {"table_group_size": TABLE_GROUP}
    if calibration is not None:
        described["calibration"] = dict(calibration)
    write_json(directory / "config.json", {**raw_config, "quantization_config": described})


def _tensors(
    linears: Iterable[tuple[str, QuantizedLinear]],
    tables: Iterable[tuple[str, Table]],
    vectors: Iterable[tuple[str, np.ndarray]],
) -> Iterator[tuple[str, np.ndarray]]:
    for name, matrix in chain(linears, tables):
        if isinstance(matrix, np.ndarray):
            yield f"{name}.weight", matrix
            continue
        for field, value in stored(matrix):
            yield f"{name}.{field}", value
    for name, value in vectors:
        yield name, value.astype("float32", copy=False)


def stored(matrix: QuantizedLinear) -> list[tuple[str, np.ndarray]]:
    """List what a file has of a matrix, by the last part of its tensors' names."""
    fields = {field: getattr(matrix, field) for field in _FIELDS}
    if matrix.unit is not None:
        steps, lows = to_integers(matrix.unit, fields.pop("scales"), fields.pop("offsets"))
        fields |= {"step": steps, "low": lows}
    return [(field, value) for field, value in fields.items() if value is not None]


def read_checkpoint(path: str | os.PathLike) -> "Checkpoint":
    """Open a quantized checkpoint; names, types and shapes are checked now, values when they are read.

    Raises
    ------
    AgqError
        If it is not a checkpoint of ours, is damaged, or contradicts itself.
    """
    path = Path(path)
    raw_config = read_json(path / "config.json", "quantized checkpoint")
    ours = quantization_config(raw_config)
    if ours is None:
        raise AgqError(f"{path} is not a quantized checkpoint: make one with `agq quantize`")
    try:
        scheme = _read_scheme(ours)
        config = describe(raw_config)
        check_roles(config, scheme.four_bit)
        if scheme.pruning is not None:
            scheme.pruning.check_layers(config.num_layers)
    except AgqError as error:
        raise AgqError(f"{path}: {error}") from error
    try:
        file = safe_open(path / "model.safetensors", framework="numpy")
        found = {name: file.get_slice(name) for name in file.keys()}
        found = {name: (value.get_dtype(), tuple(value.get_shape())) for name, value in found.items()}
    except (SafetensorError, OSError) as error:
        raise damaged(path, f" cannot be read ({error})") from error
    check_tensors(path, expected_tensors(config, scheme), found)
    return Checkpoint(path, config, scheme, MappingProxyType(raw_config), file)


class Checkpoint:
    """A quantized checkpoint on disk; made by `read_checkpoint`.

    Attributes
    ----------
    path : Path
    config : DecoderConfig
    scheme : Scheme
    raw_config : mapping
        The contents of ``config.json``.
    """

    def __init__(self, path: Path, config: DecoderConfig, scheme: Scheme, raw_config: Mapping, file) -> None:
        self.path = path
        self.config = config
        self.scheme = scheme
        self.raw_config = raw_config
        self._file = file
        self._names = frozenset(file.keys())

    def linear(self, name: str) -> QuantizedLinear:
        """Read one matrix, e.g. ``"model.layers.0.self_attn.q_proj"``."""
        act_scale, act_zero = self._optional(f"{name}.act_scale"), self._optional(f"{name}.act_zero")
        if act_scale is not None and not (act_scale[0] > 0 and -127 <= act_zero[0] <= 127):
            raise self._damaged(f"{name} has an activation scale or zero point out of range")
        alpha = self._optional(f"{name}.alpha")
        if alpha is not None and not (alpha.min() >= 0 and alpha.max() <= self.scheme.max_refine):
            raise self._damaged(f"{name} has exponents outside 0..{self.scheme.max_refine}")
        if self.scheme.shifts and not is_blocked(alpha):
            raise self._damaged(f"{name} has exponents that are not those of blocks of {BLOCK} channels, the last 0")
        in_features = linear_shapes(self.config)[name][1]
        bits, steps = self._optional(f"{name}.act_bits"), self._optional(f"{name}.act_steps")
        if bits is not None and not is_valid(bits, steps):
            raise self._damaged(f"{name} has bits or steps of activations out of range")
        scales, offsets, unit = self._grid(name)
        return QuantizedLinear(
            qweight=self._read(f"{name}.qweight"),
            scales=scales,
            offsets=offsets,
            in_features=in_features,
            group_size=self.scheme.group_of(in_features),
            bias=self._optional(f"{name}.bias"),
            act_scale=act_scale,
            act_zero=act_zero,
            alpha=alpha,
            value_scale=self._optional(f"{name}.value_scale"),
            act_bits=bits,
            act_steps=steps,
            unit=unit,
        )

    def _grid(self, name: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Read scales, offsets and unit of a matrix."""
        if not self.scheme.integer_grid:
            return self._read(f"{name}.scales"), self._optional(f"{name}.offsets"), None
        unit, steps, lows = (self._read(f"{name}.{part}") for part in ("unit", "step", "low"))
        if not is_on_grid(unit, steps, lows):
            raise self._damaged(f"{name} has an integer grid whose units, steps or offsets are out of range")
        return *to_scales(unit, steps, lows), unit

    def fused(self, layer: int, parts: tuple[str, ...]) -> tuple[QuantizedLinear, ...]:
        """Read the matrices that share one input; static activations and exponents must agree on it.

        Parameters
        ----------
        layer : int
        parts : tuple of str
            `Linear.parts`.
        """
        prefix = self.config.layer_prefix.format(layer=layer)
        linears = tuple(self.linear(prefix + part) for part in parts)
        fields = [(each.act_scale, each.act_zero, each.alpha, each.act_bits, each.act_steps) for each in linears]
        if len({tuple(None if value is None else value.tobytes() for value in values) for values in fields}) > 1:
            raise self._damaged(f"{', '.join(parts)} of layer {layer} disagree on their shared input")
        return linears

    def value_scale(self, layer: int) -> np.ndarray:
        """Read the scales of a layer's values, float32 [KV]; for quantized attention only."""
        name = value_scale_names(self.config)[layer]
        scales = self._read(name)
        if not (scales > 0).all():
            raise self._damaged(f"{name} has a scale out of range")
        return scales

    def table(self, name: str) -> Table:
        """Read a matrix outside the layers, e.g. the embedding, ``"model.embed_tokens"``."""
        if self.scheme.head_bits == 16:
            return self._read(f"{name}.weight")
        codes, scales = self._read(f"{name}.qweight"), self._read(f"{name}.scales")
        channels = table_shapes(self.config)[name][1]
        return QuantizedLinear(codes, scales, self._optional(f"{name}.offsets"), channels, TABLE_GROUP)

    def vector(self, name: str) -> np.ndarray:
        """Read what stays float32 (see `vector_shapes`), e.g. ``"model.norm.weight"``."""
        return self._read(name)

    def with_four_bit(self, roles: tuple[str, ...]) -> "Checkpoint":
        """Return this checkpoint with 4-bit codes at the inputs of these linears, whatever its own scheme says."""
        return Checkpoint(self.path, self.config, replace(self.scheme, four_bit=roles), self.raw_config, self._file)

    def _optional(self, name: str) -> np.ndarray | None:
        return self._read(name) if name in self._names else None

    def _read(self, name: str) -> np.ndarray:
        try:
            value = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(f"{name} cannot be read ({error})") from error
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise self._damaged(f"{name} has values that are not finite")
        return value

    def _damaged(self, what: str) -> AgqError:
        return damaged(self.path, f": {what}")


def _read_scheme(ours: Mapping) -> Scheme:
    version = ours.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise AgqError(
            f"checkpoint format {version!r} is not format {FORMAT_VERSION}: quantize the model again "
            "with this version of agq"
        )
    if ours.get("table_group_size") != TABLE_GROUP:
        raise AgqError(f"table_group_size {ours.get('table_group_size')!r} is not supported, only {TABLE_GROUP} is")
    four_bit = ours.get("four_bit", [])
    if not isinstance(four_bit, list):
        raise AgqError(f"four_bit must be a list of linears, not {four_bit!r}")
    values = (ours.get(name) for name in ("method", "group_size", "symmetric", "activation"))
    pruning, attention = read_schedule(ours.get("pruning")), ours.get("attention", "float")
    names = ("shifts", "weight_bits", "mixed_bits", "fold", "head_bits", "integer_grid")
    more = {name: ours[name] for name in names if name in ours}
    return Scheme(*values, ours.get("max_refine", 0), tuple(four_bit), pruning, attention, **more)
