"""ExecuTorch: 4-bit weights with 8-bit activations of tokens (8da4w) on XNNPACK.

All copies are calls of one program, each with an input of its own. A program is kept, as exporting takes long.
"""

from pathlib import Path

import numpy as np

from benchmarks.peers.base import Form, Operands, Product, copy_of

ENVIRONMENT = "executorch"
PACKAGE = "executorch"
PRODUCTS = (Form("ExecuTorch 8da4w g32", "g32"), Form("ExecuTorch 8da4w g128", "g128"))


class Product(Product):
    """See `benchmarks.peers.base.Product`."""

    def prepare(self, operands: Operands) -> None:
        """See `Product.prepare`."""
        import torch
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        torch.set_num_threads(self.threads)
        portable_lib._unsafe_reset_threadpool(self.threads)
        size = int(self.form.kind[1:])
        columns, channels = operands.w.shape
        path = self.work / f"g{size}-{columns}x{channels}-m{operands.rows}-{operands.copies}.pte"
        if not path.exists():
            export(operands, size, path)
        # bfloat16 scales of groups, and a sum of each column, which the zero point of activations takes.
        self.stored_bytes = columns * channels // 2 + 2 * columns * channels // size + 4 * columns
        self._inputs = [torch.from_numpy(operands.x.copy()) for _ in range(operands.copies)]
        self._program = Runtime.get().load_program(path)  # which has to outlive its method
        self._method = self._program.load_method("forward")

    def run(self) -> None:
        """See `Product.run`."""
        self._made = self._method.execute(self._inputs)

    def result(self) -> np.ndarray:
        """See `Product.result`."""
        return self._made[0].numpy()


def export(operands: Operands, size: int, path: Path) -> None:
    """Write a program of one linear for each copy."""
    import torch
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    class Products(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linears = torch.nn.ModuleList()

        def forward(self, *inputs):
            return tuple(linear(x) for linear, x in zip(self.linears, inputs, strict=True))

    w, config = operands.w, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(size))
    products = Products().eval()
    for i in range(operands.copies):
        linear = torch.nn.Sequential(torch.nn.Linear(w.shape[1], w.shape[0], bias=False))
        linear[0].weight = torch.nn.Parameter(torch.from_numpy(copy_of(w, i)), requires_grad=False)
        quantize_(linear, config)
        products.linears.append(linear)
    inputs = tuple(torch.from_numpy(operands.x) for _ in range(operands.copies))
    with torch.no_grad():
        exported = torch.export.export(products, inputs)
        partitioner = XnnpackPartitioner(config_precisions=ConfigPrecisionType.DYNAMIC_QUANT, per_op_mode=True)
        program = to_edge_transform_and_lower(exported, partitioner=[partitioner]).to_executorch()
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        program.write_to_file(file)
    part.rename(path)
