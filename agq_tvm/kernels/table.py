"""The table of kernels: what there is, for which instruction set, in which layout, and which devices choose it."""

from dataclasses import asdict, dataclass, replace

from agq_tvm.kernels import activation, embedding, linear_grid, prune
from agq_tvm.kernels.activation import QuantizeKernel
from agq_tvm.kernels.attention_form import AttentionForm, AttentionKernel
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.intrin.grid_intrin import grid_dot_intrinsic, grid_unpack_intrinsic
from agq_tvm.kernels.intrin.tensor_intrin import Tile, intrinsic
from agq_tvm.kernels.linear_dense import DenseKernel, tile_of
from agq_tvm.kernels.linear_float import float_form
from agq_tvm.kernels.linear_grid import GridKernel
from agq_tvm.kernels.norm import LayerNormKernel
from agq_tvm.kernels.prune import SelectKernel
from agq_tvm.quantize.codebooks import CODE_BOOKS
from agq_tvm.targets import device_names, known, load_device

ANY = "any"
"""Stands for every instruction set: loops that LLVM makes vectors of."""
_ROWS, _COLUMNS, _CHANNELS, _CONTEXT = 128, 32000, 2048, 2048
_PACKERS = {4: "pack_linear, pack_table", 8: "pack_linear, pack_table"}


@dataclass(frozen=True)
class KernelRow:
    """One kernel.

    Attributes
    ----------
    name : str
        Of the tensor intrinsic, of the plain loops, or of a function; see `names.py`.
    operation : str
        ``"gemv"`` (decode) or ``"gemm"`` (prefill), and ``"shifted "`` before it for the integer-only form, ``"grid "``
        for weights on an integer grid; or what else is done.
    bits : str
        Weights and activations, e.g. ``"w4a8"``; or the types of what is stored.
    tile : str
        Rows x columns x channels of one call; or what one task does.
    layout : str
        How the weights are packed, see `layout.py`.
    instruction_set, instruction : str
        And the multiply that it is built on.
    packer : str
        The functions in `agq_tvm.flow.packing` that make what it reads.
    """

    name: str
    operation: str
    bits: str
    tile: str
    layout: str = "-"
    instruction_set: str = ANY
    instruction: str = "-"
    packer: str = "-"

    @property
    def features(self) -> tuple[str, ...]:
        """What a processor must have, in Linux's names."""
        return tuple(sorted(known.INSTRUCTION_SET_NEEDS.get(self.instruction_set, ())))

    @property
    def devices(self) -> tuple[str, ...]:
        """The shipped devices that choose it."""
        return devices_of(self.instruction_set)


def devices_of(instruction_set: str) -> tuple[str, ...]:
    """Return the shipped devices that choose the kernels of an instruction set."""
    names = device_names()
    return tuple(name for name in names if instruction_set in (ANY, load_device(name).instruction_set))


def kernel_table() -> list[KernelRow]:
    """List every kernel: matrix products by instruction set, then what all of them share.

    The same name in rows of 8-bit and 4-bit activations is the same kernel: the instruction set has nothing better
    for the smaller codes. Names of functions have the sizes of an example.
    """
    return [row for isa in INSTRUCTION_SETS.values() for row in _products(isa)] + _shared()


def _products(isa: InstructionSet) -> list[KernelRow]:
    rows = []
    for bits, activation_bits in ((4, 8), (4, 4), (8, 8)):
        operations = [("gemv", 1), ("gemm", isa.product_rows)]
        if isa.inline_most and bits == 4:
            operations.append((f"gemm, up to {isa.inline_most} rows", isa.product_rows))
        for operation, tile_rows in operations:
            rows.append(_row(isa, bits, activation_bits, operation, tile_rows))
            if bits == 4:
                rows.append(_row(isa, bits, activation_bits, operation, tile_rows, shifted=True))
    if isa.assembly:
        loops = {8: isa.assembly, 4: isa.assembly_4x4 if isa.multiply_4x4 else isa.assembly}
        rows += [_panel_row(isa, bits, loop) for bits, loop in loops.items() if loop]
        rows += [_panel_row(isa, bits, isa.assembly, "grid ") for bits in (8, 4) if isa.grids]
    elif isa.grids:
        known_names = {(row.name, row.bits) for row in rows}
        rows += [row for row in _grid_rows(isa) if (row.name, row.bits) not in known_names]
    return rows + [_float_row(isa, bits, *each) for bits in (4, 8) for each in (("gemv", 1), ("gemm", isa.rows))]


def _row(isa, bits: int, activation_bits: int, operation: str, rows: int, shifted: bool = False) -> KernelRow:
    packed = bits == 4 and (operation != "gemm" or (isa.inline_rows > 0 and not isa.inline_most))
    layout, stored = isa.layout(bits), 0
    tile = layout if shifted else isa.tile(bits, packed)
    if packed and operation != "gemv" and isa.inline_tile and not shifted:
        rows, tile, stored = isa.inline_tile[0], replace(layout, vectors=isa.inline_tile[1]), layout.vectors
    multiply = isa.multiply(bits, activation_bits, packed, rows)
    ahead = isa.ahead if packed else 0
    loops = f"{'shift_' if shifted else ''}loops.{isa.name}.{layout.name}.m{rows}"
    return KernelRow(
        name=intrinsic(isa, Tile(rows, tile, packed, 0, shifted, stored, ahead), activation_bits) or loops,
        operation=f"shifted {operation}" if shifted else operation,
        bits=f"w{bits}a{activation_bits}",
        tile=f"{rows}x{tile.width}x32",
        layout=layout.name,
        instruction_set=isa.name,
        instruction=multiply.instruction if multiply else "-",
        packer=_PACKERS[bits],
    )


def _grid_rows(isa: InstructionSet) -> list[KernelRow]:
    """List what multiplies weights on an integer grid, and what unpacks them for many rows."""
    layout, found = isa.layout_4bit, {}
    for operation, rows in (("gemv", 1), ("gemm", _ROWS)):
        made = linear_grid.default(GridKernel(rows, _COLUMNS, _CHANNELS, 32, False), isa)
        tile = Tile(made["rows"], layout, packed=rows == 1, ahead=made["ahead"] if rows == 1 else 0)
        found[(grid_dot_intrinsic if rows == 1 else intrinsic)(isa, tile)] = f"grid {operation}", tile
    tile = Tile(1, layout, packed=True)
    found[grid_unpack_intrinsic(isa, tile)] = "grid unpack", tile
    return [
        KernelRow(
            name,
            operation,
            bits,
            f"{tile.rows}x{tile.layout.width}x32",
            layout.name,
            isa.name,
            "vpmullw" if operation == "grid unpack" else isa.multiply(4, 8, tile.packed).instruction,
            _PACKERS[4].partition(",")[0],
        )
        for name, (operation, tile) in found.items()
        for bits in ("w4a8", "w4a4")  # 4-bit activations are bytes, too
    ]


def _panel_row(isa, activation_bits: int, loop, grid: str = "") -> KernelRow:
    layout = replace(isa.layout_4bit, vectors=loop.columns // isa.layout_4bit.lanes)
    activations = "" if loop is isa.assembly else ".a4"
    return KernelRow(
        name=f"{grid.replace(' ', '_')}panels.{isa.name}.{layout.name}{activations}.m{loop.rows}",
        operation=f"{grid}gemm, groups of {', '.join(map(str, loop.groups))}",
        bits=f"w4a{activation_bits}",
        tile=f"{loop.rows}x{loop.columns}x{loop.panel}",
        layout=isa.layout_4bit.name,
        instruction_set=isa.name,
        instruction=isa.multiply(4, activation_bits, False, loop.rows).instruction,
        packer=_PACKERS[4],
    )


def _float_row(isa, bits: int, operation: str, rows: int) -> KernelRow:
    layout = float_form(isa).layout(bits)
    return KernelRow(
        name=f"floats.{isa.name}.{layout.name}.m{rows}",
        operation=operation,
        bits=f"w{bits}a16",
        tile=f"{rows}x{layout.width}x{layout.depth}",
        layout=layout.name,
        instruction_set=isa.name,
        packer=_PACKERS[bits],
    )


def _shared() -> list[KernelRow]:
    """List what is written once for all instruction sets."""
    return [*_quantizers(), *_attention(), *_copies(), *_pruning(), *_dense()]


def _quantizers() -> list[KernelRow]:
    forms = [{"source": source} for source in activation.SOURCES]
    forms += [{"mode": "per-token"}, {"mode": "static"}, {"bits": 4}, {"refined": True}, {"terms": 2}, {"mixed": True}]
    forms += [{"mode": "static", "refined": True, "shifted": True}, {"mode": "none"}]
    plain = {"source": "plain", "rows": _ROWS, "channels": _CHANNELS, "group_size": 32, "mode": "per-token-group"}
    kernels = [QuantizeKernel(**plain | form) for form in forms]
    return [
        KernelRow(
            kernel.name,
            "float activations" if kernel.mode == "none" else "quantize",
            "float32" if kernel.mode == "none" else "a4-7" if kernel.mixed else f"a{kernel.bits}",
            "a row",
            packer="pack_linear" if kernel.refined or kernel.mixed or kernel.mode == "static" else "-",
        )
        for kernel in kernels
    ] + [KernelRow(LayerNormKernel(_ROWS, _CHANNELS, 1e-5).name, "norm", "float32", "a row")]


def _attention() -> list[KernelRow]:
    book = CODE_BOOKS["log2"]
    forms = [AttentionForm(), AttentionForm(book=book), AttentionForm("int8"), AttentionForm("int8", book)]
    sizes = (_ROWS, 32, 4, 64, _CONTEXT)
    kernels = [AttentionKernel(*sizes, form) for form in forms]
    kernels += [AttentionKernel(*sizes, **{flag: True}) for flag in ("alibi", "importance")]
    rows = [KernelRow(kernel.name, "attention", _cached(kernel), "a key head, some rows") for kernel in kernels]
    for kernel in kernels[: len(forms)]:
        for rotary, operation in ((True, "rotate and cache"), (False, "cache")):
            rows.append(KernelRow(kernel.append_name(rotary), operation, _cached(kernel), "a row"))
    return rows


def _cached(kernel: AttentionKernel) -> str:
    return ", ".join(f"{name} {dtype}" for name, _, dtype in kernel.caches if "scales" not in name)


def _copies() -> list[KernelRow]:
    layout = INSTRUCTION_SETS["generic"].layout_8bit
    look_up = embedding.build_embedding(_ROWS, _COLUMNS, _CHANNELS, layout)
    last = embedding.build_last_row(_ROWS, _CHANNELS)
    return [
        KernelRow(_name(look_up), "embedding", "w8", "a row", "that of w8", packer="pack_table"),
        KernelRow(_name(last), "last row", "float32", "a row"),
    ]


def _pruning() -> list[KernelRow]:
    kept = _ROWS * 3 // 4
    return [
        KernelRow(SelectKernel(_ROWS, kept, 32, 0, 2).name, "choose tokens", "float32", "all rows"),
        KernelRow(_name(prune.build_gather(_ROWS, kept, _CHANNELS)), "drop tokens", "float32", "a row"),
        KernelRow(_name(prune.build_places(_ROWS, _CONTEXT)), "places in the cache", "int32", "all rows"),
        KernelRow(_name(prune.build_append_positions(_ROWS, _CONTEXT)), "cache positions", "int32", "all rows"),
    ]


def _dense() -> list[KernelRow]:
    """List the float products: of heads stored in 16 bits, and what profiles compare with."""
    width = "x".join(map(str, tile_of(INSTRUCTION_SETS["generic"])))
    return [
        KernelRow(
            DenseKernel(_ROWS, _CHANNELS, _CHANNELS, storage, False).name,
            "float gemm",
            f"w{storage[5:]}a32",
            f"4x({width})x8 or more",
        )
        for storage in ("float32", "float16")
    ]


def _name(func) -> str:
    return str(func.attrs["global_symbol"])


def as_dicts() -> list[dict]:
    """Return the table as plain dictionaries."""
    return [asdict(row) | {"features": list(row.features), "devices": list(row.devices)} for row in kernel_table()]


def as_markdown() -> str:
    """Return the table as it stands in docs/kernels.md: instruction sets, then their kernels."""
    table, lines = kernel_table(), ["| instruction set | features | devices |", "|---|---|---|"]
    for isa in (*INSTRUCTION_SETS, ANY):
        first = next(row for row in table if row.instruction_set == isa)
        devices = "all" if isa == ANY else ", ".join(first.devices)
        lines.append(f"| {isa} | {', '.join(first.features) or '-'} | {devices or 'by `instruction_set` in a file'} |")
    for isa in (*INSTRUCTION_SETS, ANY):
        names = dict.fromkeys(row.name for row in table if row.instruction_set == isa)
        lines += ["", f"### {isa}", ""]
        lines += [
            "| kernel | operation | bits | tile | layout | instruction | packer |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in names:
            same = [row for row in table if row.name == name]
            bits, row = ", ".join(row.bits for row in same), same[0]
            cells = (f"`{name}`", row.operation, bits, row.tile, row.layout, row.instruction, row.packer)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
