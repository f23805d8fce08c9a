"""Integer grids: whatever the weights, steps and lows are in range, and scales exact in float16."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file, save_file

from agq_tvm.errors import AgqError
from agq_tvm.flow.quantize import quantize
from agq_tvm.quantize import integer_grid, weights
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.gptq import gptq
from agq_tvm.quantize.scheme import Scheme
from agq_tvm.quantize.source import open_source
from agq_tvm.quantize.variants import variant_settings
from tests.quantize.conftest import FEW
from tests.quantize.gguf_models import write_gguf
from tests.quantize.test_checkpoint import Q, change_tensors, read_everything
from tests.tiny import write_tiny_llama

SCHEME = Scheme("rtn", 32, False, "per-token", integer_grid=True)


def _normal(rng):
    return rng.standard_normal((24, 130))


MATRICES = {
    "normal": _normal,
    "heavy tails": lambda rng: rng.standard_t(2, (24, 130)),
    "small": lambda rng: 1e-5 * _normal(rng),
    "below float16": lambda rng: 1e-9 * _normal(rng),
    "large": lambda rng: 8000 * np.clip(_normal(rng), -4, 4),
    "positive": lambda rng: 1 + rng.uniform(0, 1, (24, 130)),
    "negative": lambda rng: -1 - rng.uniform(0, 1, (24, 130)),
    "constant": lambda rng: np.full((24, 130), 0.37),
    "zeros": lambda rng: np.zeros((24, 130)),
    "one weight": lambda rng: np.eye(24, 130) * 3,
}


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("name", MATRICES)
def test_every_weight_is_a_byte_of_its_column(name, group_size):
    weight = MATRICES[name](np.random.default_rng(3)).astype("float32")
    linear = weights.rtn(weight, group_size, False, integer=True)
    steps, lows = integer_grid.to_integers(linear.unit, linear.scales, linear.offsets)
    assert integer_grid.is_valid(linear.unit, steps, lows)
    for made, stored in zip(
        integer_grid.to_scales(linear.unit, steps, lows), (linear.scales, linear.offsets), strict=True
    ):
        np.testing.assert_array_equal(made, stored)
    groups = np.arange(weight.shape[1]) // group_size
    whole = steps[:, groups].astype(int) * weights.codes_of(linear) + lows[:, groups]
    assert -128 <= whole.min() <= whole.max() <= 127
    np.testing.assert_array_equal(weights.dequantize(linear), whole * linear.unit.astype("float32")[:, None])
    # Half a step; and a step one smaller than the range needs, or a grid off its middle, if that is better over all.
    reach = (0.5 * linear.scales.astype("float32") + 16 * linear.unit.astype("float32")[:, None])[:, groups]
    assert (abs(weights.dequantize(linear) - weight) <= reach).all()


@pytest.mark.parametrize("group_size", [32, 128])
def test_error_is_less_than_that_of_real_scales(group_size):
    weight = np.random.default_rng(1).standard_normal((128, 1024)).astype("float32")
    errors = [
        np.square(weights.dequantize(weights.rtn(weight, group_size, False, integer)) - weight).sum()
        for integer in (False, True)
    ]
    assert errors[1] < 0.98 * errors[0]


@pytest.mark.parametrize(
    ("draw", "columns", "more"),
    [("normal", 576, -0.06), ("normal", 4096, -0.04), ("heavy", 576, 0.01), ("heavy", 4096, 0.14)],
)
def test_error_is_what_the_documentation_says(draw, columns, more):
    """Of the square, in groups of 32; docs/design.md has these figures."""
    rng = np.random.default_rng(0)
    shape = (128, columns)
    weight = (rng.standard_normal(shape) if draw == "normal" else rng.standard_t(4, shape)).astype("float32")
    real, whole = (
        np.square(weights.dequantize(weights.rtn(weight, 32, False, integer)) - weight).sum()
        for integer in (False, True)
    )
    assert whole / real - 1 == pytest.approx(more, abs=0.01)


def test_a_group_of_small_weights_has_few_codes():
    weight = np.random.default_rng(0).uniform(-1, 1, (1, 64)).astype("float32")
    weight[0, :32] /= 20
    weight[0, 40] = 1
    codes = weights.codes_of(weights.rtn(weight, 32, False, integer=True))
    assert len(np.unique(codes[0, :32])) == 13


def test_gptq_rounds_to_an_integer_grid():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((400, 128)) @ rng.standard_normal((128, 128))
    weight = rng.standard_normal((40, 128)).astype("float32")
    fitted = gptq(weight, (x.T @ x).astype("float32"), 32, False, integer=True)
    assert integer_grid.is_valid(fitted.unit, *integer_grid.to_integers(fitted.unit, fitted.scales, fitted.offsets))
    errors = [
        np.square(x @ (weights.dequantize(each) - weight).T).sum()
        for each in (fitted, weights.rtn(weight, 32, False, integer=True))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_weights_beyond_float16_are_refused(tmp_path):
    write_tiny_llama(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{Q}.weight"][3, 4] = 65000
    save_file(tensors, path)
    with pytest.raises(AgqError, match=f"^{Q}: weights are too large for an integer grid"):
        quantize(tmp_path / "m", tmp_path / "c", method="rtn", activation="per-token", integer_grid=True)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_weights_that_are_not_finite_have_no_scale():
    """As without such a grid: by that it is seen when GPTQ's numbers run away."""
    group = np.ones((3, 32), "float32")
    group[1, 5], group[2, 6] = np.inf, np.nan
    scale, _ = integer_grid.choose_grid(group, np.ones(3, "float32"))
    assert np.isfinite(scale).tolist() == [True, False, False]


def test_groups_that_a_large_weight_leaves_few_codes_are_counted(tmp_path):
    """Seven units reach over eight codes; groups of equal weights need but one."""
    weight = np.zeros((2, 96), "float32")
    weight[:, 0], weight[:, 32:64] = 127, np.arange(32) % 8
    weight[1, 32:64] *= 6.5 / 7
    linear = weights.rtn(weight, 32, False, integer=True)
    assert linear.unit.tolist() == [1, 1]
    assert integer_grid.count_coarse(weight, linear.unit, 32) == 1
    write_tiny_llama(tmp_path / "m")
    settings = {"method": "rtn", "group_size": 32, "activation": "per-token", "integer_grid": True}
    assert quantize(tmp_path / "m", tmp_path / "c", **settings)["coarse_groups"] == 0
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            tensor[:, 0] = 100 * abs(tensor).max()
    save_file(tensors, path)
    assert 0.05 < quantize(tmp_path / "m", tmp_path / "c", **settings)["coarse_groups"] < 0.2


def test_what_is_4_bit_already_is_rounded_anew(tmp_path):
    write_gguf(tmp_path / "m.gguf", linears=GGMLQuantizationType.Q4_1)
    result = quantize(tmp_path / "m.gguf", tmp_path / "c", calibration=FEW, **variant_settings("ours-fast"))
    assert (result["method"], result["integer_grid"]) == ("gptq", True)
    for asked in ({"integer_grid": True, "activation": "per-token"}, {"fold": True}):
        assert quantize(tmp_path / "m.gguf", tmp_path / "c", calibration=FEW, **asked)["method"] == "gptq"


def test_a_file_holds_the_integers(quantized):
    checkpoint = read_checkpoint(quantized(activation="per-token", integer_grid=True))
    assert checkpoint.scheme == SCHEME
    source = open_source(checkpoint.path.parent / "source")
    expected = weights.rtn(source.tensor(f"{Q}.weight"), 32, False, integer=True)
    linear = checkpoint.linear(Q)
    for field in ("qweight", "scales", "offsets", "unit"):
        np.testing.assert_array_equal(getattr(linear, field), getattr(expected, field))


@pytest.mark.parametrize(
    ("part", "value"),
    [("step", 0), ("step", 18), ("low", 127), ("unit", -1), ("unit", np.nan), ("unit", 0.3333), ("unit", 65504)],
)
@pytest.mark.filterwarnings("error")
def test_damaged_integers_are_refused(quantized, tmp_path, part, value):
    path = Path(shutil.copytree(quantized(activation="per-token", integer_grid=True), tmp_path / "grid"))
    read_everything(path)
    change_tensors(path, lambda tensors: tensors[f"{Q}.{part}"].flat.__setitem__(0, value))
    with pytest.raises(AgqError, match=r"q_proj.* damaged"):
        read_everything(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"integer_grid": 1}, "integer_grid must be true or false"),
        ({"method": "keep"}, "keep leaves the model's own grid"),
        ({"symmetric": True}, "in groups of 32, 64 or 128 with offsets"),
        ({"group_size": "column"}, "in groups of 32, 64 or 128"),
        ({"weight_bits": 8, "symmetric": True}, "for 4-bit weights"),
        ({"activation": "per-token-group"}, "choose per-token or static"),
        ({"activation": "none"}, "choose per-token or static"),
        ({"max_refine": 2}, "without max_refine"),
        ({"mixed_bits": 5}, "do not go together"),
    ],
)
def test_what_does_not_go_together_is_refused(change, words):
    with pytest.raises(AgqError, match=words):
        replace(SCHEME, **change)
