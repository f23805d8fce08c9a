"""The kernels that choose rows, copy them, and keep their positions; and attention that says what to choose by."""

import numpy as np
import pytest
import tvm

from agq_tvm.kernels.attention import build_attention
from agq_tvm.kernels.attention_form import AttentionKernel
from agq_tvm.kernels.prune import SelectKernel, build_append_positions, build_gather, build_places, build_select
from agq_tvm.quantize.pruning import select
from tests.kernels.operands import compiled

HEADS = 3


class Choice:
    """The select kernel of the middle one of three segments."""

    def __init__(self, rows: int, kept_rows: int):
        self.rows, self.kept_rows = rows, kept_rows
        self.function = compiled(build_select(SelectKernel(rows, kept_rows, HEADS, 1, 3)), "generic")

    def __call__(self, importance, first, valid, keep, ends_prompt):
        """Return the chosen rows and their positions, without padding, of rows at every third position."""
        positions = (first + 3 * np.arange(self.rows)).astype("int32")
        lengths = np.array([99, 98, 97, valid, 96, keep, ends_prompt], "int32")
        outputs = [tvm.runtime.tensor(np.full(self.kept_rows, 77, "int32")) for _ in range(2)]
        self.function(*map(tvm.runtime.tensor, (importance, positions, lengths)), *outputs)
        chosen, kept = (output.numpy() for output in outputs)
        count = int((chosen >= 0).sum())
        assert (chosen[count:] == -1).all() and (kept[count:] == 0).all()
        np.testing.assert_array_equal(kept[:count], positions[chosen[:count]])
        return chosen[:count]


@pytest.fixture(scope="module")
def choice():
    return Choice(24, 16)


@pytest.mark.parametrize("ends_prompt", [0, 1])
@pytest.mark.parametrize("first", [0, 30])
@pytest.mark.parametrize(("valid", "keep"), [(24, 16), (24, 2), (17, 9), (3, 2), (2, 2), (1, 1)])
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "rising"])
def test_the_choice_is_that_of_the_reference(choice, kind, valid, keep, first, ends_prompt):
    rng = np.random.default_rng(valid)
    importance = {
        "random": rng.random((24, HEADS)),
        "ties": rng.integers(0, 3, (24, HEADS)) / 4,
        "equal": np.full((24, HEADS), 0.25),
        "rising": np.repeat(np.arange(24)[:, None] / 24, HEADS, 1),
    }[kind].astype("float32")
    importance[valid:] = 1e9  # rows that are not there
    scores = importance[:valid, 0] + importance[:valid, 1] + importance[:valid, 2]
    always = ([0] if first == 0 else []) + ([valid - 1] if ends_prompt else [])
    found = choice(importance, first, valid, keep, ends_prompt)
    np.testing.assert_array_equal(found, select(scores, keep, always))


def test_scores_that_are_not_numbers_stay_inside_the_result(choice):
    assert len(choice(np.full((24, HEADS), np.nan, "float32"), 30, 24, 16, 0)) == 16


def test_gather_fills_with_zeros():
    x = np.random.default_rng(0).standard_normal((5, 36), dtype="float32")
    x[0] = np.nan  # must not show in a row of zeros
    out = tvm.runtime.tensor(np.full((4, 36), np.nan, "float32"))
    chosen = np.array([1, 2, 4, -1], "int32")
    compiled(build_gather(5, 4, 36), "generic")(tvm.runtime.tensor(x), tvm.runtime.tensor(chosen), out)
    np.testing.assert_array_equal(out.numpy(), np.concatenate([x[[1, 2, 4]], np.zeros((1, 36))]))


@pytest.mark.parametrize(("cached", "expected"), [(0, [0, 1, 2, 3]), (12, [12, 13, 14, 15]), (14, [14, 15, 15, 15])])
def test_places_stay_inside_the_context(cached, expected):
    places = tvm.runtime.tensor(np.full(4, 77, "int32"))
    compiled(build_places(4, 16), "generic")(tvm.runtime.tensor(np.array([cached, 2], "int32")), places)
    np.testing.assert_array_equal(places.numpy(), expected)


def test_only_valid_positions_are_appended():
    cache = tvm.runtime.tensor(np.arange(16, dtype="int32"))
    positions, lengths = np.arange(50, 58, dtype="int32"), np.array([11, 3], "int32")
    compiled(build_append_positions(8, 16), "generic")(*map(tvm.runtime.tensor, (positions, lengths)), cache)
    np.testing.assert_array_equal(cache.numpy(), [*range(11), 50, 51, 52, 14, 15])


@pytest.mark.parametrize("alibi", [False, True])
def test_attention_says_what_the_first_key_gets(alibi):
    """And with ALiBi goes by positions, which are not places in the cache."""
    rows, heads, kv_heads, dim, context, cached = 6, 4, 2, 8, 32, 9
    rng = np.random.default_rng(1)
    q = rng.standard_normal((rows, heads, dim), dtype="float32")
    keys = rng.standard_normal((kv_heads, context, dim)).astype("float16")
    values = rng.standard_normal((kv_heads, context, dim)).astype("float16")
    places = np.cumsum(rng.integers(1, 4, context)).astype("int32")
    slopes = 0.3 ** np.arange(1, heads + 1, dtype="float32")
    kernel = AttentionKernel(rows, heads, kv_heads, dim, context, alibi=alibi, pruned=True, importance=True)
    inputs = [q, keys.reshape(kv_heads, -1, 16, dim).transpose(0, 1, 3, 2), values, np.array([cached, rows], "int32")]
    inputs += [slopes, places[cached : cached + rows], places] if alibi else []
    outputs = [np.zeros((rows, heads * dim), "float32"), np.zeros((rows, heads), "float32")]
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in (*inputs, *outputs)]
    compiled(build_attention(kernel), "generic")(*tensors)
    out, importance = (tensor.numpy() for tensor in tensors[-2:])
    for m in range(rows):
        for h in range(heads):
            seen, g = cached + m + 1, h * kv_heads // heads
            scores = keys[g, :seen].astype("float64") @ q[m, h]
            if alibi:
                scores += slopes[h] * (places[:seen] - places[cached + m])
            p = np.exp(scores - scores.max())
            p /= p.sum()
            np.testing.assert_allclose(importance[m, h], p[0], rtol=1e-5)
            np.testing.assert_allclose(out[m, h * dim : (h + 1) * dim], p @ values[g, :seen], atol=2e-5)
