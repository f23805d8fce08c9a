"""4-bit weights times 4-bit activations on a Cortex-A72: every pair of codes, whole products, and real overflows."""

from dataclasses import replace

import numpy as np
import pytest
import tvm

from agq_tvm.kernels import linear
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.intrin.tensor_intrin import Tile, dot_impl
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.tvm_seam import T, tirx
from tests.boards import kernels
from tests.kernels.multiplies import Long
from tests.kernels.operands import Operands, corner_operands, random_operands

pytestmark = pytest.mark.emulator

DEVICE = "raspberry-pi-4"
ISAS = ("neon", "neon-paper")
# K and N are no multiples of any tile or group.
FORMS = [
    LinearKernel(1, 100, 150, 4, 32, True, "float16", False, 4),
    LinearKernel(1, 70, 130, 4, 64, False, None, False, 4),
    LinearKernel(1, 33, 300, 4, 128, True, "float32", True, 4),
    LinearKernel(3, 97, 100, 4, 32, True, None, False, 4),
    LinearKernel(6, 65, 190, 4, 64, True, "float32", False, 4),
    LinearKernel(8, 100, 300, 4, 128, False, None, True, 4),
]
# Neighbouring columns have all pairs of weights; rows have all activations, and one of them twice.
PAIRS = {rows: LinearKernel(rows, 512, 32, 4, 32, True, "float16", False, 4) for rows in (1, 16)}


def unsigned_sums(total, _):
    """Show the 16-bit sums of Algorithm 1 as they are, of activations + 8."""
    return T.Cast("int32x8", tirx.reinterpret("uint16x8", total))


def tile(isa: str, steps: int, packed: bool, **changes):
    """Return the bare tile of 4 x 4 bit products, for one row, with that many steps in its k-block."""
    isa = INSTRUCTION_SETS[isa]
    form = isa.layout_4bit
    layout = Long(form.bits, form.vectors, form.lanes, form.depth, form.zero, steps)
    return dot_impl(Tile(1, layout, packed, isa.center(4, 4, packed)), replace(isa.multiply_4x4, **changes))


TILES = {
    "bytes_8": tile("neon", 8, False),
    "bytes_146": tile("neon", 146, False),
    "bytes_147": tile("neon", 147, False),
    "paper_8": tile("neon-paper", 8, True),
    "paper_9": tile("neon-paper", 9, True),
    "paper_sums_73": tile("neon-paper", 73, False, fold=unsigned_sums),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    functions = {name: func.with_attr("global_symbol", name) for name, func in TILES.items()}
    for isa in ISAS:
        for kernel in [*FORMS, *PAIRS.values()]:
            name = f"{isa.replace('-', '_')}_{kernel.name}"
            functions[name] = linear.build(kernel, INSTRUCTION_SETS[isa]).with_attr("global_symbol", name)
    return kernels.library(tvm.IRModule(functions), DEVICE, tmp_path_factory.mktemp("library"), "multiply.so")


@pytest.fixture
def board(boards, library):
    """Return a function that calls one of the library's by its name; its last operand is written."""
    with boards.session(DEVICE) as session, kernels.loaded(session, library) as function:
        yield function


def linear_of(board, isa: str, kernel: LinearKernel):
    return board(f"{isa.replace('-', '_')}_{kernel.name}")


@pytest.mark.parametrize("kernel", FORMS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("isa", ISAS)
def test_whole_product_is_exact_in_integers(board, isa, kernel):
    function = linear_of(board, isa, kernel)
    for name, operands in {"random": random_operands(kernel, 1), **corner_operands(kernel)}.items():
        operands = operands.integer_form()
        got = operands.run(function, INSTRUCTION_SETS[isa])
        np.testing.assert_array_equal(got, operands.expected(), err_msg=name)


@pytest.mark.parametrize("isa", ISAS)
def test_every_pair_of_codes(board, isa):
    """All activations with all pairs of neighbouring weights: in one channel alone, and in all 32."""
    q = np.stack(np.divmod(np.arange(256), 16), axis=1).reshape(512, 1).repeat(32, 1).astype("uint8")
    codes = np.append(np.arange(-7, 8), 7)
    placed = np.zeros((16, 32), "int8")
    placed[np.arange(16), np.arange(16) * 2 + np.arange(16) % 2] = codes
    for x in (placed, codes[:, None].repeat(32, 1).astype("int8")):
        for rows, kernel in PAIRS.items():
            for part in np.split(x, 16 // rows):
                operands = random_operands(kernel)
                operands = Operands(kernel, part, q, operands.sx, operands.scales, operands.offsets, None)
                operands = operands.integer_form()
                got = operands.run(linear_of(board, isa, kernel), INSTRUCTION_SETS[isa])
                np.testing.assert_array_equal(got, operands.dots()[:, 0])


def sums_of(board, name: str, x: int, code: int, used: int | None = None) -> tuple[np.ndarray, int]:
    """Run a tile on activations that are all `x`, weights that are all `code` (0 from channel `used` on).

    Returns its int32 sums [32], started at 1000, and what they should be by the specification.
    """
    steps = int(name.rpartition("_")[2])
    channels = np.where(np.arange(steps * 4) < (used or steps * 4), code, 0).astype("uint8")
    center = 8 if name.startswith("bytes") else 0
    if name in ("paper_8", "paper_9"):
        low, high = channels.reshape(steps, 2, 2).transpose(1, 0, 2)
        weights = np.ascontiguousarray(np.broadcast_to((low | high << 4)[:, None, None], (steps, 4, 8, 2)))
    else:
        bytes_ = (channels - np.uint8(center)).reshape(steps, 2, 1, 1, 2)
        weights = np.ascontiguousarray(np.broadcast_to(bytes_, (steps, 2, 4, 8, 2)))
        weights = weights.view("int8") if center else weights
    activations = np.full((steps, 2, 2), x, "int8")
    sums = tvm.runtime.tensor(np.full((4, 8), 1000, "int32"))
    board(name)(tvm.runtime.tensor(activations), tvm.runtime.tensor(weights), sums)
    offset = 8 if "sums" in name else 0
    return sums.numpy().ravel(), 1000 + int(((channels.astype(int) - center) * (x + offset)).sum())


@pytest.mark.parametrize(
    "name,holds,breaks",
    [
        # Two products in a byte: 2 * 8 * 7 = 112, but 2 * 8 * 8 = 128.
        ("bytes_8", [(-7, 0), (7, 0), (-7, 15), (7, 15)], (-8, 0)),
        # Activations + 8 times 15 in a byte: 17 * 15 = 255, but 18 * 15 = 270; and none below 0.
        ("paper_8", [(-7, 15), (7, 15), (-7, 0), (9, 15), (-8, 15)], (10, 15)),
        ("paper_8", [(-8, 1)], (-9, 1)),
    ],
)
def test_overflow_is_real_beyond_the_range_of_codes(board, name, holds, breaks):
    for x, code in holds:
        got, expected = sums_of(board, name, x, code)
        assert (got == expected).all(), (x, code)
    got, expected = sums_of(board, name, *breaks)
    assert (got != expected).all()


@pytest.mark.parametrize(
    "holds,breaks",
    [
        # 16-bit lanes, 4 products of 56 in each step: 146 * 224 = 32704, 147 * 224 = 32928.
        (("bytes_146", -7, 0), ("bytes_147", -7, 0)),
        # 16-bit sums of unsigned products: 291 * 225 = 65475, 292 * 225 = 65700.
        (("paper_sums_73", 7, 15, 291), ("paper_sums_73", 7, 15, 292)),
        # Sums of weights in bytes, 2 in each step: 16 * 15 = 240, 18 * 15 = 270.
        (("paper_8", 7, 15), ("paper_9", 7, 15)),
    ],
)
def test_overflow_is_real_beyond_the_longest_sum(board, holds, breaks):
    got, expected = sums_of(board, *holds)
    assert (got == expected).all()
    got, expected = sums_of(board, *breaks)
    assert (got != expected).all()
