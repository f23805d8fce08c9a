"""onnxruntime: MatMulNBits with 8-bit activations (accuracy level 4), and dynamic int8.

All copies are nodes of one graph, each with an input and an output of its own.
"""

import numpy as np

from benchmarks.peers.base import Form, Operands, Product, copy_of

ENVIRONMENT = "shared"
PACKAGE = "onnxruntime"
PRODUCTS = (
    Form("onnxruntime 4 bit g32", "g32"),
    Form("onnxruntime 4 bit g128", "g128"),
    Form("onnxruntime int8", "int8"),
)
_DOMAIN = "com.microsoft"


class Product(Product):
    """See `benchmarks.peers.base.Product`."""

    def prepare(self, operands: Operands) -> None:
        """See `Product.prepare`."""
        from onnx import TensorProto, helper, numpy_helper

        x = operands.x
        weights, options = self._int8(operands.w) if self.form.kind == "int8" else self._four_bit(operands)
        self.stored_bytes = sum(array.nbytes for array, _ in weights.values())
        columns, copies = self._columns, operands.copies
        names = [str(i) for i in range(copies)]
        constants, nodes = [], []
        for i, name in enumerate(names):
            for key, (array, axis) in weights.items():
                moved = array if axis is None else np.moveaxis(copy_of(np.moveaxis(array, axis, 0), i), 0, axis)
                constants.append(numpy_helper.from_array(np.ascontiguousarray(moved), key + name))
            inputs = ["x" + name, *(key + name for key in weights)]
            nodes.append(helper.make_node(options["op"], inputs, ["y" + name], domain=_DOMAIN, **options["attributes"]))
        values = [
            [helper.make_tensor_value_info(letter + name, TensorProto.FLOAT, shape) for name in names]
            for letter, shape in (("x", x.shape), ("y", (len(x), columns)))
        ]
        graph = helper.make_graph(nodes, "products", *values, constants)
        sets = [helper.make_opsetid("", 21), helper.make_opsetid(_DOMAIN, 1)]
        model = helper.make_model(graph, opset_imports=sets, ir_version=10)
        self._bind(model.SerializeToString(), names, x, columns)

    def _four_bit(self, operands: Operands) -> tuple[dict, dict]:
        size = int(self.form.kind[1:])
        codes, scales = operands.grid(size)
        self._columns, channels = codes.shape
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(len(codes), -1, size // 2)
        attributes = {"K": channels, "N": self._columns, "bits": 4, "block_size": size, "accuracy_level": 4}
        weights = {"w": (packed, 0), "s": (scales.astype("float32"), 0)}
        return weights, {"op": "MatMulNBits", "attributes": attributes}

    def _int8(self, w: np.ndarray) -> tuple[dict, dict]:
        self._columns = len(w)
        scales = np.abs(w).max(1) / np.float32(127)
        codes = np.rint(w / scales[:, None]).astype("int8").T
        return {"w": (codes, 1), "s": (scales, 0)}, {"op": "DynamicQuantizeMatMul", "attributes": {}}

    def _bind(self, model: bytes, names: list[str], x: np.ndarray, columns: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        value, self._values = onnxruntime.OrtValue.ortvalue_from_numpy, []
        for name in names:
            given, made = value(x), value(np.zeros((len(x), columns), "float32"))
            self._binding.bind_ortvalue_input("x" + name, given)
            self._binding.bind_ortvalue_output("y" + name, made)
            self._values.append((given, made))

    def run(self) -> None:
        """See `Product.run`."""
        self._session.run_with_iobinding(self._binding)

    def result(self) -> np.ndarray:
        """See `Product.result`."""
        return self._values[0][1].numpy()
