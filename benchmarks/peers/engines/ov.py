"""OpenVINO: compressed weights with activations quantized on the way (DYNAMIC_QUANTIZATION_GROUP_SIZE).

Without that option activations stay float. All copies are nodes of one graph, each with an input of its own.
"""

import numpy as np

from benchmarks.peers.base import Form, Operands, Product, copy_of

ENVIRONMENT = "shared"
PACKAGE = "openvino"
PRODUCTS = (
    Form("OpenVINO i4 g32", "g32"),
    Form("OpenVINO u4 g128", "g128"),
    Form("OpenVINO int8", "int8"),
)
_KINDS = {"g32": "i4", "g128": "u4", "int8": "i8"}


class Product(Product):
    """See `benchmarks.peers.base.Product`."""

    def prepare(self, operands: Operands) -> None:
        """See `Product.prepare`."""
        import openvino
        from openvino import opset13

        x = operands.x
        size = operands.w.shape[1] if self.form.kind == "int8" else int(self.form.kind[1:])
        inputs, outputs = [], []
        weights = self._int8(operands.w) if self.form.kind == "int8" else operands.grid(size)
        for i in range(operands.copies):
            codes, scales = (copy_of(array, i) for array in weights)
            w = decompressed(openvino, codes, scales, size, _KINDS[self.form.kind])
            inputs.append(opset13.parameter(list(x.shape), openvino.Type.f32))
            outputs.append(opset13.matmul(inputs[-1], w, False, True))
        bits = {"i8": 8, "i4": 4, "u4": 4}[_KINDS[self.form.kind]]
        self.stored_bytes = (bits * codes.size + (20 if self.form.kind == "g128" else 16) * scales.size) // 8
        config = {
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32" if self.form.kind == "g32" else "128",
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
        }
        model = openvino.Model(outputs, inputs)
        self._request = openvino.Core().compile_model(model, "CPU", config).create_infer_request()
        for i in range(operands.copies):
            self._request.set_input_tensor(i, openvino.Tensor(x.copy()))

    def _int8(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scales = np.abs(w).max(1, keepdims=True) / np.float32(127)
        return np.rint(w / scales).astype("int8"), scales

    def run(self) -> None:
        """See `Product.run`."""
        self._request.infer()

    def result(self) -> np.ndarray:
        """See `Product.result`."""
        return self._request.get_output_tensor(0).data


def decompressed(openvino, codes: np.ndarray, scales: np.ndarray, size: int, kind: str):
    """Return the node of w = s (q - z), as OpenVINO recognizes compressed weights.

    Parameters
    ----------
    openvino : module
    codes : int8 or uint8 array [N, K]
        Of ``"i8"`` signed; else 0..15, with 8 for zero.
    scales : float array [N, K / size]
    size : int
    kind : {"i8", "i4", "u4"}
        How they are stored; the last with zero points.
    """
    from openvino import opset13

    grouped = codes.reshape(len(codes), -1, size)
    if kind == "i8":
        node = opset13.convert(opset13.constant(grouped), "f16")
    elif kind == "i4":
        node = opset13.convert(_packed(openvino, grouped ^ 8, openvino.Type.i4), "f16")
    else:
        node = opset13.convert(_packed(openvino, grouped, openvino.Type.u4), "f16")
        zeros = _packed(openvino, np.full((*scales.shape, 1), 8, "uint8"), openvino.Type.u4)
        node = opset13.subtract(node, opset13.convert(zeros, "f16"))
    node = opset13.multiply(node, opset13.constant(scales[:, :, None].astype("float16")))
    node = opset13.reshape(node, np.array([len(codes), -1], "int64"), False)
    return opset13.convert(node, "f32")


def _packed(openvino, codes: np.ndarray, kind):
    """Return a constant of 4-bit codes, the even one in the low nibble."""
    flat = codes.reshape(-1)
    pairs = flat[0::2] | flat[1::2] << 4
    # The constant has to own what it holds: `pairs` is gone when this returns.
    return openvino.op.Constant(openvino.Tensor(pairs, list(codes.shape), kind), shared_memory=False)
