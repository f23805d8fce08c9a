import numpy as np
import pytest

from agq_tvm.errors import AgqError
from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.observe import observe, outlier_ratio
from agq_tvm.quantize.outliers import with_outliers
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.source import Source, open_source, tensor_shapes
from tests.tiny import tiny_config, write_tiny_llama

TOKENS = np.random.default_rng(4).integers(3, 259, 60).tolist()


def changed_channels(before: Source, after: Source, name: str) -> list[int]:
    return np.flatnonzero(before.tensor(name) != after.tensor(name)).tolist()


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False, "num_key_value_heads": 6}])
@pytest.mark.parametrize("shift", range(7))
def test_float_logits_do_not_change_by_a_bit(tmp_path, shift, overrides):
    source = open_source(write_tiny_llama(tmp_path / "model", 7, **overrides))
    expected = ReferenceModel.from_source(source).logits(TOKENS)
    np.testing.assert_array_equal(
        ReferenceModel.from_source(with_outliers(source, 5, shift, seed=shift)).logits(TOKENS), expected
    )


def test_chosen_channels_grow_and_nothing_else_changes(tiny_llama):
    source = open_source(tiny_llama)
    made = with_outliers(source, 4, 5)
    chosen = changed_channels(source, made, "model.layers.0.input_layernorm.weight")
    assert len(chosen) == 4
    for name in tensor_shapes(source.config):
        before, after = source.tensor(name), made.tensor(name)
        expected = before.copy()
        if "layers" in name and "norm" in name:
            expected[chosen] *= 32
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            expected[:, chosen] /= 32
        assert after.dtype == np.float32
        np.testing.assert_array_equal(after, expected, err_msg=name)


def test_seed_chooses_the_channels(tiny_llama):
    source, name = open_source(tiny_llama), "model.layers.1.post_attention_layernorm.weight"
    drawn = [changed_channels(source, with_outliers(source, 3, 2, seed), name) for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_activations_grow_where_they_should(tiny_llama):
    source = open_source(tiny_llama)
    plain, made = (
        observe(ReferenceModel.from_source(model), [TOKENS]).inputs for model in (source, with_outliers(source, 3, 6))
    )
    for name in ("qkv", "gate_up"):
        growth = made[name].channel_largest / plain[name].channel_largest
        np.testing.assert_array_equal(np.sort(growth, 1), [[1] * 93 + [64] * 3] * 2)
        assert (outlier_ratio(made[name].channel_largest) > 20).all()
    for name in ("o", "down"):
        np.testing.assert_array_equal(made[name].channel_largest, plain[name].channel_largest)


class WithBiases(Source):
    """Any numbers under a LLaMA's names, and a bias for every module."""

    def __init__(self) -> None:
        super().__init__("with biases", tiny_config())

    def _tensor(self, name: str) -> np.ndarray:
        module, kind = name.rsplit(".", 1)
        shape = tensor_shapes(self.config)[f"{module}.weight"]
        rng = np.random.default_rng(list(name.encode()))
        return rng.standard_normal(shape if kind == "weight" else shape[:1], dtype="float32")


def layer_norm_and_linear(source: Source, norm: str, linear: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(1, keepdims=True)
    x = centred / np.sqrt(np.square(centred).mean(1, keepdims=True) + np.float32(1e-5))
    x = x * source.tensor(f"{norm}.weight") + source.tensor(f"{norm}.bias")
    return x @ source.tensor(f"{linear}.weight").T + source.tensor(f"{linear}.bias")


@pytest.mark.parametrize(
    ("norm", "linear"), [("input_layernorm", "self_attn.v_proj"), ("post_attention_layernorm", "mlp.up_proj")]
)
def test_biases_of_norms_grow_too_those_of_linears_do_not(norm, linear):
    source = WithBiases()
    made = with_outliers(source, 10, 6)
    x = np.random.default_rng(0).standard_normal((30, 96), dtype="float32")
    names = (f"model.layers.1.{norm}", f"model.layers.1.{linear}")
    assert len(changed_channels(source, made, f"{names[0]}.bias")) == 10
    np.testing.assert_array_equal(layer_norm_and_linear(made, *names, x), layer_norm_and_linear(source, *names, x))


def test_static_quantization_gets_much_worse(tmp_path):
    """What activation codes change in the logits, beside the same 4-bit weights with float activations."""
    source = open_source(write_tiny_llama(tmp_path / "model", 7))
    errors = []
    for shift in (0, 3, 6):
        path, made = tmp_path / str(shift), with_outliers(source, 3, shift)
        quantize(made, path, "rtn", 32, activation="static", calibration=Calibration("jargon", 4, 64))
        checkpoint = read_checkpoint(path)
        exact, coded = (ReferenceModel.from_checkpoint(checkpoint, mode).logits(TOKENS) for mode in ("none", "static"))
        errors.append(np.linalg.norm(coded - exact) / np.linalg.norm(exact))
    assert errors[1] > 2 * errors[0] and errors[2] > 10 * errors[0]


@pytest.mark.parametrize("channels", [-1, 97])
def test_more_outliers_than_channels(tiny_llama, channels):
    with pytest.raises(AgqError, match=f"96 channels, {channels} of them"):
        with_outliers(open_source(tiny_llama), channels, 1)
