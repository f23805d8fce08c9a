"""The softmax of attention on rows of scores, against numpy."""

import numpy as np
import pytest
import tvm

from agq_tvm.kernels.attention_products import MASKED
from agq_tvm.kernels.attention_softmax import store_softmax
from agq_tvm.kernels.emit import LANES
from agq_tvm.tvm_seam import IRBuilder, T
from tests.kernels.operands import compiled, native


def softmax_function(pairs: int, sums: int, length: int):
    """Return a PrimFunc of scores, which become weights, how many vectors of them are meant, and the norm."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("softmax")
        T.func_attr({"global_symbol": "softmax", "tirx.noalias": True})
        scores = T.arg("scores", T.buffer((pairs, length), "float32"))
        blocks = T.arg("blocks", T.buffer((1,), "int32"))
        norm = T.arg("norm", T.buffer((pairs, 1), "float32"))
        with T.sblock("all"):
            T.reads()
            T.writes()
            store_softmax(pairs, sums, blocks[0], scores, norm)
    return builder.get()


def run(function, scores: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and norms."""
    scores, norm = tvm.runtime.tensor(scores), tvm.runtime.tensor(np.full((len(scores), 1), np.nan, "float32"))
    function(scores, tvm.runtime.tensor(np.array([blocks], "int32")), norm)
    return scores.numpy(), norm.numpy()


@pytest.mark.parametrize(("isa", "sums"), [("generic", 96), ("avx2", 96), ("avx512vnni", 384)])
def test_weights(isa, sums):
    """Of five rows, which four do not divide; from equal scores to those that differ by more than floats can show."""
    native(isa)
    rng, length = np.random.default_rng(0), 16 * LANES
    function = compiled(softmax_function(5, sums, length), isa)
    for blocks in (1, 2, 15):
        scores = rng.standard_normal((5, length)) * np.array([0, 1, 30, 200, 1e4])[:, None]
        scores[:, 3] = MASKED
        scores = scores.astype("float32")
        weights, norm = run(function, scores, blocks)
        seen = blocks * LANES
        np.testing.assert_array_equal(weights[:, seen:], scores[:, seen:])
        weights, x = weights[:, :seen], scores[:, :seen] - scores[:, :seen].max(1, keepdims=True)
        exact = np.exp(x.astype("float64"))
        # What one unit in the last place of x log2 e comes to is added to what the polynomial leaves.
        near = x > -87
        assert (abs(weights[near] / exact[near] - 1) <= 2e-7 - x[near] * 2.0**-23).all()
        assert (weights[x < -88.1] == 0).all() and (weights[:, 3] == 0).all()
        assert (weights[x == 0] == 1).all() and (weights <= 1).all() and (weights >= 0).all()
        np.testing.assert_allclose(norm[:, 0] * weights.astype("float64").sum(1), 1, rtol=2e-6)
