"""agq_tvm: activations quantized by one kernel, multiplied by the next, as compiled models do it.

Symmetric weights, like those of the other engines: scales of groups in float16. Activation scales of tokens, or of the
weights' groups, which is what `agq quantize` takes if nothing else is asked for. Or weights on an integer grid, in as
many bits.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.peers.base import ORIGIN, Form, Model, ModelForm, Operands, Product, copy_of

ENVIRONMENT = ""
PACKAGE = "apache-tvm"
PRODUCTS = (
    Form("agq_tvm g32", "g32"),
    Form("agq_tvm g32, group scales", "g32"),
    Form("agq_tvm g32, integer grid", "g32"),
    Form("agq_tvm g128", "g128"),
    Form("agq_tvm g128, group scales", "g128"),
    Form("agq_tvm g128, integer grid", "g128"),
)
MODELS = (
    ModelForm("agq_tvm g32", 4, "int8", 8),
    ModelForm("agq_tvm g32, 4-bit head", 4, "int4", 4),
    ModelForm("agq_tvm g32, pruned", 4, "int8", 8, pruned=True),
    ModelForm("agq_tvm kept grid", 4, "int8", 8, kept=True),
    ModelForm("agq_tvm g128", 4, "int8", 8),
    ModelForm("agq_tvm g32, integer grid", 4, "int8", 8),
    ModelForm("agq_tvm g32, integer grid, 4-bit head", 4, "int4", 4),
)
PRUNED_DEPTHS, PRUNED_SHARE = (1 / 3, 1 / 2, 3 / 4), 0.5
"""Of the layers, those after which tokens of the prompt are dropped, and the share that is gone at the end."""


class Product(Product):
    """See `benchmarks.peers.base.Product`."""

    def prepare(self, operands: Operands) -> None:
        """See `Product.prepare`."""
        from agq_tvm.kernels import activation
        from agq_tvm.kernels.instruction_sets import instruction_set
        from agq_tvm.runtime.huge_pages import one_block
        from agq_tvm.runtime.threads import Threads
        from agq_tvm.targets import load_device
        from agq_tvm.tuning import limits

        self._pool = Threads(self.threads)
        self._pool.configure()
        device = load_device("host")
        isa = instruction_set(device.instruction_set)
        layout, x = isa.layout_4bit, operands.x
        described = _on_grid if "integer grid" in self.form.name else _with_scales
        quantizing, product, packed = described(self.form, operands, isa)
        self._quantize, _ = limits.compiled(activation.build(quantizing, layout), device)
        self._multiply, _ = limits.compiled(product, device)

        def placed(*arrays: np.ndarray) -> list:
            self._arrays += one_block(arrays)
            return [limits.from_numpy(array) for array in self._arrays[-len(arrays) :]]

        self._arrays: list[np.ndarray] = []
        made = [np.zeros(shape, kind) for shape, kind in quantizing.output_shapes(layout)]
        self._x, *self._made = placed(x, *made)
        weights = placed(*(copy_of(array, i) for i in range(operands.copies) for array in packed))
        self._weights = [weights[i : i + len(packed)] for i in range(0, len(weights), len(packed))]
        self.stored_bytes = sum(array.nbytes for array in packed)
        self._columns = operands.w.shape[0]
        (self._out,) = placed(np.zeros((len(x), layout.tiles(self._columns) * layout.width), "float32"))
        self._y = self._arrays[-1]

    def run(self) -> None:
        """See `Product.run`."""
        with self._pool.running():
            for weights in reversed(self._weights):  # the first comes last: its product is the result
                self._quantize(self._x, *self._made)
                self._multiply(*self._made, *weights, self._out)

    def result(self) -> np.ndarray:
        """See `Product.result`."""
        return self._y[:, : self._columns]


def _with_scales(form: Form, operands: Operands, isa) -> tuple:
    """Return the quantization, the product and the packed weights of a form with scales of groups."""
    from agq_tvm.kernels import activation, linear

    (rows, channels), size, layout = operands.x.shape, int(form.kind[1:]), isa.layout_4bit
    codes, scales = operands.grid(size)
    by_group = "group scales" in form.name
    mode = "per-token-group" if by_group else "per-token"
    quantizing = activation.QuantizeKernel("plain", rows, channels, size, mode)
    product = linear.LinearKernel(rows, len(codes), channels, 4, size, by_group, None, False)
    packed = layout.pack(codes), layout.pack_columns(scales.astype("float16"))
    return quantizing, linear.build(product, isa), packed


def _on_grid(form: Form, operands: Operands, isa) -> tuple:
    """The same of weights on an integer grid, rounded to nearest."""
    from agq_tvm.flow.packing import pack_linear
    from agq_tvm.kernels import activation, linear, linear_grid
    from agq_tvm.quantize.weights import rtn

    (rows, channels), size = operands.x.shape, int(form.kind[1:])
    weights = rtn(operands.w, size, symmetric=False, integer=True)
    product = linear_grid.choose(isa, rows, len(weights.scales), channels, size, False)
    module, group = (linear_grid, channels) if isinstance(product, linear_grid.GridKernel) else (linear, size)
    quantizing = activation.QuantizeKernel("plain", rows, channels, group, "per-token")
    packed = pack_linear((weights,), isa.layout_4bit, None, grid=True)
    return quantizing, module.build(product, isa), [packed[part] for part in ("w", "step", "low", "ws")]


def limits_here(threads: int) -> dict[str, float]:
    """Measure the machine's limits once: GB/s read from memory, and GOP/s multiplied in registers."""
    from agq_tvm.runtime.threads import Threads
    from agq_tvm.tuning import limits

    with Threads(threads).running():
        if threads not in _LIMITS:
            _LIMITS[threads] = limits.memory_limit(threads), limits.multiply_limit(threads=threads)
        memory, multiply = _LIMITS[threads]
        return {"GB/s": memory.rate()} | ({"GOP/s": multiply.rate()} if multiply else {})


_LIMITS: dict[int, tuple] = {}


class Model(Model):
    """See `benchmarks.peers.base.Model`.

    Weights are rounded to nearest, symmetric as those of the other engines; or the grid is kept that a 4-bit model has.
    """

    def __init__(self, form: ModelForm, threads: int, work: Path, source: Path, context: int):
        from agq_tvm.runtime.bundle import Bundle
        from agq_tvm.runtime.engine import Engine, LocalSession

        bundle = Bundle(str(self._compiled(form, work, source, context)))
        self._engine = Engine(bundle, LocalSession(bundle, threads=threads))

    def _compiled(self, form: ModelForm, work: Path, source: Path, context: int) -> Path:
        """Quantize and compile the model, unless this source did so before."""
        from benchmarks.tables import source_hash

        name = form.name.removeprefix("agq_tvm ").replace(", ", "-").replace(" ", "-")
        target = work / f"{source.name}-{name}-{context}-{source_hash()}"
        if target.exists():
            return target
        checkpoint, part = (target.with_name(f"{target.name}.{what}") for what in ("checkpoint", "part"))
        model = (source / ORIGIN).read_text(encoding="utf-8") if form.kept else str(source)
        _agq("quantize", model, "-o", str(checkpoint), *self._options(form, source))
        _agq("compile", str(checkpoint), "--target", "host", "--context", str(context), "-o", str(part))
        part.rename(target)
        return target

    def _options(self, form: ModelForm, source: Path) -> list[str]:
        if form.kept:
            return ["--method", "keep"]
        options = ["--method", "rtn", "--group-size", form.name.split()[1].strip("g,")]
        options += ["--integer-grid", "--activation", "per-token"] if "integer grid" in form.name else ["--symmetric"]
        if form.head_bits != 8:
            # The head is fitted on these windows; with the default 64 of 512 that takes half an hour for a 1.1B model.
            options += ["--head-bits", str(form.head_bits), "--calibration-samples", "8", "--calibration-length", "256"]
        if form.pruned:
            config = json.loads((source / "config.json").read_text(encoding="utf-8"))
            layers = [str(round(depth * config["num_hidden_layers"])) for depth in PRUNED_DEPTHS]
            options += ["--prune-layers", ",".join(layers), "--prune-beta", str(PRUNED_SHARE)]
        return options

    def prefill(self, tokens: list[int]) -> None:
        """See `Model.prefill`."""
        self._engine.reset()
        self._last = self._engine.prefill(tokens)

    def decode(self, token: int) -> None:
        """See `Model.decode`."""
        self._last = self._engine.decode(token)

    def last(self) -> np.ndarray:
        """See `Model.last`."""
        return self._last


def _agq(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "agq_tvm", *arguments], check=True)
