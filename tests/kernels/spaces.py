"""Kernels that show every decision of every design space, and samples of points that show every choice."""

import random

import numpy as np
import tvm

from agq_tvm.kernels import tunable
from agq_tvm.kernels.activation import QuantizeKernel
from agq_tvm.kernels.attention_form import AttentionKernel, attention_form
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_dense import DenseKernel
from agq_tvm.kernels.linear_float import FloatLinearKernel
from agq_tvm.kernels.linear_grid import GridKernel
from agq_tvm.kernels.linear_shifted import ShiftedKernel
from agq_tvm.kernels.norm import LayerNormKernel
from agq_tvm.kernels.space import Space
from agq_tvm.quantize.codebooks import CODE_BOOKS

PRODUCTS = [
    LinearKernel(8, 70, 190, 4, 32, True, "float16", True),
    LinearKernel(1, 70, 190, 4, 32, True, "float32", False),
    LinearKernel(4, 70, 250, 4, 128, False, None, False),
    LinearKernel(8, 70, 128, 4, 32, True, None, False, activation_bits=4),
    LinearKernel(1, 70, 120, 8, 32, True, None, False, terms=2),
]
GRIDS = [GridKernel(8, 70, 190, 32, True), GridKernel(1, 70, 190, 64, False), GridKernel(64, 70, 256, 128, False)]
"""For instruction sets that have them, see `linear_grid.applies`."""
_OUTPUTS = ("out", "codes", "scales", "sums")
OTHERS = [
    ShiftedKernel(4, 70, 128, None),
    DenseKernel(4, 70, 64, "float16", True),
    FloatLinearKernel(4, 70, 100, 4, 32, "float16", True),
    QuantizeKernel("rms_norm", 4, 128, 32, "per-token-group", 1e-5),
    QuantizeKernel("silu_mul", 1, 128, 32, "per-token"),
    LayerNormKernel(4, 96, 1e-5),
]


def attentions(isa: InstructionSet) -> list[AttentionKernel]:
    """List the forms of attention: of two query heads that share one of keys, with full caches."""
    book = CODE_BOOKS["log2"]
    forms = [attention_form(isa, *form) for form in (("float16", None), ("float16", book), ("int8", None))]
    return [AttentionKernel(4, 4, 2, 32, 32, form, fixed=True) for form in forms]


def sample(space: Space, more: int = 0) -> list[dict[str, int]]:
    """Return points that show every value of each decision that any point shows, and some more; always the same."""
    points, rng = space.points(), random.Random(0)
    rng.shuffle(points)
    shown, chosen = set(), []
    for point in points:
        if not set(point.items()) <= shown:
            shown |= set(point.items())
            chosen.append(point)
    return chosen + rng.sample(points, min(more, len(points)))


def build_all(kernels, isa: InstructionSet, threads: int = 2) -> dict[str, tuple]:
    """Build each kernel's default, named ``default``, and a sample of its points: name -> (kernel, PrimFunc)."""
    built = {}
    for i, kernel in enumerate(kernels):
        built[f"k{i}_default"] = kernel, tunable.build(kernel, isa)
        space = tunable.space_of(kernel, isa, threads)
        for n, point in enumerate(sample(space) if space else []):
            built[f"k{i}_{n}"] = kernel, tunable.build(kernel, isa, point)
    return {name: (kernel, func.with_attr("global_symbol", name)) for name, (kernel, func) in built.items()}


def arguments(func, seed: int = 0) -> list[np.ndarray]:
    """Draw a PrimFunc's operands; what comes out is among them, full of what no kernel writes."""
    rng, arrays = np.random.default_rng(seed), []
    for buffer in func.params:
        shape, dtype = tuple(int(extent) for extent in buffer.shape), str(buffer.dtype)
        if buffer.name in _OUTPUTS:
            array = np.full(shape, 99 if dtype.startswith("int") else np.nan, dtype)
        elif buffer.name == "shift":
            array = np.zeros(shape, dtype)
        elif dtype.startswith("float"):
            array = rng.uniform(0.25, 1, shape).astype(dtype)
        else:
            low, high = (0, 256) if dtype == "uint8" else (-100, 101)
            array = rng.integers(low, high, shape).astype(dtype)
        arrays.append(array)
    return arrays


def outputs(function, func) -> list[np.ndarray]:
    """Call a compiled function with `arguments`, and return what it wrote."""
    arrays = arguments(func)
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    function(*tensors)
    return [tensor.numpy() for tensor, buffer in zip(tensors, func.params, strict=True) if buffer.name in _OUTPUTS]
