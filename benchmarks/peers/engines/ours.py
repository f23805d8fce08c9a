"""agq_tvm: activations quantized by one kernel, multiplied by the next, as compiled models do it.

Symmetric weights, like those of the other engines: scales of groups in float16. Activation scales of tokens, or of the
weights' groups, which is what `agq quantize` takes if nothing else is asked for.
"""

import numpy as np

from benchmarks.peers.base import Form, Operands, Product, copy_of

ENVIRONMENT = ""
PACKAGE = "apache-tvm"
PRODUCTS = (
    Form("agq_tvm g32", "g32"),
    Form("agq_tvm g32, group scales", "g32"),
    Form("agq_tvm g128", "g128"),
    Form("agq_tvm g128, group scales", "g128"),
)


class Product(Product):
    """See `benchmarks.peers.base.Product`."""

    def prepare(self, operands: Operands) -> None:
        """See `Product.prepare`."""
        from agq_tvm.kernels import activation, linear
        from agq_tvm.kernels.instruction_sets import instruction_set
        from agq_tvm.runtime.engine import use_threads
        from agq_tvm.targets import load_device
        from benchmarks import limits

        use_threads(self.threads)
        device = load_device("host")
        isa = instruction_set(device.instruction_set)
        layout, x, size = isa.layout_4bit, operands.x, int(self.form.kind[1:])
        codes, scales = operands.grid(size)
        (rows, channels), columns = x.shape, len(codes)
        by_group = "group scales" in self.form.name
        mode = "per-token-group" if by_group else "per-token"
        quantizing = activation.QuantizeKernel("plain", rows, channels, size, mode)
        product = linear.LinearKernel(rows, columns, channels, 4, size, by_group, None, False)
        self._quantize, _ = limits.compiled(activation.build(quantizing, layout), device)
        self._multiply, _ = limits.compiled(linear.build(product, isa), device)

        def placed(array: np.ndarray):
            copy = limits.aligned_empty(array.shape, str(array.dtype))
            copy[:] = array
            self._arrays.append(copy)
            return limits.from_numpy(copy)

        self._arrays: list[np.ndarray] = []
        made = [np.zeros(shape, kind) for shape, kind in quantizing.output_shapes(layout)]
        self._x, self._made = placed(x), [placed(array) for array in made]
        self._weights = []
        for i in range(operands.copies):
            w, s = layout.pack(copy_of(codes, i)), layout.pack_columns(copy_of(scales, i).astype("float16"))
            self._weights.append((placed(w), placed(s)))
        self.stored_bytes = w.nbytes + s.nbytes
        self._out = placed(np.zeros((rows, layout.tiles(columns) * layout.width), "float32"))
        self._y, self._columns = self._arrays[-1], columns

    def run(self) -> None:
        """See `Product.run`."""
        for w, s in reversed(self._weights):  # the first comes last: its product is the result
            self._quantize(self._x, *self._made)
            self._multiply(*self._made, w, s, self._out)

    def result(self) -> np.ndarray:
        """See `Product.result`."""
        return self._y[:, : self._columns]


def limits_here(threads: int) -> dict[str, float]:
    """Measure the machine's limits once: GB/s read from memory, and GOP/s multiplied in registers."""
    from benchmarks import limits

    if threads not in _LIMITS:
        from agq_tvm.runtime.engine import use_threads

        use_threads(threads)
        _LIMITS[threads] = limits.memory_limit(threads), limits.multiply_limit(threads=threads)
    memory, multiply = _LIMITS[threads]
    return {"GB/s": memory.rate()} | ({"GOP/s": multiply.rate()} if multiply else {})


_LIMITS: dict[int, tuple] = {}
