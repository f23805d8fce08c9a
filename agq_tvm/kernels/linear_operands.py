"""The operands of a quantized matrix product, for whatever computes it."""

from agq_tvm.kernels.intrin.base import stored_dtype
from agq_tvm.kernels.layout import K_BLOCK, Layout, k_blocks
from agq_tvm.tvm_seam import T


def declare_operands(kernel, layout: Layout) -> dict:
    """Declare the arguments of the function of a `LinearKernel` or `GridKernel`, in order, and return them by name.

    Rows of codes R, M or 2 M; tiles NT, groups G, k-blocks KB; S, V, L, D from the layout:

    - x int8 [KB, R, S, 2, D], activation codes
    - sx float32 [R, G or 1], activation scales
    - xsum int32 [R, G], sums of the codes of a group; [R, 1] for a `GridKernel`, whose sums are those of rows
    - w uint8 [NT, KB, S, V, L, D] or of 8 bit [NT, KB, S, 2, V, L, D]
    - ws float16 [NT, G, V, L]; wo the same shape, if any; on an integer grid step, low uint8 [NT, G, V, L], low plus
      128, and ws float16 [NT, 1, V, L] instead
    - bias float32 [NT, V, L], if any
    - out float32 [M, NT * V * L]
    """
    tiles, blocks = layout.tiles(kernel.columns), k_blocks(kernel.channels, kernel.group_size)
    per_group = (tiles, kernel.groups, layout.vectors, layout.lanes)
    codes = "uint8" if kernel.bits == 4 else stored_dtype(layout)
    forms = {
        "x": ((blocks, kernel.code_rows, layout.steps, 2, layout.depth), "int8"),
        "sx": ((kernel.code_rows, kernel.groups if kernel.per_group else 1), "float32"),
        "xsum": ((kernel.code_rows, kernel.code_sums), "int32"),
        "w": (layout.packed_shape(kernel.columns, blocks * K_BLOCK), codes),
    }
    if kernel.offsets == "grid":
        forms |= {"step": (per_group, "uint8"), "low": (per_group, "uint8")}
        forms |= {"ws": ((tiles, 1, *per_group[2:]), "float16")}
    else:
        forms |= {"ws": (per_group, "float16")}
        forms |= {"wo": (per_group, kernel.offsets)} if kernel.offsets else {}
    forms |= {"bias": ((tiles, layout.vectors, layout.lanes), "float32")} if kernel.bias else {}
    forms |= {"out": ((kernel.rows, tiles * layout.width), "float32")}
    return {name: T.arg(name, T.buffer(*form)) for name, form in forms.items()}
