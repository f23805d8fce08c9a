"""From a checkpoint's tensors to the packed parameters that compiled kernels read."""

import numpy as np

from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.layout import K_BLOCK, Layout, k_blocks
from agq_tvm.quantize.checkpoint import TABLE_GROUP, Checkpoint, QuantizedLinear, QuantizedTable


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


def unpack_codes(linear: QuantizedLinear) -> np.ndarray:
    """Return the 4-bit codes of a matrix, one to a byte: uint8 [N, K]."""
    pairs = np.stack([linear.qweight & 15, linear.qweight >> 4], axis=2)
    return pairs.reshape(len(linear.qweight), -1)[:, : linear.in_features]


def pack_linear(parts: tuple[QuantizedLinear, ...], layout: Layout, offsets: str | None) -> dict[str, np.ndarray]:
    """Pack matrices stacked along N: ``w``, ``ws``, and ``wo``, ``bias``, ``act`` where the form has them.

    A static zero point z becomes part of the bias: -s_x · z · Σ_k w[n, k].
    """
    first = parts[0]
    codes = np.concatenate([unpack_codes(part) for part in parts])
    scales = np.concatenate([part.scales for part in parts])
    packed = {
        "w": pack_codes(codes, first.group_size, layout),
        "ws": layout.pack_columns(scales),
    }
    if offsets:
        values = np.concatenate([_offsets(part) for part in parts])
        packed["wo"] = layout.pack_columns(values.astype(offsets))
    if first.act_scale is not None:
        scale, zero = float(first.act_scale[0]), int(first.act_zero[0])
        sums = np.concatenate([_weight_sums(part) for part in parts])
        bias = (-scale * zero * sums).astype("float32")
        packed["bias"] = np.ascontiguousarray(layout.pack_columns(bias[:, None])[:, 0])
        packed["act"] = np.array([scale, zero], "float32")
    return packed


def pack_codes(codes: np.ndarray, group_size: int, layout: Layout) -> np.ndarray:
    """Fill a short last group with zeros and pack: uint8 [N, K] to the layout's tiles."""
    channels = codes.shape[1]
    padded = k_blocks(channels, group_size) * K_BLOCK
    full = np.full((len(codes), padded), layout.zero, "uint8")
    full[:, :channels] = codes
    packed = layout.pack(full)
    return packed.view("int8") if layout.bits == 8 and layout.zero else packed


def pack_table(table: QuantizedTable, layout: Layout) -> dict[str, np.ndarray]:
    """Pack an embedding or lm_head of signed bytes."""
    codes = table.qweight.view("uint8") + np.uint8(128)
    return {"w": pack_codes(codes, TABLE_GROUP, layout), "ws": layout.pack_columns(table.scales)}


def _offsets(linear: QuantizedLinear) -> np.ndarray:
    return linear.offsets if linear.offsets is not None else linear.scales * np.float16(-8)


def _weight_sums(linear: QuantizedLinear) -> np.ndarray:
    """Return Σ_k w[n, k], float64 [N]."""
    codes = unpack_codes(linear).astype("float64")
    starts = np.arange(0, linear.in_features, linear.group_size)
    lengths = np.diff([*starts, linear.in_features])
    sums = np.add.reduceat(codes, starts, axis=1)
    return (sums * linear.scales + _offsets(linear).astype("float64") * lengths).sum(1)


class Packer:
    """Makes the packed parameters of a checkpoint by name, holding one linear at a time.

    Parameters
    ----------
    checkpoint : Checkpoint
    isa : InstructionSet
    context : int
        Length of the rotary tables.
    offsets : str or None
        `offsets_dtype` of the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, isa: InstructionSet, context: int, offsets: str | None):
        self.checkpoint, self.isa, self.context, self.offsets = checkpoint, isa, context, offsets
        self._last: tuple[str, dict[str, np.ndarray]] = ("", {})

    def array(self, name: str) -> np.ndarray:
        """Return the packed parameter of that name, e.g. ``"layers.3.qkv.w"``."""
        owner, _, part = name.rpartition(".")
        if owner == "rope":
            return dict(zip(("cos", "sin"), self.checkpoint.config.rope_tables(self.context), strict=True))[part]
        vector = self._vector_name(name)
        if vector is not None:
            return self.checkpoint.vector(vector)
        if self._last[0] != owner:
            self._last = (owner, self._pack(owner))
        return self._last[1][part]

    def _vector_name(self, name: str) -> str | None:
        config = self.checkpoint.config
        if name == "final_norm":
            return f"{config.final_norm}.weight"
        for norm, module in (("input_norm", config.input_norm), ("mlp_norm", config.mlp_norm)):
            if name.endswith(f".{norm}"):
                layer = int(name.split(".")[1])
                return f"{config.layer_prefix.format(layer=layer)}{module}.weight"
        return None

    def _pack(self, owner: str) -> dict[str, np.ndarray]:
        config = self.checkpoint.config
        if owner in ("embedding", "head"):
            table = self.checkpoint.table(getattr(config, owner))
            return pack_table(table, self.isa.layout_8bit)
        _, layer, role = owner.split(".")
        parts = next(linear.parts for linear in config.linears if linear.name == role)
        return pack_linear(self.checkpoint.fused(int(layer), parts), self.isa.layout_4bit, self.offsets)
