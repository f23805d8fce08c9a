"""Activation codes of 4 to 7 bits with a zero point for each group of a row, see `agq_tvm.quantize.mixed`."""

from agq_tvm.kernels.emit import LANES, float32, reduce_lanes
from agq_tvm.kernels.layout import K_BLOCK, Layout
from agq_tvm.quantize.mixed_format import FRACTION_MASK, LARGEST_SCALE, SMALLEST_SCALE, TOP
from agq_tvm.tvm_seam import T, tirx


def quantize_mixed_row(kernel, powers, m, y, outputs, layout: Layout) -> None:
    """Quantize a row into codes, scales and sums of codes.

    Parameters
    ----------
    kernel : QuantizeKernel
    powers : float32 buffer [3, padded K]
        Of each channel: one over its width, 2^e of its extra bits e, and its step.
    m
        The row.
    y : float32 buffer [padded K]
        Its values.
    outputs : buffers
        See `QuantizeKernel.output_shapes`.
    layout : Layout
    """
    codes, scales, sums = outputs
    size = kernel.group_size
    low, high = (T.sblock_alloc_buffer((LANES,), "float32") for _ in range(2))
    counts = T.sblock_alloc_buffer((LANES,), "int32")
    least, most = (T.sblock_alloc_buffer((1,), "float32") for _ in range(2))
    grid = T.sblock_alloc_buffer((3,), "float32")  # scale, its inverse, zero point
    total = T.sblock_alloc_buffer((1,), "int32")
    with T.serial(kernel.groups) as g:
        with T.vectorized(LANES) as j:
            T.buffer_store(low, float32(0), [j])
            T.buffer_store(high, float32(0), [j])
            T.buffer_store(counts, tirx.const(0, "int32"), [j])
        with T.serial(size // LANES) as c, T.vectorized(LANES) as j:
            k = g * size + c * LANES + j
            T.buffer_store(y, y[k] * powers[0, k], [k])
            T.buffer_store(low, tirx.min(low[j], y[k]), [j])
            T.buffer_store(high, tirx.max(high[j], y[k]), [j])
        reduce_lanes(low, tirx.min, least)
        reduce_lanes(high, tirx.max, most)
        _store_grid(least[0], most[0], grid)
        T.buffer_store(scales, grid[0], [m, g])
        with T.serial(size // LANES) as c, T.vectorized(LANES) as j:
            k = g * size + c * LANES + j
            q = tirx.nearbyint(y[k] * grid[1] * powers[1, k])
            q = tirx.max(q, (float32(0) - grid[2]) * powers[1, k])
            q = tirx.min(q, (float32(TOP) - grid[2]) * powers[1, k])
            T.buffer_store(y, q * powers[2, k], [k])
            T.buffer_store(counts, counts[j] + T.Cast("int32", y[k]), [j])
        with T.serial(size // LANES) as c, T.vectorized(LANES) as j:
            k = g * size + c * LANES + j
            code = T.Cast("int8", T.Cast("int32", y[k]))
            T.buffer_store(codes, code, [k // K_BLOCK, m, *layout.place(k % K_BLOCK)])
        reduce_lanes(counts, lambda a, b: a + b, total)
        T.buffer_store(sums, total[0], [m, g])


def _store_grid(low, high, grid) -> None:
    """Store the scale that spreads 0..TOP over `low` to `high`, rounded up, its inverse and the zero point."""
    scale = tirx.max(tirx.min((high - low) / float32(TOP), float32(LARGEST_SCALE)), float32(SMALLEST_SCALE))
    bits = T.bitwise_and(tirx.reinterpret("int32", scale) + FRACTION_MASK, ~FRACTION_MASK)
    T.buffer_store(grid, tirx.reinterpret("float32", bits), [0])
    T.buffer_store(grid, float32(1) / grid[0], [1])
    T.buffer_store(grid, tirx.min(float32(0) - tirx.nearbyint(low * grid[1]), float32(TOP)), [2])
