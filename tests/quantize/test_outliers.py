import numpy as np
import pytest

from agq_tvm.errors import AgqError
from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.observe import observe, outlier_ratio
from agq_tvm.quantize.outliers import with_outliers
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.source import Source, open_source, tensor_shapes
from tests.tiny import FAMILIES, write_tiny_llama, write_tiny_model

TOKENS = np.random.default_rng(4).integers(3, 259, 60).tolist()


def changed_channels(before: Source, after: Source, name: str) -> list[int]:
    return np.flatnonzero(before.tensor(name) != after.tensor(name)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shift", range(7))
def test_float_logits_do_not_change_by_a_bit(tmp_path, shift, family):
    source = open_source(write_tiny_model(tmp_path / "model", family, 7))
    expected = ReferenceModel.from_source(source).logits(TOKENS)
    np.testing.assert_array_equal(
        ReferenceModel.from_source(with_outliers(source, 5, shift, seed=shift)).logits(TOKENS), expected
    )


READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "query_key_value", "dense_h_to_4h")


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_chosen_channels_grow_and_nothing_else_changes(tmp_path, family):
    source = open_source(write_tiny_model(tmp_path / "model", family, 7))
    made, config = with_outliers(source, 4, 5), source.config
    chosen = changed_channels(source, made, f"{config.layer_prefix.format(layer=0)}{config.input_norm}.weight")
    assert len(chosen) == 4
    for name in tensor_shapes(config):
        before, after = source.tensor(name), made.tensor(name)
        expected, parts = before.copy(), name.split(".")
        in_layer = name.startswith(config.layer_prefix.split("{")[0])  # OPT's last norm has the name of another
        if in_layer and parts[-2] in (config.input_norm, config.mlp_norm):
            expected[chosen] *= 32
        elif parts[-2] in READERS and parts[-1] == "weight":
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


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ],
)
def test_norms_that_cannot_be_scaled(tmp_path, family, overrides):
    source = open_source(write_tiny_model(tmp_path / "model", family, **overrides))
    with pytest.raises(AgqError, match="norms that cannot be scaled"):
        with_outliers(source, 3, 2)
