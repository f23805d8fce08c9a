"""Attention over int8 caches: codes bit for bit, then the result against numpy on those codes."""

import numpy as np
import pytest
import torch
import tvm

from agq_tvm.kernels.attention import build_attention
from agq_tvm.kernels.attention_append import build_append
from agq_tvm.kernels.attention_form import AttentionKernel, attention_form
from agq_tvm.kernels.emit import LANES
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.quantize.int8_cache import attend_int8
from tests.kernels.operands import compiled, native

CASES = [  # rows, heads, kv heads, head dim, context, cached, valid
    (1, 9, 3, 64, 96, 80, 1),
    (1, 4, 4, 32, 64, 63, 1),  # the context is full
    (8, 6, 2, 16, 48, 0, 8),
    (8, 6, 2, 16, 48, 45, 3),  # the padding rows would not fit the context
    (3, 4, 2, 25, 48, 21, 3),  # a head that fills no vector
    (4, 8, 1, 24, 128, 99, 4),
]
ISAS = pytest.mark.parametrize("isa", ["generic", "avx2", "avx512vnni"])


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes of the last axis and their scales, as the caches have them."""
    largest = abs(x).max(-1, keepdims=True)
    scales = np.where(largest == 0, np.float32(1), largest / np.float32(127)).astype("float32")
    return np.round(x * (np.float32(1) / scales)).astype("int8"), scales[..., 0]


def tensors(*arrays: np.ndarray) -> list:
    return [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in arrays]


class Case:
    """Rows appended to random caches, and attention over them."""

    def __init__(
        self, shape, isa: str, alibi: bool = False, importance: bool = False, spread: float = 1, compiled=compiled
    ):
        rows, heads, kv_heads, dim, context, self.cached, self.valid = shape
        form = attention_form(instruction_set(isa), "int8")
        self.kernel = k = AttentionKernel(*shape[:5], form, alibi, importance=importance)
        rng = np.random.default_rng(0)
        self.qkv = rng.standard_normal((rows, heads + 2 * kv_heads, dim)).astype("float32") * spread
        self.qkv[0, heads, :] = 0  # a key that is nothing but zeros
        past = rng.standard_normal((2, kv_heads, context, dim)).astype("float32")
        past *= np.geomspace(0.1, 10, context)[:, None]  # scales that differ
        past[:, :, self.cached :] = 0
        self.codes, self.scales = quantized(past)
        self.scales[:, :, self.cached :] = 0
        self.slopes = 0.3 ** np.arange(heads, dtype="float32")
        lengths = np.array([self.cached, self.valid], "int32")
        caches = tensors(*self.packed(), *self.scales)
        queries = tensors(*(np.zeros(*query) for query in k.queries))
        compiled(build_append(k, rotary=False), isa)(*tensors(self.qkv.reshape(rows, -1), lengths), *caches, *queries)
        outputs = tensors(np.full((rows, heads * dim), np.nan, "float32"))
        outputs += tensors(np.full((rows, heads), np.nan, "float32")) if importance else []
        slopes = tensors(self.slopes) if alibi else []
        compiled(build_attention(k), isa)(*queries, *caches, *tensors(lengths), *slopes, *outputs)
        self.caches, self.queries = [t.numpy() for t in caches], [t.numpy() for t in queries]
        self.out = outputs[0].numpy().reshape(rows, heads, dim)[: self.valid]
        self.importance = outputs[1].numpy()[: self.valid] if importance else None

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the codes as the caches have them."""
        k = self.kernel
        full = np.zeros((2, k.kv_heads, k.context, k.channels), "int8")
        full[..., : k.head_dim] = self.codes
        keys = full[0].reshape(k.kv_heads, -1, LANES, k.channels // 4, 4).transpose(0, 1, 3, 2, 4)
        return keys, full[1].reshape(k.kv_heads, -1, 4, k.channels).transpose(0, 1, 3, 2)

    def append(self) -> None:
        """Do to `codes` and `scales` what the kernel did to the caches."""
        k, end = self.kernel, self.cached + self.valid
        for i in range(2):
            heads = self.qkv[: self.valid, k.heads + i * k.kv_heads :][:, : k.kv_heads]
            codes, scales = quantized(heads)
            self.codes[i, :, self.cached : end] = codes.transpose(1, 0, 2)
            self.scales[i, :, self.cached : end] = scales.T

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the output [valid, H, D] and the first key's probability, in float64 from the codes."""
        k = self.kernel
        q, q_scales = quantized(self.qkv[:, : k.heads])
        out, first = np.empty((self.valid, k.heads, k.head_dim)), np.empty((self.valid, k.heads))
        for m in range(self.valid):
            for h in range(k.heads):
                g, seen = h // k.shared, self.cached + m + 1
                sums = self.codes[0, g, :seen].astype("int64") @ q[m, h].astype("int64")
                scores = sums * self.scales[0, g, :seen].astype("float64") * q_scales[m, h] * k.head_dim**-0.5
                if k.alibi:
                    scores += self.slopes[h] * np.arange(seen)
                p = np.exp(scores - scores.max())
                p /= p.sum()
                out[m, h] = (p * self.scales[1, g, :seen]) @ self.codes[1, g, :seen].astype("float64")
                first[m, h] = p[0]
        return out, first


@ISAS
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_codes_and_result(shape, isa):
    native(isa)
    case = Case(shape, isa)
    case.append()
    for found, expected in zip(case.caches, (*case.packed(), *case.scales), strict=True):
        np.testing.assert_array_equal(found, expected)
    q, q_scales = quantized(case.qkv[:, : shape[1]])
    np.testing.assert_array_equal(case.queries[0][..., : shape[3]], q)
    assert (case.queries[0][..., shape[3] :] == 0).all()
    np.testing.assert_allclose(case.queries[1], q_scales * shape[3] ** -0.5, rtol=2e-7)
    out, _ = case.expected()
    np.testing.assert_allclose(case.out, out, rtol=0, atol=2e-4 * abs(out).max())


@ISAS
def test_alibi_and_importance(isa):
    native(isa)
    case = Case((8, 6, 2, 16, 48, 21, 8), isa, alibi=True, importance=True)
    case.append()
    out, first = case.expected()
    np.testing.assert_allclose(case.out, out, rtol=0, atol=2e-4 * abs(out).max())
    np.testing.assert_allclose(case.importance, first, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("isa", ["generic", "avx512vnni"])
@pytest.mark.parametrize("spread", [0.0, 1e-20, 1e15])
def test_sizes_at_the_ends(isa, spread):
    """Zeros give zeros, and neither tiny nor huge values anything that is not finite."""
    native(isa)
    case = Case((8, 6, 2, 16, 48, 0, 8), isa, spread=spread)
    case.append()
    assert np.isfinite(case.out).all()
    limit = abs(case.qkv).max()
    assert abs(case.out).max() <= limit * 1.001


@pytest.mark.parametrize("isa", ["generic", "avx512vnni"])
def test_sums_at_the_ends_of_their_range(isa):
    """Codes of 127 everywhere, of either sign: a head of 128 channels sums to 127 * 127 * 128, exactly."""
    native(isa)
    form = attention_form(instruction_set(isa), "int8")
    kernel = AttentionKernel(1, 2, 1, 128, 32, form)
    q = np.full(kernel.queries[0][0], 127, kernel.queries[0][1])
    q[0, 1] = -127
    caches = [np.full(shape, 127 if dtype == "int8" else 1, dtype) for _, shape, dtype in kernel.caches]
    caches[2][:] = np.float32(1 / (127 * 127 * 128))
    caches[3][0, ::2] = 3
    out = tvm.runtime.tensor(np.zeros((1, 256), "float32"))
    lengths = np.array([31, 1], "int32")
    arrays = (q, np.ones((1, 2), "float32"), *caches, lengths)
    compiled(build_attention(kernel), isa)(*tensors(*arrays), out)
    np.testing.assert_allclose(out.numpy(), 127 * 2, rtol=1e-4)  # equal weights; scales of 1 and 3


def test_smmla_leaves_caches_to_sdot():
    dots = [attention_form(instruction_set(isa), "int8").dot for isa in ("i8mm", "dotprod")]
    assert dots[0] == dots[1] is not None


def test_the_reference_does_the_same():
    case = Case((8, 6, 2, 16, 48, 0, 8), "generic")
    k = case.kernel
    q, keys, values = np.split(case.qkv, [k.heads, k.heads + k.kv_heads], axis=1)
    heads = (torch.from_numpy(x).transpose(0, 1) for x in (q, keys, values))
    out = attend_int8(*heads, None).transpose(0, 1).numpy()
    np.testing.assert_allclose(case.out, out, rtol=0, atol=1e-5)
