"""Powers of two moved from norms into weights: the same function, and outliers made on purpose are gone."""

import numpy as np
import pytest

from agq_tvm.errors import AgqError
from agq_tvm.flow.quantize import quantize
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.fold import folded, relative_exponents
from agq_tvm.quantize.outliers import with_outliers
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.source import open_source, tensor_shapes
from tests.tiny import FAMILIES, write_tiny_llama, write_tiny_model

TOKENS = np.random.default_rng(4).integers(3, 259, 60).tolist()


def test_exponents_bring_sizes_within_a_factor_of_root_two():
    sizes = np.exp2(np.random.default_rng(0).uniform(-20, 20, 101))
    left = sizes / np.exp2(relative_exponents(sizes)) / np.median(sizes)
    assert left.min() >= 2**-0.5 and left.max() <= 2**0.5
    assert relative_exponents(np.zeros(4)).tolist() == [0] * 4
    assert relative_exponents(np.array([0, 1, 1, 8, 0.0])).tolist() == [0, 0, 0, 3, 0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shift", [0, 6])
def test_outliers_fold_away_and_no_float_changes(tmp_path, family, shift):
    source = open_source(write_tiny_model(tmp_path / "m", family, 7))
    made = folded(with_outliers(source, 5, shift))
    plain = folded(source)
    for name in tensor_shapes(source.config):
        np.testing.assert_array_equal(made.tensor(name), plain.tensor(name), err_msg=name)
    expected = ReferenceModel.from_source(source).logits(TOKENS)
    np.testing.assert_array_equal(ReferenceModel.from_source(made).logits(TOKENS), expected)


def test_quantizing_folds_first(tmp_path):
    source = with_outliers(open_source(write_tiny_llama(tmp_path / "m", 7)), 3, 6)
    results = {
        name: quantize(source, tmp_path / name, method="rtn", **settings)
        for name, settings in (("plain", {}), ("folded", {"fold": True}))
    }
    assert results["folded"]["fold"] and read_checkpoint(tmp_path / "folded").scheme.fold
    expected = ReferenceModel.from_source(source).logits(TOKENS)
    errors = [
        abs(ReferenceModel.from_checkpoint(read_checkpoint(tmp_path / name)).logits(TOKENS) - expected).mean()
        for name in results
    ]
    assert errors[1] < 0.7 * errors[0]


def test_what_cannot_be_folded(tmp_path):
    path = write_tiny_model(tmp_path / "m", "opt", do_layer_norm_before=False)
    with pytest.raises(AgqError, match="cannot be scaled"):
        quantize(path, tmp_path / "c", method="rtn", fold=True)
    with pytest.raises(AgqError, match="keep leaves the model's own grid"):
        from agq_tvm.quantize.scheme import Scheme

        Scheme("keep", 32, False, "per-token-group", fold=True)
    with pytest.raises(AgqError, match="fold must be true or false"):
        quantize(write_tiny_llama(tmp_path / "l"), tmp_path / "c", method="rtn", fold=1)
