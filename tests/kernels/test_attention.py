"""Attention and the step before it, rotary or not, against plain numpy, over caches with a past."""

import numpy as np
import pytest
import tvm

from agq_tvm.kernels.attention import build_attention
from agq_tvm.kernels.attention_append import build_append
from agq_tvm.kernels.attention_form import AttentionKernel, attention_form
from agq_tvm.kernels.attention_products import Pairs
from agq_tvm.kernels.attention_space import default
from agq_tvm.kernels.emit import LANES
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS, instruction_set
from tests.kernels.operands import compiled, native

CASES = [  # rows, heads, kv heads, head dim, context, cached, valid
    (1, 9, 3, 64, 64, 0, 1),
    (1, 4, 4, 32, 64, 63, 1),
    (8, 6, 2, 16, 48, 21, 8),
    (8, 6, 2, 16, 48, 45, 3),  # the padding rows would not fit the context
    (16, 8, 1, 24, 128, 100, 16),
    (3, 4, 2, 24, 48, 45, 3),
]


def keys_of(cache: np.ndarray) -> np.ndarray:
    """Return keys as [KV, context, D]."""
    return cache.transpose(0, 1, 3, 2).reshape(cache.shape[0], -1, cache.shape[2])


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate heads [M, heads, D] by the tables' rows [M, D / 2]."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class Case:
    """A random case and what the kernels make of it."""

    def __init__(self, shape, isa: str = "generic", rotary: bool = True, alibi: bool = False):
        rows, heads, kv_heads, dim, context, self.cached, self.valid = shape
        self.kernel = kernel = AttentionKernel(
            rows, heads, kv_heads, dim, context, attention_form(instruction_set(isa)), alibi
        )
        self.rotary, self.slopes = rotary, 0.3 ** np.arange(heads, dtype="float32")
        rng = np.random.default_rng(0)
        self.keys, self.values = (np.zeros(shape, dtype) for _, shape, dtype in kernel.caches)
        past = rng.standard_normal((kv_heads, self.cached, dim)).astype("float16")
        keys_of_past = np.zeros((kv_heads, context, dim), "float16")
        keys_of_past[:, : self.cached] = past
        self.keys[:] = keys_of_past.reshape(kv_heads, -1, LANES, dim).transpose(0, 1, 3, 2)
        self.values[:, : self.cached] = rng.standard_normal(past.shape)
        self.qkv = rng.standard_normal((rows, (heads + 2 * kv_heads) * dim)).astype("float32")
        angles = np.outer(np.arange(context), 1e4 ** -(np.arange(dim // 2) / (dim // 2)))
        self.cos, self.sin = np.cos(angles).astype("float32"), np.sin(angles).astype("float32")
        self.positions = np.minimum(np.arange(rows) + self.cached, context - 1).astype("int32")
        lengths = np.array([self.cached, self.valid], "int32")
        inputs = (self.qkv, self.cos, self.sin, self.positions) if rotary else (self.qkv,)
        *tensors, lengths, keys, values = map(tvm.runtime.tensor, (*inputs, lengths, self.keys, self.values))
        q = tvm.runtime.tensor(np.zeros((rows, heads, dim), "float32"))
        compiled(build_append(kernel, rotary), isa)(*tensors, lengths, keys, values, q)
        out = tvm.runtime.tensor(np.full((rows, heads * dim), np.nan, "float32"))
        slopes = [tvm.runtime.tensor(self.slopes)] if alibi else []
        compiled(build_attention(kernel), isa)(q, keys, values, lengths, *slopes, out)
        self.new_keys, self.new_values = keys.numpy(), values.numpy()
        self.out = out.numpy()[: self.valid].reshape(self.valid, heads, dim)

    def expected(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return keys [KV, context, D], values, and the output [valid, H, D]."""
        k, n = self.kernel, self.valid
        cos, sin = self.cos[self.positions], self.sin[self.positions]
        heads = self.qkv.reshape(k.rows, -1, k.head_dim)
        q, new_k, new_v = np.split(heads, [k.heads, k.heads + k.kv_heads], axis=1)
        if self.rotary:
            q, new_k = rotate(q, cos, sin), rotate(new_k, cos, sin)
        keys, values = keys_of(self.keys).copy(), self.values.copy()
        keys[:, self.cached : self.cached + n] = new_k[:n].transpose(1, 0, 2)
        values[:, self.cached : self.cached + n] = new_v[:n].transpose(1, 0, 2)
        out = np.zeros((n, k.heads, k.head_dim))
        for m in range(n):
            for h in range(k.heads):
                seen, g = self.cached + m + 1, h // k.shared
                s = keys[g, :seen].astype("float64") @ q[m, h] / np.sqrt(k.head_dim)
                if k.alibi:
                    s += self.slopes[h] * np.arange(seen)
                p = np.exp(s - s.max())
                out[m, h] = (p / p.sum()) @ values[g, :seen]
        return keys, values, out


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512vnni"])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_attention(shape, isa):
    native(isa)
    case = Case(shape, isa)
    keys, values, out = case.expected()
    np.testing.assert_allclose(keys_of(case.new_keys), keys, rtol=2e-3, atol=1e-6)  # a float16 tie apart
    np.testing.assert_array_equal(case.new_values, values)
    same = (keys_of(case.new_keys) == keys).all()
    np.testing.assert_allclose(case.out, out, rtol=0, atol=2e-5 if same else 2e-3)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("shape", [CASES[3], (1, 3, 3, 13, 48, 40, 1), (8, 6, 2, 25, 32, 0, 8)], ids=str)
def test_attention_without_rotation(shape, alibi):
    """Heads may be odd then."""
    case = Case(shape, rotary=False, alibi=alibi)
    keys, values, out = case.expected()
    np.testing.assert_array_equal(keys_of(case.new_keys), keys.astype("float16"))
    np.testing.assert_array_equal(case.new_values, values)
    np.testing.assert_allclose(case.out, out, rtol=0, atol=2e-5)


def test_padding_rows_are_never_cached():
    case = Case((8, 6, 2, 16, 48, 21, 3))
    assert (keys_of(case.new_keys)[:, 24:] == 0).all() and (case.new_values[:, 24:] == 0).all()


def test_scores_far_apart_stay_finite():
    case = Case((8, 6, 2, 16, 48, 21, 8))
    kernel = case.kernel
    q = tvm.runtime.tensor(np.full((8, 6, 16), 1e4, "float32"))
    keys = tvm.runtime.tensor(np.random.default_rng(0).standard_normal(kernel.caches[0][1]).astype("float16"))
    values = tvm.runtime.tensor(np.ones(kernel.caches[1][1], "float16"))
    out = tvm.runtime.tensor(np.zeros((8, 96), "float32"))
    lengths = tvm.runtime.tensor(np.array([21, 8], "int32"))
    compiled(build_attention(kernel), "generic")(q, keys, values, lengths, out)
    np.testing.assert_allclose(out.numpy(), 1, rtol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 8])
@pytest.mark.parametrize("isa", ["generic", "avx512vnni"])
def test_every_start(isa, kv_heads):
    """Rows at every place of the caches, so that masks end at each lane of a block; what lies behind is never read."""
    native(isa)
    rows, heads, dim, context = 12, 8, 16, 48
    kernel = AttentionKernel(rows, heads, kv_heads, dim, context, attention_form(instruction_set(isa)))
    function, rng = compiled(build_attention(kernel), isa), np.random.default_rng(0)
    q = rng.standard_normal((rows, heads, dim)).astype("float32")
    for start in range(context - rows + 1):
        keys, values = (rng.standard_normal((kv_heads, context, dim)).astype("float16") for _ in range(2))
        keys[:, start + rows :], values[:, start + rows :] = np.nan, np.nan
        blocks = np.ascontiguousarray(keys.reshape(kv_heads, -1, LANES, dim).transpose(0, 1, 3, 2))
        lengths = np.array([start, rows], "int32")
        out = tvm.runtime.tensor(np.full((rows, heads * dim), np.nan, "float32"))
        function(*map(tvm.runtime.tensor, (q, blocks, values, lengths)), out)
        expected = np.zeros((rows, heads, dim))
        for m, h in np.ndindex(rows, heads):
            g, seen = h // kernel.shared, start + m + 1
            p = np.exp(keys[g, :seen].astype("float64") @ q[m, h])
            expected[m, h] = (p / p.sum()) @ values[g, :seen]
        np.testing.assert_allclose(out.numpy().reshape(expected.shape), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_default_stays_in_registers(isa):
    """Whatever number of query heads share one of keys: sums of scores, and of values, are not spilled."""
    form = attention_form(instruction_set(isa))
    for shared in (1, 2, 3, 4, 7, 8, 12, 16, 71):
        for rows in (8, 128):
            decisions = default(AttentionKernel(rows, 2 * shared, 2, 64, 64, form))
            pairs = decisions["rows"] * decisions["heads"]
            assert pairs * decisions["chains"] <= form.pairs
            assert pairs * decisions["lanes"] <= form.pairs * LANES
            assert pairs >= 4


@pytest.mark.parametrize("isa,sums", [("avx512vnni", 4), ("avx512vnni-xeon", 8)])
def test_sums_of_values_keep_multiply_adds_busy(isa, sums):
    """Each waits 4 cycles for its sum, in one unit or two: vectors of sums that are enough, and not many more."""
    form = attention_form(instruction_set(isa))
    for shared in (1, 2, 3, 4, 8):
        decisions = default(AttentionKernel(128, 2 * shared, 2, 64, 1024, form))
        vectors = decisions["rows"] * decisions["heads"] * decisions["lanes"] // LANES
        assert sums <= vectors <= 2 * sums


def test_rows_of_scores_do_not_share_places_in_a_cache():
    for context in (16, 48, 1008, 4096):
        kernel = AttentionKernel(1, 8, 1, 64, context)
        length = Pairs(kernel, default(kernel), 0, 0).row_length
        assert length >= context and length // LANES % 2 == 1 and length % LANES == 0
