"""The table of kernels: what there is, for which instruction set, and in which layout."""

from dataclasses import asdict, dataclass

from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.linear_float import float_form


@dataclass(frozen=True)
class KernelRow:
    """One kernel.

    Attributes
    ----------
    name : str
        Of the tensor intrinsic, or of the plain loops. Float activations (a16) have loops that LLVM vectorizes.
    operation : str
        ``"gemv"`` (decode) or ``"gemm"`` (prefill), and ``"shifted "`` before it for the integer-only form.
    bits : str
        Weights and activations, e.g. ``"w4a8"``.
    tile : str
        Rows x columns x channels of one call.
    layout : str
        How the weights are packed, see `layout.py`.
    instruction_set, instruction : str
        And the multiply that it is built on.
    """

    name: str
    operation: str
    bits: str
    tile: str
    layout: str
    instruction_set: str
    instruction: str


def kernel_table() -> list[KernelRow]:
    """List every matrix-product kernel.

    The same name in rows of 8-bit and 4-bit activations is the same kernel: the instruction set has nothing better
    for the smaller codes.
    """
    rows = []
    for isa in INSTRUCTION_SETS.values():
        for bits, activation_bits in ((4, 8), (4, 4), (8, 8)):
            for operation, tile_rows in (("gemv", 1), ("gemm", isa.rows)):
                rows.append(_row(isa, bits, activation_bits, operation, tile_rows))
                if bits == 4:
                    rows.append(_row(isa, bits, activation_bits, operation, tile_rows, shifted=True))
        rows += [_float_row(isa, bits, *each) for bits in (4, 8) for each in (("gemv", 1), ("gemm", isa.rows))]
    return rows


def _row(isa, bits: int, activation_bits: int, operation: str, rows: int, shifted: bool = False) -> KernelRow:
    from agq_tvm.kernels.intrin.base import intrinsic

    packed = bits == 4 and operation == "gemv"
    layout, multiply = isa.layout(bits), isa.multiply(bits, activation_bits, packed)
    loops = f"{'shift_' if shifted else ''}loops.{isa.name}.{layout.name}.m{rows}"
    tile = layout if shifted else isa.tile(bits, packed)
    name = intrinsic(isa, tile, packed, rows, activation_bits, shifted) or loops
    return KernelRow(
        name=name,
        operation=f"shifted {operation}" if shifted else operation,
        bits=f"w{bits}a{activation_bits}",
        tile=f"{rows}x{tile.width}x32",
        layout=layout.name,
        instruction_set=isa.name,
        instruction=multiply.instruction if multiply else "-",
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
        instruction="-",
    )


def as_dicts() -> list[dict]:
    """Return the table as plain dictionaries."""
    return [asdict(row) for row in kernel_table()]
