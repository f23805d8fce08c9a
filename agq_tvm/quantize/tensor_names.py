"""The tensors of a checkpoint: their names, types and shapes, and whether a file has them."""

from collections.abc import Mapping
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.models.decoder import DecoderConfig
from agq_tvm.quantize.scheme import Scheme

TABLE_GROUP = 32
"""Channels of a group of a matrix outside the layers."""


def linear_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Name every quantized matrix of a model, in the order in which they run, with its shape (N, K)."""
    return {
        config.layer_prefix.format(layer=layer) + part: (rows, linear.in_features)
        for layer in range(config.num_layers)
        for linear in config.linears
        for part, rows in zip(linear.parts, linear.rows, strict=True)
    }


def bias_shapes(config: DecoderConfig) -> dict[str, tuple[int]]:
    """Name the bias of every quantized matrix that has one, with its shape (N,)."""
    return {
        f"{config.layer_prefix.format(layer=layer)}{part}.bias": (rows,)
        for layer in range(config.num_layers)
        for linear in config.linears
        if linear.bias
        for part, rows in zip(linear.parts, linear.rows, strict=True)
    }


def table_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Name the matrices outside the layers (embedding, head, projections) with their shape (N, K)."""
    return {getattr(config, role): shape for role, shape in config.tables.items()}


def vector_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name what stays float32, with its shape: weights and biases of norms, and the table of learned positions."""
    parts = config.norm.parts if config.norm.affine else ()
    shapes = {f"{module}.{part}": (config.hidden_size,) for module in config.norm_modules for part in parts}
    if config.position_table:
        rows = config.position_offset + config.context_length
        shapes[f"{config.position_table}.weight"] = (rows, config.hidden_size)
    return shapes


def value_scale_names(config: DecoderConfig) -> list[str]:
    """Name the scales of the values of every layer: they belong to the matrix that the values come from."""
    qkv = next(linear for linear in config.linears if linear.name == "qkv")
    prefixes = (config.layer_prefix.format(layer=layer) for layer in range(config.num_layers))
    return [f"{prefix}{qkv.parts[-1]}.value_scale" for prefix in prefixes]


def group_count(in_features: int, group_size: int) -> int:
    """Return the number of groups of a row, the last one possibly short."""
    return -(-in_features // group_size)


def expected_tensors(config: DecoderConfig, scheme: Scheme) -> dict:
    """Give the allowed types and the shape of every tensor."""
    floats = vector_shapes(config) | bias_shapes(config)
    if scheme.attention != "float":
        floats |= dict.fromkeys(value_scale_names(config), (config.num_kv_heads,))
    expected = {name: (("F32",), shape) for name, shape in floats.items()}
    for name, (rows, columns) in table_shapes(config).items():
        expected |= _expected_table(name, rows, columns, scheme.head_bits)
    for name, (rows, columns) in linear_shapes(config).items():
        groups = (rows, group_count(columns, scheme.group_of(columns)))
        expected[f"{name}.qweight"] = _expected_codes(rows, columns, scheme.weight_bits)
        expected |= _expected_grid(name, groups, scheme)
        if scheme.activation == "static":
            expected[f"{name}.act_scale"] = (("F32",), (1,))
            expected[f"{name}.act_zero"] = (("I32",), (1,))
        if scheme.max_refine:
            expected[f"{name}.alpha"] = (("I8",), (columns,) if scheme.shifts else groups[1:])
        if scheme.mixed_bits:
            expected[f"{name}.act_bits"] = (("U8",), (columns,))
            expected[f"{name}.act_steps"] = (("U8",), (columns,))
    return expected


def _expected_grid(name: str, groups: tuple[int, int], scheme: Scheme) -> dict:
    if scheme.integer_grid:
        parts = {"unit": (("F16",), groups[:1]), "step": (("U8",), groups), "low": (("I8",), groups)}
    else:
        parts = {"scales": (("F16",), groups)}
        parts |= {} if scheme.symmetric else {"offsets": (("F16", "F32"), groups)}
    return {f"{name}.{part}": form for part, form in parts.items()}


def _expected_table(name: str, rows: int, columns: int, bits: int) -> dict:
    if bits == 16:
        return {f"{name}.weight": (("F16",), (rows, columns))}
    grid = (("F16",), (rows, group_count(columns, TABLE_GROUP)))
    expected = {f"{name}.qweight": _expected_codes(rows, columns, bits), f"{name}.scales": grid}
    return expected if bits == 8 else expected | {f"{name}.offsets": grid}


def _expected_codes(rows: int, columns: int, bits: int) -> tuple[tuple[str], tuple[int, int]]:
    return (("U8",), (rows, -(-columns // 2))) if bits == 4 else (("I8",), (rows, columns))


def check_tensors(path: Path, expected: Mapping, found: Mapping) -> None:
    """Compare the tensors of a checkpoint with the expected ones.

    Raises
    ------
    AgqError
        Naming the first that is missing, unexpected, or of another type or shape.
    """
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    for names, what in ((missing, "has no tensor"), (extra, "has an unexpected tensor")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise damaged(path, f" {what} {names[0]}{more}")
    for name, (dtypes, shape) in expected.items():
        dtype, real = found[name]
        if dtype not in dtypes or real != shape:
            wanted = f"{'/'.join(dtypes)} {list(shape)}"
            raise damaged(path, f": {name} is {dtype} {list(real)}, not {wanted} as config.json says")


def damaged(path: Path, what: str) -> AgqError:
    """Return the error that says what is wrong with the tensors of the checkpoint in `path`."""
    return AgqError(f"{path / 'model.safetensors'}{what}: the checkpoint is damaged, make it again")
