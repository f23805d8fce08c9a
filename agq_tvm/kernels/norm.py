"""LayerNorm in float: where a norm's result is more than the input of one linear."""

from dataclasses import dataclass

from agq_tvm.kernels.emit import LANES, float32, lane_chunks, reduce_lanes, task_loop
from agq_tvm.kernels.space import Space, rows_of_task
from agq_tvm.tvm_seam import IRBuilder, T, tirx


@dataclass(frozen=True)
class LayerNormKernel:
    """Shapes of one LayerNorm: M rows of K channels."""

    rows: int
    channels: int
    epsilon: float

    @property
    def name(self) -> str:
        """E.g. ``layer_norm_m128_k1024``."""
        return f"layer_norm_m{self.rows}_k{self.channels}"


def space(kernel: LayerNormKernel) -> Space:
    """Return the decision of a LayerNorm: the rows that a thread takes at a time."""
    return Space({"rows": rows_of_task(kernel.rows)}, {"rows": 1})


def build_layer_norm(kernel: LayerNormKernel, decisions: dict[str, int] | None = None):
    """Return the kernel: x float32 [M, K], gain and bias float32 [K]; out float32 [M, K]."""
    M, K = kernel.rows, kernel.channels
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(kernel.name)
            T.func_attr({"global_symbol": kernel.name, "tirx.noalias": True})
            x = T.arg("x", T.buffer((M, K), "float32"))
            gain, bias = (T.arg(name, T.buffer((K,), "float32")) for name in ("gain", "bias"))
            out = T.arg("out", T.buffer((M, K), "float32"))
            with task_loop("row", M, [x, gain, bias], [out], decisions["rows"] if decisions else 1) as m:
                partial = T.sblock_alloc_buffer((LANES,), "float32")
                moments = T.sblock_alloc_buffer((2,), "float32")
                store_moments(x, m, K, kernel.epsilon, partial, moments)
                chunks, lanes = lane_chunks(K)
                with T.serial(chunks) as c, T.vectorized(lanes) as j:
                    k = c * lanes + j
                    T.buffer_store(out, (x[m, k] - moments[1]) * moments[0] * gain[k] + bias[k], [m, k])
    return builder.get()


def store_moments(x, m, channels: int, epsilon: float, partial, moments) -> None:
    """Store 1 / sqrt(variance + ε) and mean of a row into `moments`; the variance is of differences from the mean."""
    store_sum(partial, moments, channels, lambda k: x[m, k])
    T.buffer_store(moments, moments[0] / float32(channels), [1])
    store_sum(partial, moments, channels, lambda k: (x[m, k] - moments[1]) * (x[m, k] - moments[1]))
    variance = moments[0] / float32(channels)
    T.buffer_store(moments, float32(1) / tirx.sqrt(variance + float32(epsilon)), [0])


def store_sum(partial, result, extent: int, value) -> None:
    """Store Σ ``value(k)`` for k below `extent` into ``result[0]``."""
    with T.vectorized(LANES) as j:
        T.buffer_store(partial, float32(0), [j])
    chunks, lanes = lane_chunks(extent)
    with T.serial(chunks) as c, T.vectorized(lanes) as j:
        T.buffer_store(partial, partial[j] + value(c * lanes + j), [j])
    reduce_lanes(partial, lambda a, b: a + b, result)
