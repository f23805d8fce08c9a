"""Small helpers to emit TIR: whole-buffer regions, reductions over lanes, and vectorizable functions."""

from contextlib import ExitStack, contextmanager

from agq_tvm.tvm_seam import T, tirx

LANES = 16
"""Floats handled together; LLVM splits them for narrower registers."""


def whole(buffer):
    """Return the region of a whole buffer."""
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]


@contextmanager
def task_loop(name: str, tasks: int, reads, writes, each: int = 1):
    """Open a block that runs once for each task, in parallel, and yield the task's index.

    A thread takes `each` tasks at a time, a divisor of their number; none is parallel if it takes all.
    """
    with ExitStack() as stack:
        threads = tasks // each
        index = stack.enter_context(T.parallel(threads) if threads > 1 else T.serial(threads))
        if each > 1:
            index = index * each + stack.enter_context(T.serial(each))
        stack.enter_context(T.sblock(name))
        task = T.axis.spatial(tasks, index)
        T.reads(*[whole(buffer) for buffer in reads])
        T.writes(*[whole(buffer) for buffer in writes])
        yield task


def fma(a, b, c):
    """Return a · b + c of floats, rounded once: the target has to have an instruction for it."""
    return tirx.call_llvm_pure_intrin("float32", "llvm.fma", a, b, c)


def lane_chunks(extent: int, lanes: int = LANES) -> tuple[int, int]:
    """Split an extent into chunks of the most lanes that divide it."""
    while extent % lanes:
        lanes //= 2
    return extent // lanes, lanes


def store_vector(buffer, extent: int, value, lanes: int = LANES) -> None:
    """Store ``value(i)`` for every i below `extent` into a one-dimensional buffer, in vectors."""
    chunks, lanes = lane_chunks(extent, lanes)
    with T.serial(chunks) as c, T.vectorized(lanes) as j:
        T.buffer_store(buffer, value(c * lanes + j), [c * lanes + j])


def reduce_lanes(partial, combine, result) -> None:
    """Combine the `LANES` values of `partial` into ``result[0]``."""
    T.buffer_store(result, partial[0], [0])
    for lane in range(1, LANES):
        T.buffer_store(result, combine(result[0], partial[lane]), [0])


def reduce_integers(partial, operation: str, result) -> None:
    """Combine the `LANES` int32 of `partial` into ``result[0]`` by LLVM's reduction: ``"add"`` or ``"smax"``."""
    lanes = partial.vload([0], f"int32x{LANES}")
    name = f"llvm.vector.reduce.{operation}.v{LANES}i32"
    T.buffer_store(result, tirx.call_llvm_pure_intrin("int32", name, lanes), [0])


def float32(value: float):
    """Make a float32 constant."""
    return tirx.const(value, "float32")


def rounded(x):
    """Return the int32 nearest to float32 x, ties to even, for |x| < 2^22.

    Floats from 2^23 to 2^24 have no fraction, and their bits count up with them. The fence keeps LLVM from
    rounding a product and this sum at once.
    """
    product = tirx.call_llvm_pure_intrin("float32", "llvm.arithmetic.fence", x)
    return tirx.reinterpret("int32", product + float32(1.5 * 2.0**23)) - tirx.const(0x4B400000, "int32")


def erf(x):
    """Return the error function of float32 x within 5e-7, as arithmetic that vectorizes.

    Abramowitz and Stegun, formula 7.1.26: 1 - p(t) e^(-x²) with t = 1 / (1 + 0.3275911 |x|).
    """
    magnitude = tirx.max(x, float32(0) - x)
    t = float32(1) / (float32(1) + float32(0.3275911) * magnitude)
    poly = float32(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        poly = poly * t + float32(coefficient)
    value = float32(1) - poly * t * exp(float32(0) - magnitude * magnitude)
    return T.Select(x < float32(0), float32(0) - value, value)


def exp(x):
    """Return e^x for float32 x as arithmetic that vectorizes; TVM would call the C library for each lane.

    x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for e^r (Cephes' coefficients), and 2^n by its bits. Within
    2 units in the last place of the true value for -87 <= x <= 88; clamped outside.
    """
    x = tirx.max(tirx.min(x, float32(88.0)), float32(-87.0))
    n = tirx.nearbyint(x * float32(1.4426950408889634))
    r = x - n * float32(0.693359375) + n * float32(2.12194440e-4)
    poly = float32(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        poly = poly * r + float32(coefficient)
    poly = poly * r * r + r + float32(1.0)
    bits = T.shift_left(T.Cast("int32", n) + 127, 23)
    return poly * tirx.reinterpret("float32", bits)
