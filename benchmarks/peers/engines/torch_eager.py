"""PyTorch: int8 weights with dynamic int8 activations (x86 and oneDNN kernels), bfloat16 and float32."""

import numpy as np

from benchmarks.peers.base import Form, Operands, Product, copy_of

ENVIRONMENT = "shared"
PACKAGE = "torch"
PRODUCTS = (
    Form("torch int8 (onednn)", "int8"),
    Form("torch int8 (x86)", "int8"),
    Form("torch bfloat16", "float"),
    Form("torch float32", "float"),
)
_DTYPES = {"torch bfloat16": "bfloat16", "torch float32": "float32"}


class Product(Product):
    """See `benchmarks.peers.base.Product`."""

    def prepare(self, operands: Operands) -> None:
        """See `Product.prepare`."""
        import torch

        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(False)
        self._x = torch.from_numpy(operands.x)
        w = operands.w
        copies = (torch.from_numpy(copy_of(w, i)) for i in range(operands.copies))
        if self.form.kind == "int8":
            self._calls = self._int8(torch, copies)
            self.stored_bytes = w.size + 4 * len(w)
        else:
            dtype = getattr(torch, _DTYPES[self.form.name])
            self._calls = [self._float(torch, copy.to(dtype)) for copy in copies]
            self.stored_bytes = w.size * dtype.itemsize

    def _int8(self, torch, copies) -> list:
        torch.backends.quantized.engine = "onednn" if "onednn" in self.form.name else "x86"
        calls = []
        for w in copies:
            scales = w.abs().amax(1) / 127
            zeros = torch.zeros(len(w), dtype=torch.int64)
            quantized = torch.quantize_per_channel(w, scales, zeros, 0, torch.qint8)
            packed = torch.ops.quantized.linear_prepack(quantized, None)
            # With reduce_range off: these kernels need the whole range only where there is VNNI, as here.
            calls.append(lambda packed=packed: torch.ops.quantized.linear_dynamic(self._x, packed, False))
        return calls

    def _float(self, torch, w):
        linear = torch.nn.functional.linear
        return lambda: linear(self._x.to(w.dtype), w).to(torch.float32)

    def run(self) -> None:
        """See `Product.run`."""
        self._first = self._calls[0]()
        for call in self._calls[1:]:
            call()

    def result(self) -> np.ndarray:
        """See `Product.result`."""
        return self._first.numpy()
