"""OpenVINO's models, drawn as graphs in the form that its transformations know: states for the caches, GQA, SDPA.

Weights are symmetric 4-bit groups, the head 8 bit by rows, as its own converter makes them by default; activations
are quantized on the way.
"""

import json
from pathlib import Path

import numpy as np

from benchmarks.peers.base import Model, ModelForm
from benchmarks.peers.conversion import Weights
from benchmarks.peers.engines.ov import decompressed

ENVIRONMENT = "shared"
PACKAGE = "openvino"
MODELS = (ModelForm("OpenVINO i4 g32", 4, "int8", 8), ModelForm("OpenVINO i4 g128", 4, "int8", 8))


class Graph:
    """A LLaMA as an OpenVINO model.

    Inputs: tokens and positions int64 [1, T], mask float32 [1, 1, T, all tokens], beam int32 [1]. Output: logits of
    the last token, float32 [1, 1, V].

    Parameters
    ----------
    source : Path
        A Hugging Face directory.
    group_size : int
    """

    def __init__(self, source: Path, group_size: int):
        import openvino
        from openvino import opset13

        self._ov, self._ops, self._size = openvino, opset13, group_size
        self._config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        self._weights = Weights(source)
        self._states: list = []
        self._heads, self._kv_heads = self._config["num_attention_heads"], self._config["num_key_value_heads"]
        self._depth = self._config["hidden_size"] // self._heads

    def model(self):
        """Build the model."""
        ov, ops = self._ov, self._ops
        tokens = ops.parameter([1, -1], ov.Type.i64, name="tokens")
        positions = ops.parameter([1, -1], ov.Type.i64, name="positions")
        self._mask = ops.parameter([1, 1, -1, -1], ov.Type.f32, name="mask")
        self._beam = ops.parameter([-1], ov.Type.i32, name="beam")
        self._rotary(positions)
        table = self._eight_bit("model.embed_tokens")
        x = ops.gather(table, tokens, np.int64(0))
        for layer in range(self._config["num_hidden_layers"]):
            x = self._layer(x, f"model.layers.{layer}.")
        x = ops.gather(x, np.array([-1], "int64"), np.int64(1))  # the last token
        x = self._norm(x, "model.norm")
        head = self._eight_bit("lm_head") if "lm_head.weight" in self._weights else table
        logits = ops.matmul(x, head, False, True)
        inputs = [tokens, positions, self._mask, self._beam]
        return ov.Model([ops.result(logits)], [sink for _, sink in self._states], inputs, "llama")

    def _rotary(self, positions) -> None:
        """Make cosines and sines [1, 1, T, D]."""
        ops, depth = self._ops, self._depth
        inverse = self._config["rope_theta"] ** (-np.arange(0, depth, 2, dtype="float64") / depth)
        inverse = np.concatenate([inverse, inverse]).astype("float32").reshape(1, 1, 1, depth)
        rows = ops.reshape(ops.convert(positions, "f32"), np.array([1, 1, -1, 1], "int64"), False)
        angles = ops.multiply(rows, ops.constant(inverse))
        self._cos, self._sin = ops.cos(angles), ops.sin(angles)

    def _floats(self, name: str) -> np.ndarray:
        return self._weights[f"{name}.weight"].astype("float32")

    def _eight_bit(self, name: str):
        w = self._floats(name)
        scales = np.abs(w).max(1, keepdims=True) / np.float32(127)
        codes = np.rint(w / scales).astype("int8")
        return decompressed(self._ov, codes, scales, w.shape[1], "i8")

    def _linear(self, x, name: str):
        from agq_tvm.quantize.weights import codes_of, rtn

        floats = self._floats(name)
        if floats.shape[1] % self._size:
            raise ValueError(f"groups of {self._size} do not divide the {floats.shape[1]} channels of {name}")
        linear = rtn(floats, self._size, symmetric=True)
        w = decompressed(self._ov, codes_of(linear), linear.scales.astype("float32"), self._size, "i4")
        return self._ops.matmul(x, w, False, True)

    def _norm(self, x, name: str):
        ops = self._ops
        square = ops.power(x, np.float32(2))
        mean = ops.reduce_mean(square, np.array([-1], "int64"), True)
        scale = ops.divide(np.float32(1), ops.sqrt(ops.add(mean, np.float32(self._config["rms_norm_eps"]))))
        return ops.multiply(ops.constant(self._floats(name)), ops.multiply(x, scale))

    def _split(self, x, heads: int):
        """[1, T, heads · D] to [1, heads, T, D]."""
        ops = self._ops
        x = ops.reshape(x, np.array([0, 0, heads, self._depth], "int64"), True)
        return ops.transpose(x, np.array([0, 2, 1, 3], "int64"))

    def _rotate(self, x):
        ops, half = self._ops, self._depth // 2
        low, high = ops.variadic_split(x, np.int64(-1), np.array([half, half], "int64")).outputs()
        turned = ops.concat([ops.multiply(high, np.float32(-1)), low], -1)
        return ops.add(ops.multiply(x, self._cos), ops.multiply(turned, self._sin))

    def _cached(self, x, name: str):
        """Append to a state: [1, heads, all tokens, D]."""
        ov, ops = self._ov, self._ops
        shape = [-1, self._kv_heads, -1, self._depth]
        info = ov.op.util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = ov.PartialShape(shape), ov.Type.f32, name
        variable = ov.op.util.Variable(info)
        empty = ops.constant(np.zeros((1, self._kv_heads, 0, self._depth), "float32"))
        past = ops.gather(ops.read_value(empty, variable), self._beam, np.int64(0))
        both = ops.concat([past, x], 2)
        self._states.append((name, ops.assign(both, variable)))
        return both

    def _repeat(self, x):
        """Give every head of q its head of k or v."""
        ops, times = self._ops, self._heads // self._kv_heads
        if times == 1:
            return x
        x = ops.unsqueeze(x, np.int64(2))
        x = ops.broadcast(x, np.array([1, 1, times, 1, 1], "int64"), broadcast_spec="BIDIRECTIONAL")
        return ops.reshape(x, np.array([0, self._heads, -1, self._depth], "int64"), True)

    def _layer(self, x, name: str):
        ops = self._ops
        y = self._norm(x, f"{name}input_layernorm")
        q, k, v = (self._linear(y, f"{name}self_attn.{part}_proj") for part in "qkv")
        q = self._rotate(self._split(q, self._heads))
        k = self._cached(self._rotate(self._split(k, self._kv_heads)), f"{name}k")
        v = self._cached(self._split(v, self._kv_heads), f"{name}v")
        made = ops.scaled_dot_product_attention(q, self._repeat(k), self._repeat(v), self._mask)
        made = ops.transpose(made, np.array([0, 2, 1, 3], "int64"))
        made = ops.reshape(made, np.array([0, 0, -1], "int64"), True)
        x = ops.add(x, self._linear(made, f"{name}self_attn.o_proj"))
        y = self._norm(x, f"{name}post_attention_layernorm")
        gate, up = (self._linear(y, f"{name}mlp.{part}_proj") for part in ("gate", "up"))
        return ops.add(x, self._linear(ops.multiply(ops.swish(gate), up), f"{name}mlp.down_proj"))


class Model(Model):
    """See `benchmarks.peers.base.Model`."""

    def __init__(self, form: ModelForm, threads: int, work: Path, source: Path, context: int):
        import openvino

        size = form.name.rpartition("g")[2]
        path = work / f"{source.name}-g{size}.xml"
        if not path.exists():
            openvino.save_model(Graph(source, int(size)).model(), path, compress_to_fp16=False)
        config = {
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": size,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
        }
        self._request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()

    def prefill(self, tokens: list[int]) -> None:
        """See `Model.prefill`."""
        self._request.reset_state()
        self._length = 0
        self._read(tokens)

    def decode(self, token: int) -> None:
        """See `Model.decode`."""
        self._read([token])

    def _read(self, tokens: list[int]) -> None:
        end = self._length + len(tokens)
        positions = np.arange(self._length, end)
        later = np.arange(end)[None, :] > positions[:, None]
        self._request.infer(
            {
                "tokens": np.array([tokens], "int64"),
                "positions": positions[None],
                "mask": np.where(later, np.float32(-np.inf), np.float32(0))[None, None],
                "beam": np.zeros(1, "int32"),
            }
        )
        self._length = end

    def last(self) -> np.ndarray:
        """See `Model.last`."""
        return self._request.get_output_tensor(0).data.reshape(-1)
