"""From a checkpoint's tensors to the packed parameters that compiled kernels read."""

from dataclasses import replace

import numpy as np

from agq_tvm.kernels import linear_dense
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.intrin.grid_intrin import ZERO as GRID_ZERO
from agq_tvm.kernels.layout import K_BLOCK, Layout, k_blocks
from agq_tvm.kernels.linear import ZERO
from agq_tvm.quantize.checkpoint import Checkpoint, QuantizedLinear, Table
from agq_tvm.quantize.integer_grid import to_integers
from agq_tvm.quantize.mixed_format import BITS, widths
from agq_tvm.quantize.shifts import block_shifts, channel_order, check_totals


def offsets_dtype(checkpoint: Checkpoint) -> str | None:
    """Return the type that holds every group offset of a checkpoint exactly; None if all are symmetric."""
    config = checkpoint.config
    dtypes = {
        linear.offsets.dtype
        for layer in range(config.num_layers)
        for fused in config.linears
        for linear in checkpoint.fused(layer, fused.parts)
        if linear.offsets is not None
    }
    return str(np.result_type(*dtypes)) if dtypes else None


def check_overflow(checkpoint: Checkpoint) -> None:
    """Check that no activations can make an accumulator overflow that is shifted.

    Raises
    ------
    AgqError
        Naming the first matrix where some can.
    """
    if not checkpoint.scheme.shifts:
        return
    config = checkpoint.config
    for layer in range(config.num_layers):
        for fused in config.linears:
            bits = checkpoint.scheme.activation_bits(fused.name)
            for part, linear in zip(fused.parts, checkpoint.fused(layer, fused.parts), strict=True):
                name = config.layer_prefix.format(layer=layer) + part
                check_totals(name, unpack_codes(linear), linear.alpha, bits)


def unpack_codes(linear: QuantizedLinear) -> np.ndarray:
    """Return the codes of a matrix, one to a byte, as layouts take them: uint8 [N, K], of 8 bits plus 128."""
    if linear.bits == 8:
        return linear.qweight.view("uint8") + np.uint8(128)
    pairs = np.stack([linear.qweight & 15, linear.qweight >> 4], axis=2)
    return pairs.reshape(len(linear.qweight), -1)[:, : linear.in_features]


def pack_linear(
    parts: tuple[QuantizedLinear, ...], layout: Layout, offsets: str | None, grid: bool = False
) -> dict[str, np.ndarray]:
    """Pack matrices stacked along N: ``w``, ``ws``, and where the form has them ``wo``, ``bias``, ``refine``, ``act``
    and ``powers``; with `grid`, of matrices on an integer grid, ``w``, ``step``, ``low`` and ``ws``.

    A static zero point z becomes part of the bias: b[n] - s_x · z · Σ_k w[n, k]. TRIP's powers of two become
    part of scales and offsets, and their inverses per channel are ``refine``. Exponents that shift give ``order``
    (the channel that stands at each place, where ``w`` and ``refine`` have it) and ``shift`` instead.
    """
    parts = tuple(_refined(part) for part in parts)
    first = parts[0]
    codes = np.concatenate([unpack_codes(part) for part in parts])
    scales = np.concatenate([part.scales for part in parts])
    order = channel_order(first.alpha) if first.is_shifted else slice(None)
    packed = {"w": pack_codes(codes[:, order], first.group_size, layout)}
    packed |= _pack_grid(parts, layout) if grid else {"ws": layout.pack_columns(scales)}
    if offsets and not grid:
        values = np.concatenate([_offsets(part) for part in parts])
        packed["wo"] = layout.pack_columns(values.astype(offsets))
    if first.act_scale is not None or any(part.bias is not None for part in parts):
        constant = np.concatenate([_constant(part) for part in parts]).astype("float32")
        packed["bias"] = np.ascontiguousarray(layout.pack_columns(constant[:, None])[:, 0])
    if first.alpha is not None:
        inverse = np.exp2(-first.alpha.astype("float32"))
        channels = inverse[order] if first.is_shifted else np.repeat(inverse, first.group_size)[: first.in_features]
        packed["refine"] = channels
    if first.act_scale is not None:
        packed["act"] = np.concatenate([first.act_scale, first.act_zero]).astype("float32")
    if first.is_shifted:
        packed |= {"order": order, "shift": block_shifts(first.alpha)}
    if first.act_bits is not None:
        bits, steps = first.act_bits.astype("int64"), first.act_steps.astype("int64")
        exponents = np.zeros((3, k_blocks(first.in_features, first.group_size) * K_BLOCK))
        exponents[:, : first.in_features] = -widths(bits, steps), bits - min(BITS), steps
        packed["powers"] = np.exp2(exponents).astype("float32")
    return packed


def _pack_grid(parts: tuple[QuantizedLinear, ...], layout: Layout) -> dict[str, np.ndarray]:
    """Pack what puts codes on an integer grid; columns that fill up the last tile have the unit 0."""
    integers = [to_integers(part.unit, part.scales, part.offsets) for part in parts]
    units, steps = np.concatenate([part.unit for part in parts]), np.concatenate([step for step, _ in integers])
    lows = np.concatenate([low for _, low in integers]).astype("int16") + GRID_ZERO
    return {
        "step": layout.pack_columns(steps),
        "low": layout.pack_columns(lows.astype("uint8")),
        "ws": layout.pack_columns(units[:, None]),
    }


def pack_codes(codes: np.ndarray, group_size: int, layout: Layout) -> np.ndarray:
    """Fill a short last group with zeros and pack: uint8 [N, K] to the layout's tiles."""
    channels = codes.shape[1]
    padded = k_blocks(channels, group_size) * K_BLOCK
    full = np.full((len(codes), padded), layout.zero, "uint8")
    full[:, :channels] = codes
    packed = layout.pack(full)
    return packed.view("int8") if layout.bits == 8 and layout.zero else packed


def layout_name(isa: InstructionSet, head_bits: int) -> str:
    """Name the packed layout of the matrices outside the layers; those of floats are called e.g. ``f16_v4x16``."""
    vectors, lanes = linear_dense.tile_of(isa)
    return f"f16_v{vectors}x{lanes}" if head_bits == 16 else isa.layout(head_bits).name


def pack_table(table: Table, isa: InstructionSet) -> dict[str, np.ndarray]:
    """Pack a matrix outside the layers, such as the embedding."""
    if isinstance(table, QuantizedLinear):
        return pack_linear((table,), isa.layout(table.bits), None if table.offsets is None else "float16")
    columns, channels = table.shape
    padded = k_blocks(channels, K_BLOCK) * K_BLOCK
    tiles, _, vectors, lanes = linear_dense.packed_shape(columns, padded, isa)
    full = np.zeros((tiles * vectors * lanes, padded), "float16")
    full[:columns, :channels] = table
    return {"w": np.ascontiguousarray(full.reshape(tiles, vectors, lanes, padded).transpose(0, 3, 1, 2))}


def _refined(linear: QuantizedLinear) -> QuantizedLinear:
    """Multiply the groups of a linear by their powers of two."""
    if linear.alpha is None or linear.is_shifted:
        return linear
    offsets = None if linear.offsets is None else np.ldexp(linear.offsets, linear.alpha)
    return replace(linear, scales=np.ldexp(linear.scales, linear.alpha), offsets=offsets)


def _offsets(linear: QuantizedLinear) -> np.ndarray:
    """Return what codes of 0 stand for: float16 or float32 [N, G], exactly."""
    if linear.offsets is not None:
        return linear.offsets
    return linear.scales.astype("float32") * -np.float32(ZERO[linear.bits])


def _constant(linear: QuantizedLinear) -> np.ndarray:
    """Return what is added to every row of a linear's result, float64 [N]."""
    constant = np.zeros(len(linear.qweight)) if linear.bias is None else linear.bias.astype("float64")
    if linear.act_scale is None:
        return constant
    return constant - float(linear.act_scale[0]) * int(linear.act_zero[0]) * _weight_sums(linear)


def _weight_sums(linear: QuantizedLinear) -> np.ndarray:
    """Return Σ_k w[n, k], float64 [N]; with exponents of channels Σ_k 2^alpha[k] w[n, k]."""
    powers = np.exp2(linear.alpha, dtype="float64") if linear.is_shifted else np.ones(linear.in_features)
    starts = np.arange(0, linear.in_features, linear.group_size)
    counts = np.add.reduceat(powers, starts)
    sums = np.add.reduceat(unpack_codes(linear) * powers, starts, axis=1)
    return (sums * linear.scales + _offsets(linear).astype("float64") * counts).sum(1)


class Packer:
    """Makes the packed parameters of a checkpoint by name, holding one linear at a time.

    Parameters
    ----------
    checkpoint : Checkpoint
    isa : InstructionSet
    context : int
        Positions of the rotary tables and of learned positions.
    offsets : str or None
        `offsets_dtype` of the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, isa: InstructionSet, context: int, offsets: str | None):
        self.checkpoint, self.isa, self.context, self.offsets = checkpoint, isa, context, offsets
        self._last: tuple[str, dict[str, np.ndarray]] = ("", {})

    def array(self, name: str) -> np.ndarray:
        """Return the packed parameter of that name, e.g. ``"layers.3.qkv.w"``."""
        owner, _, part = name.rpartition(".")
        config = self.checkpoint.config
        if owner == "rope":
            return dict(zip(("cos", "sin"), config.rope_tables(self.context), strict=True))[part]
        if name == "alibi.slopes":
            return config.alibi_slopes()
        if name == "position_table":
            table = self.checkpoint.vector(f"{config.position_table}.weight")
            return table[config.position_offset :][: self.context]
        if part == "value_scale":
            return self.checkpoint.value_scale(int(owner.split(".")[1]))
        if owner.endswith("_norm"):
            return self._norm(owner)[part]
        if self._last[0] != owner:
            self._last = (owner, self._pack(owner))
        return self._last[1][part]

    def _norm(self, owner: str) -> dict[str, np.ndarray]:
        """Return the vectors of a norm, ``"final_norm"`` or e.g. ``"layers.3.input_norm"``, by their part."""
        config = self.checkpoint.config
        *layer, role = owner.split(".")
        prefix = config.layer_prefix.format(layer=layer[1]) if layer else ""
        module = prefix + getattr(config, role)
        vectors = config.norm.vectors(module, config.hidden_size, self.checkpoint.vector)
        return dict(zip(config.norm.parts, vectors, strict=True))

    def _pack(self, owner: str) -> dict[str, np.ndarray]:
        config = self.checkpoint.config
        if owner in config.tables:
            return pack_table(self.checkpoint.table(getattr(config, owner)), self.isa)
        _, layer, role = owner.split(".")
        parts = next(linear.parts for linear in config.linears if linear.name == role)
        layout = self.isa.layout(self.checkpoint.scheme.weight_bits)
        grid = self.checkpoint.scheme.integer_grid and self.isa.grids
        return pack_linear(self.checkpoint.fused(int(layer), parts), layout, self.offsets, grid)
