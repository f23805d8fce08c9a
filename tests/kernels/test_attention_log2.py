"""Attention with log2 probabilities: its codes, read through values of one bit, and its integer sums."""

import math

import numpy as np
import pytest
import torch
import tvm

from agq_tvm.kernels.attention import build_attention
from agq_tvm.kernels.attention_append import build_append
from agq_tvm.kernels.attention_form import AttentionForm, AttentionKernel, attention_form
from agq_tvm.kernels.emit import LANES
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.quantize.codebooks import CODE_BOOKS
from agq_tvm.quantize.log2 import Log2Attention, log2_codes, to_output, value_codes, weighted_sums
from tests.kernels.operands import compiled, native

BOOKS = pytest.mark.parametrize("book", CODE_BOOKS.values(), ids=CODE_BOOKS.keys())
CASES = [  # rows, heads, kv heads, head dim, context, cached, valid
    (1, 9, 3, 64, 96, 80, 1),
    (8, 6, 2, 16, 48, 37, 8),
    (8, 6, 2, 16, 48, 45, 3),  # the padding rows would not fit the context
    (3, 4, 4, 25, 48, 0, 3),
]


class Case:
    """Random queries and keys of every sharpness; runs the kernel with values of one's choice."""

    def __init__(self, shape, book, isa: str = "generic", alibi: bool = False):
        rows, heads, kv_heads, dim, context, self.cached, self.valid = shape
        self.kernel = AttentionKernel(
            rows, heads, kv_heads, dim, context, attention_form(instruction_set(isa), book=book), alibi
        )
        rng = np.random.default_rng(1)
        self.q = rng.standard_normal((rows, heads, dim)).astype("float32")
        self.q *= np.geomspace(0.03, 3, heads)[None, :, None] / dim**0.5
        self.keys = rng.standard_normal((kv_heads, context, dim)).astype("float16")
        self.slopes = [0.3 ** np.arange(heads, dtype="float32")] if alibi else []
        self._function = compiled(build_attention(self.kernel), isa)

    def run(self, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Return the output, [valid, H, D], for int8 values [KV, context, D] and their scales [KV]."""
        k = self.kernel
        keys = np.ascontiguousarray(self.keys.reshape(k.kv_heads, -1, LANES, k.head_dim).transpose(0, 1, 3, 2))
        lengths = np.array([self.cached, self.valid], "int32")
        arrays = (self.q, keys, values, lengths, scale.astype("float32"), *self.slopes)
        out = tvm.runtime.tensor(np.full((k.rows, k.heads * k.head_dim), np.nan, "float32"))
        self._function(*map(tvm.runtime.tensor, arrays), out)
        return out.numpy().reshape(k.rows, k.heads, k.head_dim)[: self.valid]

    def powers(self) -> np.ndarray:
        """Return the kernel's 2^(15 - code) of every key, [valid, H, context], of a book that is not relative.

        Values that are 1 for one key and channel, and 0 for the others, let each channel show one key.
        """
        k = self.kernel
        found = np.empty((self.valid, k.heads, k.context), "int64")
        for start in range(0, k.context, k.head_dim):
            count = min(k.head_dim, k.context - start)
            values = np.zeros((k.kv_heads, k.context, k.head_dim), "int8")
            values[:, np.arange(start, start + count), np.arange(count)] = 1
            found[:, :, start : start + count] = self.run(values, np.full(k.kv_heads, 2.0**15))[:, :, :count]
        return found

    def scores(self) -> np.ndarray:
        """Return the scores of all keys in float64, [valid, H, context], -inf where masked."""
        k = self.kernel
        keys = np.repeat(self.keys.astype("float64"), k.shared, axis=0)
        scores = np.einsum("mhd,hjd->mhj", self.q[: self.valid].astype("float64"), keys)
        distance = np.arange(k.context) - (self.cached + np.arange(self.valid))[:, None]
        for slopes in self.slopes:
            scores += slopes[None, :, None] * distance[:, None]
        return np.where(distance[:, None] > 0, -np.inf, scores)

    def per_query_head(self, values: np.ndarray) -> torch.Tensor:
        """Return values float32 [H, context, D] as the query heads share them."""
        return torch.from_numpy(np.repeat(values, self.kernel.shared, axis=0)).float()


def exponents(scores: np.ndarray, relative: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return what is rounded to a code, and where rounding errors may decide it, both [valid, H, context]."""
    below = scores.max(-1, keepdims=True) - scores
    log_sum = np.log2(np.exp(-below).sum(-1, keepdims=True))
    exact = np.minimum(below * math.log2(math.e) + (np.floor(log_sum) if relative else log_sum), 99)
    unsure = abs(exact - np.floor(exact) - 0.5) < 1e-5
    if relative:
        distance = abs(log_sum - np.round(log_sum))
        unsure |= (distance < 1e-5) & (distance > 0)
    return exact, unsure


@pytest.mark.parametrize(("isa", "alibi"), [("generic", True), ("avx2", False), ("avx512vnni", False)])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_codes_and_sums_of_the_paper(shape, isa, alibi):
    native(isa)
    book = CODE_BOOKS["log2-paper"]
    case = Case(shape, book, isa, alibi)
    powers = case.powers()
    codes = np.where(powers == 0, book.zero, 15 - np.log2(np.maximum(powers, 1)))
    exact, unsure = exponents(case.scores(), relative=False)
    expected = np.clip(np.round(exact), 0, book.zero)
    assert unsure.mean() < 0.001 and ((codes == expected) | unsure).all()
    assert len(np.unique(codes)) > 5 or case.cached == 0
    values = np.random.default_rng(2).integers(-127, 128, (case.kernel.caches[1][1])).astype("int8")
    sums = case.run(values, np.full(case.kernel.kv_heads, 2.0**15))
    integers = np.einsum("mhj,hjd->mhd", powers, case.per_query_head(values).numpy().astype("int64"))
    np.testing.assert_array_equal(sums, integers)  # below 2^24: exact in float32


@BOOKS
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_output_is_the_references_bit_for_bit(shape, book):
    case = Case(shape, book)
    scores = case.scores()
    _, unsure = exponents(scores, book.relative)
    values = np.random.default_rng(3).integers(-127, 128, case.kernel.caches[1][1]).astype("int8")
    scale = np.random.default_rng(4).uniform(0.01, 0.1, case.kernel.kv_heads).astype("float32")
    codes = log2_codes(torch.from_numpy(scores), book).transpose(0, 1)  # [H, valid, context]
    sums, totals = weighted_sums(codes, case.per_query_head(values), book)
    per_head = torch.from_numpy(np.repeat(scale, case.kernel.shared))[:, None, None]
    expected = to_output(sums, totals, per_head, book).numpy().transpose(1, 0, 2)
    sure = ~unsure.any(-1)
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(case.run(values, scale)[sure], expected[sure])


@BOOKS
def test_equal_scores_and_single_keys(book):
    """Sums that are powers of two, and others; 33 equal keys of the paper's book round to 2^-5 each."""
    case = Case((8, 6, 2, 16, 48, 32, 8), book)
    case.q[:] = 0
    values = np.full(case.kernel.caches[1][1], -127, "int8")
    out = case.run(values, np.ones(2))
    for row in range(8):
        keys = 33 + row
        expected = -127.0 if book.relative else -127 * keys * 2.0 ** -round(math.log2(keys))
        np.testing.assert_allclose(out[row], expected, rtol=1e-6)


def test_more_keys_than_codes_reach():
    """With 2^15 equal keys every probability is below the last code of ours: zeros, not NaN."""
    case = Case((1, 1, 1, 16, 1 << 15, (1 << 15) - 1, 1), CODE_BOOKS["log2"])
    case.q[:] = 0
    assert (case.run(np.ones(case.kernel.caches[1][1], "int8"), np.ones(1)) == 0).all()


@pytest.mark.parametrize("rotary", [False, True])
def test_values_are_appended_as_codes(rotary):
    rows, heads, kv_heads, dim, context, cached, valid = shape = (8, 6, 2, 16, 48, 21, 5)
    kernel = AttentionKernel(*shape[:5], AttentionForm(book=CODE_BOOKS["log2"]))
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((rows, (heads + 2 * kv_heads) * dim)).astype("float32")
    scale = np.array([0.5, 0.01], "float32")  # the second head is clipped
    own = qkv.reshape(rows, -1, dim)[:, heads + kv_heads :]
    own[0, 0, :6] = [0.25, 0.75, -0.25, -0.75, 63.5, -100.0]  # ties, the last code, and beyond it
    tables = [np.zeros((context, dim // 2), "float32")] * 2 + [np.zeros(rows, "int32")] if rotary else []
    lengths = np.array([cached, valid], "int32")
    before = rng.integers(-127, 128, kernel.caches[1][1]).astype("int8")
    keys, values = (tvm.runtime.tensor(a) for a in (np.zeros(kernel.caches[0][1], "float16"), before))
    q = tvm.runtime.tensor(np.zeros((rows, heads, dim), "float32"))
    function = compiled(build_append(kernel, rotary), "generic")
    function(*map(tvm.runtime.tensor, (qkv, *tables, lengths, scale)), keys, values, q)
    expected = before.copy()
    new = value_codes(torch.from_numpy(np.ascontiguousarray(own[:valid].transpose(1, 0, 2))), torch.from_numpy(scale))
    expected[:, cached : cached + valid] = new.numpy()
    np.testing.assert_array_equal(values.numpy(), expected)
    assert expected[0, cached, :6].tolist() == [0, 2, 0, -2, 127, -127] and abs(expected[1]).max() == 127


@BOOKS
def test_the_reference_is_made_of_the_same_parts(book):
    """`Log2Attention` over a whole text against the kernel, prefilled at once."""
    kernel_case = Case((8, 6, 2, 16, 16, 0, 8), book)
    rng = np.random.default_rng(6)
    v = rng.standard_normal((2, 16, 16)).astype("float32")
    scale = torch.tensor([0.02, 0.03])
    codes = value_codes(torch.from_numpy(v), scale).to(torch.int8).numpy()
    q = torch.from_numpy(kernel_case.q).transpose(0, 1) * 16**0.5
    keys = torch.from_numpy(kernel_case.keys).float()[:, :8]
    expected = Log2Attention(book, scale)(q, keys, torch.from_numpy(v[:, :8]), None).transpose(0, 1).numpy()
    np.testing.assert_allclose(kernel_case.run(codes, scale.numpy()), expected, rtol=1e-6, atol=1e-7)
