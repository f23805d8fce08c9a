"""The float decoder as a Relax module, built from a `DecoderConfig`: what every pass starts from.

Linears are plain ``matmul(x, permute_dims(w))``, with ``add`` where they have a bias, and norms ``nn.rms_norm`` or
``nn.layer_norm``; attention and the step before it, which work on caches in place, are TIR kernels already. Each
function takes

    tokens int32 [M], positions int32 [M], lengths int32 [2], then caches and weights,

where `lengths` is (positions cached so far, valid rows of this call), and returns logits float32.

Of a model that prunes tokens, the functions that return the last row's logits drop rows in some layers, whose later
layers therefore run with fewer; caches differ in length from there on, and `lengths` is that of `kernels.prune`.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Protocol

from agq_tvm.kernels import attention as attention_kernels
from agq_tvm.kernels import attention_append
from agq_tvm.kernels import embedding as embedding_kernels
from agq_tvm.kernels import prune as prune_kernels
from agq_tvm.kernels.attention_form import AttentionForm, AttentionKernel
from agq_tvm.kernels.attrs import annotate
from agq_tvm.kernels.functions import Functions
from agq_tvm.models.decoder import PREFILL_BUCKETS, DecoderConfig, filled_tiles
from agq_tvm.tvm_seam import relax

NUM_INPUTS = 3
"""Arguments before caches and weights."""
_ACTIVATIONS = {
    "silu": relax.op.nn.silu,
    "relu": relax.op.nn.relu,
    "gelu": relax.op.nn.gelu,
    "gelu_tanh": relax.op.nn.gelu_tanh,
}


class Pruning(Protocol):
    """After which layers, counted from 1, rows are dropped, how many are left, and whether these are counted anew."""

    layers: tuple[int, ...]
    renumber: bool

    def counts(self, rows: int) -> tuple[int, ...]:
        """Return how many of so many rows there are at first, and after each of the layers."""


def function_names() -> list[tuple[str, int, bool]]:
    """List (name, rows, whether it returns the logits of all rows) of the module's functions."""
    names = [("decode", 1, True)]
    for rows in PREFILL_BUCKETS:
        names += [(f"prefill_{rows}", rows, False), (f"prefill_{rows}_all", rows, True)]
    return names


def build_decoder(
    config: DecoderConfig,
    context: int,
    form: AttentionForm,
    pruning: Pruning | None = None,
    only: Collection[str] = (),
):
    """Build the module.

    Parameters
    ----------
    context : int
        Length of the caches, a multiple of 16.
    form : AttentionForm
        What the caches hold.
    pruning : Pruning, optional
    only : collection of str
        The functions wanted; all by default.

    Returns
    -------
    IRModule
        The functions of `function_names`; parameters carry the names under which they are packed.
    """
    builder = relax.BlockBuilder()
    functions = Functions(builder)
    for name, rows, all_rows in function_names():
        if not only or name in only:
            _Decoder(builder, functions, config, context, form, rows, pruning).emit(name, all_rows)
    return builder.get()


def _attention_kernel(kernel: AttentionKernel):
    return annotate(attention_kernels.build_attention(kernel), kernel)


class _Decoder:
    """Emits one function; all its functions ask for their parameters in the same order.

    `rows`, `positions`, `lengths`, `attention` and `key_positions` are those of the current segment: see
    `kernels.prune`.
    """

    def __init__(
        self,
        builder,
        functions: Functions,
        config: DecoderConfig,
        context: int,
        form: AttentionForm,
        rows: int,
        pruning: Pruning | None,
    ):
        self.builder, self.functions = builder, functions
        self.config, self.context, self.rows = config, context, rows
        self.params: list = []
        self.pruned_layers = pruning.layers if pruning else ()
        self.segment, self.segments = 0, 1 + len(self.pruned_layers)
        self.counts = pruning.counts(rows) if pruning else (rows,)
        self.renumber = pruning is not None and pruning.renumber
        self.attention = AttentionKernel(
            rows,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            context,
            form,
            alibi=config.positions == "alibi",
        )

    def param(self, name: str, shape: tuple[int, ...], dtype: str = "float32"):
        var = relax.Var(name, relax.TensorType(shape, dtype))
        self.params.append(var)
        return var

    def emit(self, name: str, all_rows: bool) -> None:
        config, rows = self.config, self.rows
        tokens = self.param("tokens", (rows,), "int32")
        self.positions = self.param("positions", (rows,), "int32")
        self.all_lengths = self.param("lengths", (2 * self.segments + 1 if self.pruned_layers else 2,), "int32")
        caches = [self._caches(layer) for layer in range(config.num_layers)]
        self.position_caches = self._position_caches()
        self._position_params()
        self.tables = {role: self.param(role, shape) for role, shape in config.tables.items()}
        embedding_norm = self._norm_params("embedding_norm") if config.embedding_norm else None
        weights = [self._layer_weights(layer) for layer in range(config.num_layers)]
        final_norm = self._norm_params("final_norm") if config.final_norm else None
        emit = self.builder.emit
        with self.builder.function(name, self.params, attrs={"num_input": NUM_INPUTS}):
            with self.builder.dataflow():
                self.lengths, self.key_positions = self._segment_lengths(), None
                x = self._embed(tokens, embedding_norm)
                for layer in range(config.num_layers):
                    ends_segment = layer + 1 in self.pruned_layers
                    drops = ends_segment and not all_rows and self._drops_rows()
                    x = self._layer(x, weights[layer], caches[layer], ends_segment, drops)
                if not all_rows:
                    last = self.functions.add(embedding_kernels.build_last_row, self.rows, config.hidden_size)
                    out_type = relax.TensorType((1, config.hidden_size), "float32")
                    x = emit(relax.call_tir(last, (x, self.lengths), out_type))
                logits = self.builder.emit_output(self._logits(x, final_norm))
            self.builder.emit_func_output(logits)

    def _position_caches(self) -> list:
        """Ask for the positions of cached keys, for the segments where places in the cache are not positions."""
        if not self.attention.alibi or self.renumber:
            return []
        names = [f"segments.{segment}.positions" for segment in range(1, self.segments)]
        return [self.param(name, (self.context,), "int32") for name in names]

    def _position_params(self) -> None:
        config = self.config
        if config.positions == "rotary":
            half = config.head_dim // 2
            self.rope = [self.param(f"rope.{part}", (self.context, half)) for part in ("cos", "sin")]
        elif config.positions == "alibi":
            self.slopes = self.param("alibi.slopes", (config.num_heads,))
        else:
            self.position_table = self.param("position_table", (self.context, config.hidden_size))

    def _norm_params(self, role: str) -> list:
        return [self.param(f"{role}.{part}", (self.config.hidden_size,)) for part in self.config.norm.parts]

    def _embed(self, tokens, norm):
        x = self.builder.emit(relax.op.take(self.tables["embedding"], tokens, axis=0))
        if "project_in" in self.tables:
            x = self._linear(x, self.tables["project_in"])
        if self.config.positions == "learned":
            x = self.builder.emit(relax.op.add(x, relax.op.take(self.position_table, self.positions, axis=0)))
        return x if norm is None else self._norm(x, norm)

    def _logits(self, x, norm):
        if norm is not None:
            x = self._norm(x, norm)
        if "project_out" in self.tables:
            x = self._linear(x, self.tables["project_out"])
        return self._linear(x, self.tables.get("head", self.tables["embedding"]))

    def _caches(self, layer: int):
        return [self.param(f"layers.{layer}.{name}", shape, dtype) for name, shape, dtype in self.attention.caches]

    def _layer_weights(self, layer: int) -> dict:
        names = ("input_norm", "mlp_norm")
        weights = {name: self._norm_params(f"layers.{layer}.{name}") for name in names}
        scale = (
            [self.param(f"layers.{layer}.value_scale", (self.config.num_kv_heads,))] if self.attention.form.book else []
        )
        weights["value_scale"] = scale
        for linear in self.config.linears:
            name, columns = f"layers.{layer}.{linear.name}", sum(linear.rows)
            weight = self.param(name, (columns, linear.in_features))
            weights[linear.name] = weight, self.param(f"{name}.bias", (columns,)) if linear.bias else None
        return weights

    def _linear(self, x, weight, bias=None):
        y = self.builder.emit(relax.op.matmul(x, relax.op.permute_dims(weight)))
        return y if bias is None else self.builder.emit(relax.op.add(y, bias))

    def _norm(self, x, vectors: list):
        style, op = self.config.norm, relax.op.nn
        norm = {"rms": op.rms_norm, "layer": op.layer_norm}[style.kind]
        return self.builder.emit(norm(x, *vectors, axes=-1, epsilon=style.epsilon))

    def _layer(self, x, weights: dict, caches, ends_segment: bool, drops: bool):
        def attention(x):
            qkv = self._linear(x, *weights["qkv"])
            return self._linear(self._attention(qkv, caches, weights["value_scale"], drops), *weights["o"])

        x = self._residual(x, weights["input_norm"], attention)
        if drops:
            x = self._drop_rows(x)
        if ends_segment:
            self._enter_next_segment()
        return self._residual(x, weights["mlp_norm"], lambda x: self._mlp(x, weights))

    def _drops_rows(self) -> bool:
        """Tell whether the segment loses rows; if a full chunk loses none, no other does."""
        return self.counts[self.segment + 1] < self.counts[self.segment]

    def _drop_rows(self, x):
        """Choose the rows of the next segment and return them."""
        rows, emit, channels = self.rows, self.builder.emit, self.config.hidden_size
        kept = min(rows, filled_tiles(self.counts[self.segment + 1]))
        kernel = prune_kernels.SelectKernel(rows, kept, self.config.num_heads, self.segment, self.segments)
        select, types = self.functions.add(prune_kernels.build_select, kernel), [relax.TensorType((kept,), "int32")] * 2
        chosen, self.positions = emit(
            relax.call_tir(select, (self.importance, self.positions, self.all_lengths), types)
        )
        self.rows, self.attention = kept, replace(self.attention, rows=kept)
        gather = self.functions.add(prune_kernels.build_gather, rows, kept, channels)
        return emit(relax.call_tir(gather, (x, chosen), relax.TensorType((kept, channels), "float32")))

    def _enter_next_segment(self) -> None:
        self.segment += 1
        self.lengths = self._segment_lengths()
        self.attention = replace(self.attention, pruned=not self.renumber)
        if self.renumber and self.config.positions == "rotary":
            places = self.functions.add(prune_kernels.build_places, self.rows, self.context)
            self.positions = self.builder.emit(
                relax.call_tir(places, (self.lengths,), relax.TensorType((self.rows,), "int32"))
            )
        if self.position_caches:
            append = self.functions.add(prune_kernels.build_append_positions, self.rows, self.context)
            cache = self.position_caches[self.segment - 1]
            arguments = (self.positions, self.lengths, cache)
            self.key_positions = self.builder.emit(relax.op.call_tir_inplace(append, arguments, [2], [cache.ty]))

    def _segment_lengths(self):
        """Return what kernels of the current segment take as their lengths, int32 [2]."""
        if not self.pruned_layers:
            return self.all_lengths
        start = 2 * self.segment
        return self.builder.emit(relax.op.strided_slice(self.all_lengths, [0], [start], [start + 2]))

    def _residual(self, x, norm: list, branch):
        add = relax.op.add
        if self.config.norm_placement == "after":
            return self._norm(self.builder.emit(add(x, branch(x))), norm)
        normed = self._norm(x, norm)
        return self.builder.emit(add(normed if self.config.norm_placement == "shared" else x, branch(normed)))

    def _mlp(self, x, weights: dict):
        first, down = self.config.linears[2:]
        activation = _ACTIVATIONS[self.config.activation]
        inner = self._linear(x, *weights[first.name])
        if self.config.gated:
            gate, up = self.builder.emit(relax.op.split(inner, 2, axis=1))
            inner = self.builder.emit(relax.op.multiply(activation(gate), up))
        else:
            inner = self.builder.emit(activation(inner))
        return self._linear(inner, *weights[down.name])

    def _attention(self, qkv, caches, value_scale: list, drops: bool):
        kernel, emit = self.attention, self.builder.emit
        if self.config.positions == "rotary":
            inputs = (qkv, *self.rope, self.positions, self.lengths, *value_scale)
        else:
            inputs = (qkv, self.lengths, *value_scale)
        append = self.functions.add(attention_append.build_append, kernel, self.config.positions == "rotary")
        types = [*(cache.ty for cache in caches), *(relax.TensorType(*query) for query in kernel.queries)]
        updated = [*range(len(inputs), len(inputs) + len(caches)), *(-1 for _ in kernel.queries)]
        made = emit(relax.op.call_tir_inplace(append, (*inputs, *caches), updated, types))
        made = [made[i] for i in range(len(types))]
        kernel = replace(kernel, importance=drops)
        attention = self.functions.add(_attention_kernel, kernel)
        inputs = [*made[len(caches) :], *made[: len(caches)], self.lengths, *value_scale]
        if kernel.alibi:
            inputs += [self.slopes, self.positions, self.key_positions] if kernel.pruned else [self.slopes]
        out_type = relax.TensorType((self.rows, kernel.heads * kernel.head_dim), "float32")
        if not drops:
            return emit(relax.call_tir(attention, inputs, out_type))
        importance_type = relax.TensorType((self.rows, kernel.heads), "float32")
        out, self.importance = emit(relax.call_tir(attention, inputs, [out_type, importance_type]))
        return out
