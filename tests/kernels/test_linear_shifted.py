"""Integer-only products: numpy, plain TIR and every tensorized kernel agree, bit for bit, up to the bound of int32."""

import re
from dataclasses import replace

import numpy as np
import pytest
import tvm

from agq_tvm.errors import AgqError
from agq_tvm.kernels import activation, linear_shifted
from agq_tvm.kernels.activation import QuantizeKernel
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.layout import K_BLOCK
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_shifted import ShiftedKernel
from agq_tvm.quantize.shifts import BLOCK, INT32_LARGEST, block_shifts, channel_order, check_totals, largest_total
from tests.kernels.operands import compiled, native, target_of
from tests.kernels.shifted_operands import falling, random_shifted, shifted_corners

NATIVE = ("avx512vnni", "avx2", "generic")
# N is no multiple of any tile; K has a short last block, or is cut into chunks of 5, 6, 7 and 1 blocks.
FORMS = [
    ShiftedKernel(1, 100, 150, "float16"),
    ShiftedKernel(8, 100, 150, None),
    ShiftedKernel(6, 65, 384, "float32"),
    ShiftedKernel(1, 70, 448, None),
    ShiftedKernel(3, 33, 352, None),
    ShiftedKernel(1, 33, 20, "float16"),
    ShiftedKernel(4, 33, 160, None, activation_bits=4),
]


@pytest.mark.parametrize("form", ["plain", *NATIVE])
@pytest.mark.parametrize("kernel", FORMS, ids=lambda kernel: kernel.name)
def test_exact_in_integers(kernel, form):
    """Plain TIR is the same for every instruction set but for its layout; one stands for all."""
    isa = native("generic" if form == "plain" else form)
    func = linear_shifted.define(kernel, isa) if form == "plain" else linear_shifted.build(kernel, isa)
    function = compiled(func, isa.name)
    for name, operands in {"random": random_shifted(kernel, 3, 1), **shifted_corners(kernel)}.items():
        operands = operands.integer_form()
        expected = operands.expected()
        np.testing.assert_array_equal(operands.run(function, isa), expected.astype("float32"), err_msg=name)


def at_the_bound(rows: int):
    """Return operands of the largest sum that fits, and one exponent more: 32 channels of 15 times 127 in a block.

    2^31 - 1 holds 35227 times 32 · 15 · 127: 137 blocks of exponent 8, and 128 + 16 + 8 + 2 + 1.
    """
    exponents = np.array([8] * 137 + [7, 4, 3, 1, 0])
    kernel = ShiftedKernel(rows, 40, K_BLOCK * len(exponents), None)
    base = random_shifted(kernel)
    x, q = np.full_like(base.x, 127), np.full_like(base.q, 15)
    x[-1] = -127
    return replace(base, x=x, q=q, exponents=exponents).integer_form(), np.append(exponents[:-1], [0, 0])


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("isa", NATIVE)
def test_exact_at_the_bound(isa, rows):
    isa, (operands, more) = native(isa), at_the_bound(rows)
    alpha = np.repeat(operands.exponents, K_BLOCK)
    largest = largest_total(operands.q, alpha, 8)
    assert INT32_LARGEST - 32 * 15 * 127 < largest == abs(operands.totals()).max() <= INT32_LARGEST
    check_totals("w", operands.q, alpha, 8)
    got = operands.run(compiled(linear_shifted.build(operands.kernel, isa), isa.name), isa)
    np.testing.assert_array_equal(got, operands.expected().astype("float32"))
    channels = len(more) * K_BLOCK
    with pytest.raises(AgqError, match=rf"w: sums over {channels} channels with exponents up to 8 .* max_refine"):
        check_totals("w", np.full((1, channels), 15, "uint8"), np.repeat(more, K_BLOCK), 8)


def test_the_bound_is_that_of_the_codes_in_use():
    """Small codes admit what large ones do not; 4-bit activations admit 18 times as much."""
    _, more = at_the_bound(1)
    alpha = np.repeat(more, K_BLOCK)
    codes = np.full((2, len(alpha)), 14, "uint8")
    check_totals("w", codes, alpha, 8)
    codes[1] = 15
    with pytest.raises(AgqError):
        check_totals("w", codes, alpha, 8)
    check_totals("w", codes, alpha, 4)
    # What is subtracted of small codes is 8 times the activations.
    assert largest_total(np.zeros_like(codes), alpha, 8) == 127 * 8 * int(np.exp2(alpha).sum())


def test_inner_dimensions_that_overflow_without_shifts_are_refused():
    channels = INT32_LARGEST // (15 * 127)
    assert ShiftedKernel(1, 64, channels, None).blocks == -(-channels // 32)
    with pytest.raises(AgqError, match=rf"sum over {channels + 1} channels .* int32: choose groups"):
        ShiftedKernel(1, 64, channels + 1, None)
    ShiftedKernel(1, 64, channels + 1, None, activation_bits=4)
    whole = channels // 32 * 32
    LinearKernel(1, 64, whole, 4, whole, False, None, False)
    with pytest.raises(AgqError, match="take groups of"):
        LinearKernel(1, 64, whole + 32, 4, whole + 32, False, None, False)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("isa", [name for name in INSTRUCTION_SETS if name != "generic"])
def test_shifts_and_multiplies_are_in_the_code(isa, rows):
    isa, kernel = INSTRUCTION_SETS[isa], ShiftedKernel(rows, 64, 512, None)
    func = linear_shifted.build(kernel, isa)
    assembly = tvm.compile(tvm.IRModule({kernel.name: func}), target=target_of(isa.name)).mod.inspect_source("asm")
    lines = assembly.splitlines()
    instruction = isa.multiply(4, 8, kernel.packed, rows).instruction
    vex = r"(?:\{vex\}\t)?"
    multiplies = [i for i, line in enumerate(lines) if re.match(rf"\t{vex}{instruction}2?\t", line)]
    # A loop's round is one k-block, with the shift before its multiplies: one for each vector of totals.
    shift = r"\t(vpslld|vpsllvd|ushl|shl)\t.*(%zmm|%ymm|v\d+\.4s)"
    lanes = {"avx512vnni": 16, "avxvnni": 8, "avx2": 8}.get(isa.family, 4)
    vectors = isa.layout_4bit.width // lanes * (isa.rows if rows > 1 else 1)
    assert sum(bool(re.match(shift, line)) for line in lines) >= vectors
    spilled = r"\t(vmov\w+\t%[zy]mm\d+, .*\(|st[rp]\tq)"
    if isa.name != "avx2":  # it has 16 registers
        assert not [line for line in lines[multiplies[0] : multiplies[-1]] if re.match(spilled, line)]


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_xeons_fetch_the_next_chunk_of_many_rows(isa):
    """All lines of it, 4 k-blocks of 16, each of 4 tiles of rows its part; others fetch none."""
    func = linear_shifted.build(ShiftedKernel(16, 128, 1024, None), INSTRUCTION_SETS[isa])
    loops, _, prefetches = func.script().partition("llvm.prefetch")
    assert bool(prefetches) == (isa == "avx512vnni-xeon")
    if prefetches:
        assert int(re.findall(r"in range\((\d+)\)", loops)[-1]) == 16


@pytest.mark.parametrize("source,channels", [("plain", 150), ("rms_norm", 96), ("silu_mul", 352), ("plain", 20)])
def test_codes_stand_in_the_order_of_the_exponents(source, channels):
    """What the fused quantization gathers, divides and sums, against the plain one."""
    layout = INSTRUCTION_SETS["generic"].layout_4bit
    padded, rng = -(-channels // 32) * 32, np.random.default_rng(channels)
    kernel = QuantizeKernel(source, 3, channels, padded, "static", 1e-5, refined=True)
    shifted = replace(kernel, shifted=True)
    alpha = rng.permutation(np.repeat(falling(padded // 32, 3, 1), 32)[:channels])
    order, shift = channel_order(alpha), block_shifts(alpha)
    inputs = [rng.standard_normal(shape).astype("float32") * 3 for shape in kernel.input_shapes()]
    inputs[-2:] = np.exp2(-alpha).astype("float32"), np.array([0.02, -5], "float32")

    def run(kernel, inputs):
        outputs = [tvm.runtime.tensor(np.full(s, 99, d)) for s, d in kernel.output_shapes(layout)]
        compiled(activation.build(kernel, layout), "generic")(*map(tvm.runtime.tensor, inputs), *outputs)
        codes, scales, sums = (output.numpy() for output in outputs)
        return codes.transpose(1, 0, 2, 3, 4).reshape(3, -1), scales, sums

    plain, scales, _ = run(kernel, inputs)
    ordered = [*inputs[:-2], inputs[-2][order], inputs[-1], order, shift]
    codes, same_scales, sums = run(shifted, ordered)
    np.testing.assert_array_equal(codes[:, :channels], plain[:, order])
    assert not codes[:, channels:].any()
    np.testing.assert_array_equal(scales, same_scales)
    np.testing.assert_array_equal(sums, (plain[:, :channels] * 2 ** alpha.astype("int64")).sum(1, keepdims=True))


def test_a_block_of_exponents_is_a_k_block():
    assert BLOCK == K_BLOCK


@pytest.mark.parametrize("kernel", FORMS[1:3], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("isa", NATIVE)
def test_scaled_result(isa, kernel):
    isa = native(isa)
    operands = random_shifted(kernel, 4, 3)
    expected = operands.expected()
    got = operands.run(compiled(linear_shifted.build(kernel, isa), isa.name), isa)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * abs(expected).max())
