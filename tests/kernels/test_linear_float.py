"""Products of quantized weights and float activations, against numpy in float64."""

import re

import numpy as np
import pytest
import tvm

from agq_tvm.flow.packing import pack_codes
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.linear_float import FloatLinearKernel, build, float_form
from tests.kernels.operands import compiled, native, target_of

NATIVE = ("avx512vnni", "avx2", "generic")
# K and N are no multiples of any tile or group.
FORMS = [
    FloatLinearKernel(1, 100, 150, 4, 32, "float16", False),
    FloatLinearKernel(1, 33, 300, 4, 128, None, True),
    FloatLinearKernel(8, 100, 150, 4, 64, "float32", True),
    FloatLinearKernel(6, 65, 190, 4, 64, None, False),
    FloatLinearKernel(1, 97, 100, 8, 32, None, False),
    FloatLinearKernel(3, 65, 190, 8, 128, None, True),
]


def check(kernel: FloatLinearKernel, isa: str, function) -> None:
    """Call a kernel on random operands, and compare with the product of the dequantized weights."""
    form, rng = float_form(INSTRUCTION_SETS[isa]), np.random.default_rng(kernel.columns)
    layout, groups = form.layout(kernel.bits), kernel.padded // kernel.group_size
    x = np.zeros((kernel.rows, kernel.padded), "float32")
    x[:, : kernel.channels] = rng.standard_normal((kernel.rows, kernel.channels))
    q = rng.integers(0, 1 << kernel.bits, (kernel.columns, kernel.channels)).astype("uint8")
    scales = rng.standard_normal((kernel.columns, groups)).astype("float16")
    offsets = rng.standard_normal((kernel.columns, groups)).astype(kernel.offsets) if kernel.offsets else None
    bias = rng.standard_normal(kernel.columns).astype("float32")
    arrays = [x, pack_codes(q, kernel.group_size, layout), layout.pack_columns(scales)]
    arrays += [] if offsets is None else [layout.pack_columns(offsets)]
    arrays += [np.ascontiguousarray(layout.pack_columns(bias[:, None])[:, 0])] if kernel.bias else []
    out = tvm.runtime.tensor(np.full((kernel.rows, layout.tiles(kernel.columns) * layout.width), np.nan, "float32"))
    function(*map(tvm.runtime.tensor, arrays), out)
    of_channel = np.arange(kernel.channels) // kernel.group_size
    zero = 0 if kernel.offsets else {4: 8, 8: 128}[kernel.bits]
    weights = (q.astype("float64") - zero) * scales[:, of_channel]
    weights += 0 if offsets is None else offsets[:, of_channel]
    expected = x[:, : kernel.channels] @ weights.T + (bias if kernel.bias else 0)
    np.testing.assert_allclose(out.numpy()[:, : kernel.columns], expected, rtol=0, atol=1e-6 * abs(expected).max())


@pytest.mark.parametrize("kernel", FORMS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("isa", NATIVE)
def test_the_product_is_that_of_the_dequantized_weights(isa, kernel):
    native(isa)
    check(kernel, isa, compiled(build(kernel, float_form(INSTRUCTION_SETS[isa])), isa))


@pytest.mark.parametrize(
    "isa,multiply,store",
    [
        ("avx512vnni", r"\tvfmadd\w+ps\t.*%zmm", r"\tvmov\w+\t%zmm\d+, .*\("),
        ("avx2", r"\tvfmadd\w+ps\t.*%ymm", r"\tvmov\w+\t%ymm\d+, .*\("),
        ("neon", r"\tfmla\tv\d+\.4s", r"\tst[rp]\tq"),
    ],
)
@pytest.mark.parametrize("rows", [1, 8])
def test_sums_stay_in_registers(isa, rows, multiply, store):
    """The innermost loop multiplies and adds, and stores nothing."""
    form = float_form(INSTRUCTION_SETS[isa])
    kernel = FloatLinearKernel(rows, 64, 512, 4, 64, "float16", False)
    library = tvm.compile(tvm.IRModule({kernel.name: build(kernel, form)}), target=target_of(isa))
    lines = library.mod.inspect_source("asm").splitlines()
    found = [i for i, line in enumerate(lines) if re.search(multiply, line)]
    innermost = form.layout_4bit.vectors * min(rows, form.rows)
    assert len(found) >= innermost
    inside = lines[found[-innermost] : found[-1]]
    assert [line for line in inside if re.search(store, line)] == []
