"""The float decoder as a Relax module, built from a `DecoderConfig`: what every pass starts from.

Linears are plain ``matmul(x, permute_dims(w))`` and norms ``nn.rms_norm``; the rotary step and attention, which
work on caches in place, are TIR kernels already. Each function takes

    tokens int32 [M], positions int32 [M], lengths int32 [2], then caches and weights,

where `lengths` is (positions cached so far, valid rows of this call), and returns logits float32.
"""

from agq_tvm.kernels import attention as attention_kernels
from agq_tvm.kernels import embedding as embedding_kernels
from agq_tvm.kernels.attention import AttentionKernel
from agq_tvm.models.decoder import PREFILL_BUCKETS, DecoderConfig
from agq_tvm.tvm_seam import relax

NUM_INPUTS = 3
"""Arguments before caches and weights."""


def function_names() -> list[tuple[str, int, bool]]:
    """List (name, rows, whether it returns the logits of all rows) of the module's functions."""
    names = [("decode", 1, True)]
    for rows in PREFILL_BUCKETS:
        names += [(f"prefill_{rows}", rows, False), (f"prefill_{rows}_all", rows, True)]
    return names


def build_decoder(config: DecoderConfig, context: int, value_lanes: int):
    """Build the module.

    Parameters
    ----------
    context : int
        Length of the caches, a multiple of 16.
    value_lanes : int
        See `AttentionKernel`.

    Returns
    -------
    IRModule
        The functions of `function_names`; parameters carry the names under which they are packed.
    """
    builder = relax.BlockBuilder()
    for name, rows, all_rows in function_names():
        _Decoder(builder, config, context, value_lanes, rows).emit(name, all_rows)
    return builder.get()


class _Decoder:
    """Emits one function; all its functions ask for their parameters in the same order."""

    def __init__(self, builder, config: DecoderConfig, context: int, value_lanes: int, rows: int):
        self.builder, self.config, self.context, self.rows = builder, config, context, rows
        self.params: list = []
        self.attention = AttentionKernel(
            rows, config.num_heads, config.num_kv_heads, config.head_dim, context, value_lanes
        )

    def param(self, name: str, shape: tuple[int, ...], dtype: str = "float32"):
        var = relax.Var(name, relax.TensorType(shape, dtype))
        self.params.append(var)
        return var

    def kernel(self, prim_func):
        return self.builder.add_func(prim_func, str(prim_func.attrs["global_symbol"]))

    def emit(self, name: str, all_rows: bool) -> None:
        config, rows = self.config, self.rows
        tokens = self.param("tokens", (rows,), "int32")
        self.positions = self.param("positions", (rows,), "int32")
        self.lengths = self.param("lengths", (2,), "int32")
        caches = [self._caches(layer) for layer in range(config.num_layers)]
        half = config.head_dim // 2
        self.rope = [self.param(f"rope.{part}", (self.context, half)) for part in ("cos", "sin")]
        embedding = self.param("embedding", (config.vocab_size, config.hidden_size))
        weights = [self._layer_weights(layer) for layer in range(config.num_layers)]
        final_norm = self.param("final_norm", (config.hidden_size,))
        head = embedding
        if not config.tied_embeddings:
            head = self.param("head", (config.vocab_size, config.hidden_size))
        emit = self.builder.emit
        with self.builder.function(name, self.params, attrs={"num_input": NUM_INPUTS}):
            with self.builder.dataflow():
                x = emit(relax.op.take(embedding, tokens, axis=0))
                for layer in range(config.num_layers):
                    x = self._layer(x, weights[layer], caches[layer])
                if not all_rows:
                    last = self.kernel(embedding_kernels.build_last_row(rows, config.hidden_size))
                    out_type = relax.TensorType((1, config.hidden_size), "float32")
                    x = emit(relax.call_tir(last, (x, self.lengths), out_type))
                x = self._norm(x, final_norm)
                logits = self.builder.emit_output(self._linear(x, head))
            self.builder.emit_func_output(logits)

    def _caches(self, layer: int):
        shapes = (self.attention.key_cache, self.attention.value_cache)
        return [
            self.param(f"layers.{layer}.{name}", shape, "float16")
            for name, shape in zip(("keys", "values"), shapes, strict=True)
        ]

    def _layer_weights(self, layer: int) -> dict:
        hidden = self.config.hidden_size
        weights = {name: self.param(f"layers.{layer}.{name}", (hidden,)) for name in ("input_norm", "mlp_norm")}
        for linear in self.config.linears:
            shape = (sum(linear.rows), linear.in_features)
            weights[linear.name] = self.param(f"layers.{layer}.{linear.name}", shape)
        return weights

    def _linear(self, x, weight):
        return self.builder.emit(relax.op.matmul(x, relax.op.permute_dims(weight)))

    def _norm(self, x, gain):
        return self.builder.emit(relax.op.nn.rms_norm(x, gain, axes=-1, epsilon=self.config.norm_epsilon))

    def _layer(self, x, weights: dict, caches):
        emit, op = self.builder.emit, relax.op
        attended = self._attention(self._linear(self._norm(x, weights["input_norm"]), weights["qkv"]), caches)
        x = emit(op.add(x, self._linear(attended, weights["o"])))
        gate_up = self._linear(self._norm(x, weights["mlp_norm"]), weights["gate_up"])
        gate, up = emit(op.split(gate_up, 2, axis=1))
        inner = emit(op.multiply(op.nn.silu(gate), up))
        return emit(op.add(x, self._linear(inner, weights["down"])))

    def _attention(self, qkv, caches):
        kernel, emit = self.attention, self.builder.emit
        keys, values = caches
        q_type = relax.TensorType((self.rows, kernel.heads, kernel.head_dim), "float32")
        append = self.kernel(attention_kernels.build_rope_append(kernel))
        arguments = (qkv, *self.rope, self.positions, self.lengths, keys, values)
        keys, values, q = emit(relax.op.call_tir_inplace(append, arguments, [5, 6, -1], [keys.ty, values.ty, q_type]))
        attention = self.kernel(attention_kernels.build_attention(kernel))
        out_type = relax.TensorType((self.rows, kernel.heads * kernel.head_dim), "float32")
        return emit(relax.call_tir(attention, (q, keys, values, self.lengths), out_type))
