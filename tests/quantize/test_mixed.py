"""Mixed bits of activations: what codes mean, how bits are chosen and counted, and what a checkpoint says."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from agq_tvm.errors import AgqError
from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.mixed import MixedErrors, MixedFormat, allocate, mixed_codes, mixed_errors, rounded_scales
from agq_tvm.quantize.mixed_format import BITS, LARGEST_SCALE, SMALLEST_SCALE, average_bits
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.sensitivity import input_gradients
from agq_tvm.quantize.source import open_source
from tests.tiny import FAMILIES, write_tiny_llama, write_tiny_model

FEW = Calibration(samples=3, length=48)
WINDOWS = np.random.default_rng(3).integers(3, 259, (2, 12)).tolist()


def plain(channels: int, bits: int = 4) -> MixedFormat:
    return MixedFormat(torch.full((channels,), bits), torch.zeros(channels, dtype=torch.int64))


@pytest.mark.parametrize("bits", BITS)
def test_every_value_is_within_half_a_step(bits):
    x = torch.randn(50, 100, generator=torch.Generator().manual_seed(bits))
    format = MixedFormat(torch.full((100,), bits), torch.randint(0, 8 - bits, (100,)))
    codes, scales = mixed_codes(x, 32, format)
    scales = scales.repeat_interleave(32, 1)[:, :100]
    off = abs(codes * scales - x) / (scales * torch.exp2(format.steps))
    # The zero point is rounded to a step of 4-bit codes, which may put the ends of a group out of reach.
    assert off.max() <= 0.5 + 2 ** (bits - 5) and (off <= 0.501).float().mean() > 0.97
    q = codes / torch.exp2(format.steps)
    assert (q == q.round()).all() and codes.abs().max() <= 120
    assert (q.amax(0) - q.amin(0)).max() <= 30 * 2 ** (bits - 4)


def test_groups_of_one_sign_use_all_codes():
    codes, scales = mixed_codes(torch.linspace(0, 15, 32)[None], 32, plain(32))
    assert scales.item() == 1 and codes.min() == 0 and codes.max() == 15
    codes, _ = mixed_codes(-torch.linspace(0, 15, 32)[None], 32, plain(32))
    assert codes.min() == -15 and codes.max() == 0


def test_a_code_is_what_its_bits_say():
    """Of sixteen scales: a channel of 5 bits has halves of them, a wide one steps of two."""
    x = torch.tensor([[0.0, 15.0, 3.3, 3.3, 29.0]])
    codes, scales = mixed_codes(x, 32, MixedFormat(torch.tensor([4, 4, 4, 5, 4]), torch.tensor([1, 1, 1, 0, 2])))
    assert scales.item() == 0.5
    assert codes.tolist() == [[0, 30, 6, 7, 60 - 4]]  # 3.3 is 3 with 4 bits and 3.5 with 5


def test_scales_have_eight_bits():
    values = torch.exp2(torch.linspace(-30, 20, 20001))
    scales = rounded_scales(values)
    assert len(scales.unique()) <= 256
    inside = (values >= SMALLEST_SCALE) & (values <= LARGEST_SCALE)
    assert (scales >= values)[inside].all() and (scales <= values * 1.125)[inside].all()
    assert scales.min() == SMALLEST_SCALE and scales.max() == LARGEST_SCALE
    torch.testing.assert_close(rounded_scales(scales), scales, rtol=0, atol=0)


def test_channels_that_are_always_large_get_steps_of_their_own():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    x[:, [3, 40]] *= torch.tensor([8.0, 4.0])
    found = mixed_errors(x, torch.ones_like(x), 32)
    assert found.widths[[3, 40]].min() >= 1 and found.widths.float().mean() < 0.5
    codes, scales = mixed_codes(x, 32, plain(64))
    without = (codes * scales.repeat_interleave(32, 1) - x).square().sum() / 2
    assert found.errors.sum() < 0.5 * without


def some(errors: list[float], wide: list[int] | None = None) -> dict[str, MixedErrors]:
    return {"a": MixedErrors(torch.tensor(wide or [0] * len(errors)), torch.tensor(errors, dtype=torch.float64))}


def test_bits_go_where_they_lower_the_loss():
    errors = some([64.0, 1.0, 17.0, 0.0])
    for more, expected in ((0, [4, 4, 4, 4]), (1, [5, 4, 4, 4]), (2, [5, 4, 5, 4]), (3, [6, 4, 5, 4])):
        format = allocate(errors, 32, (16 + more + 12.2) / 4)["a"]
        assert format.bits.tolist() == expected
        assert average_bits([format.bits.numpy()], 32) == (16 + more + 12) / 4
        width = format.bits + format.steps
        assert width.min() == width.max() == max(expected)  # as wide as each other, and none wider than needed
    assert allocate(errors, 32, 8 + 3)["a"].bits.tolist() == [7, 7, 7, 7]
    with pytest.raises(AgqError, match=r"too few.*7\.000"):
        allocate(errors, 32, 6.9)


def test_wide_channels_take_their_bits_first_from_their_steps():
    format = allocate(some([8.0, 1.0], [2, 0]), 32, (10 + 12) / 2)["a"]
    assert (format.bits.tolist(), format.steps.tolist()) == ([6, 4], [0, 0])


def test_a_bit_that_would_make_others_too_wide_goes_elsewhere():
    format = allocate(some([1.0, 8.0, 0.5], [3, 0, 1]), 32, (13 + 12) / 3)["a"]
    assert (format.bits.tolist(), format.steps.tolist()) == ([5, 4, 4], [2, 0, 1])


def test_dead_channels_and_tokens():
    x = torch.zeros(5, 40)
    x[1:, 3] = 1
    found = mixed_errors(x, torch.ones_like(x), 32)
    assert torch.isfinite(found.errors).all() and found.widths.max() <= 3
    codes, _ = mixed_codes(x, 32, MixedFormat(torch.full((40,), 4), found.widths))
    assert (codes[0] == 0).all() and (codes[:, 32:] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(tmp_path, family):
    source = open_source(write_tiny_model(tmp_path / "m", family, 1))
    found = dict(input_gradients(source, WINDOWS))
    assert list(found) == [1, 0]
    model = ReferenceModel.from_source(source)
    inputs = {}

    class Inputs:
        def linear_input(self, layer, name, x):
            inputs.setdefault((layer, name), []).append(x.clone())

        def attention(self, *args):
            pass

    for window in WINDOWS:
        model.logits(window, observer=Inputs())
    for (layer, name), values in inputs.items():
        x, gradient = found[layer][name]
        torch.testing.assert_close(x, torch.cat(values), rtol=1e-4, atol=1e-5)
        assert gradient.shape == x.shape and gradient.abs().max() > 0


def test_a_gradient_tells_the_change_of_the_loss(tmp_path):
    """Scale a column of down_proj: the loss of the same labels must change as the gradient of its input says."""
    source = open_source(write_tiny_llama(tmp_path / "m", 1))
    x, gradient = dict(input_gradients(source, WINDOWS[:1]))[1]["down"]
    name, channel, scale = "model.layers.1.mlp.down_proj.weight", int((x * gradient).sum(0).abs().argmax()), 1e-3
    random = torch.Generator().manual_seed(0)
    labels, losses = None, []
    for factor in (1.0, 1.0 + scale, 1.0 - scale):
        model = ReferenceModel.from_source(_Scaled(source, name, channel, factor))
        logits = torch.from_numpy(model.logits(WINDOWS[0])).double()
        if labels is None:
            labels = torch.multinomial(logits.float().softmax(-1), 1, generator=random)[:, 0]
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item())
    slope = (losses[1] - losses[2]) / (2 * scale)
    assert slope == pytest.approx((x * gradient)[:, channel].sum().item(), rel=0.05)


def _Scaled(source, name, channel, factor):
    """Return the source with one column of a matrix multiplied."""
    read = source.tensor
    changed = open_source(source._path)

    def tensor(wanted):
        value = read(wanted)
        if wanted == name:
            value = value.copy()
            value[:, channel] *= factor
        return value

    changed.tensor = tensor
    return changed


def test_checkpoint_says_its_bits_and_keeps_to_the_budget(tmp_path):
    source = write_tiny_llama(tmp_path / "m", 3)
    result = quantize(source, tmp_path / "c", method="rtn", group_size=64, calibration=FEW, mixed_bits=5.0)
    checkpoint = read_checkpoint(tmp_path / "c")
    assert checkpoint.scheme.mixed_bits == 5.0 and result["mixed_bits"] == 5.0
    config, stored = checkpoint.config, []
    for layer in range(config.num_layers):
        for linear in config.linears:
            first, *others = checkpoint.fused(layer, linear.parts)
            stored.append(first.act_bits)
            assert all(np.array_equal(first.act_bits, other.act_bits) for other in others)
    assert result["activation_bits"] == average_bits(stored, 64) <= 5.0
    assert result["activation_bits"] > 4.99
    assert {int(bits) for each in stored for bits in each} > {4}
    quantize(source, tmp_path / "again", method="rtn", group_size=64, calibration=FEW, mixed_bits=5.0)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("c", "again"))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_gptq_sees_mixed_codes(tmp_path):
    source = write_tiny_llama(tmp_path / "m", 3)
    for name, more in (("eight", {}), ("mixed", {"mixed_bits": 4.7})):
        quantize(source, tmp_path / name, method="gptq", group_size=64, calibration=FEW, **more)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("eight", "mixed"))
    name = "model.layers.0.self_attn.q_proj.qweight"
    assert (one[name] != two[name]).any()


def test_the_reference_multiplies_codes(tmp_path):
    quantize(write_tiny_llama(tmp_path / "m", 3), tmp_path / "c", method="rtn", calibration=FEW, mixed_bits=5.0)
    checkpoint = read_checkpoint(tmp_path / "c")
    traced, tokens = [], WINDOWS[0]
    exact = ReferenceModel.from_checkpoint(checkpoint).logits(tokens, trace=lambda *values: traced.append(values))
    np.testing.assert_allclose(exact, ReferenceModel.from_checkpoint(checkpoint).logits(tokens), rtol=1e-3, atol=1e-3)
    assert all(codes.dtype == np.int8 for _, codes, _, _ in traced)
    floats = ReferenceModel.from_checkpoint(checkpoint, "none").logits(tokens)
    assert 1e-3 < abs(floats - exact).mean() < 0.3 * abs(floats).mean()


@pytest.mark.parametrize(
    "field,change",
    [("act_bits", lambda v: v - 1), ("act_bits", lambda v: v + 4), ("act_steps", lambda v: v + 4)],
)
def test_codes_that_would_overflow_are_refused(tmp_path, field, change):
    quantize(write_tiny_llama(tmp_path / "m"), tmp_path / "c", method="rtn", calibration=FEW, mixed_bits=4.4)
    path, name = tmp_path / "c" / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(path)
    tensors[f"{name}.{field}"] = change(np.full_like(tensors[f"{name}.{field}"], 4 if field == "act_bits" else 0))
    save_file(tensors, path)
    with pytest.raises(AgqError, match=f"{name} has bits or steps of activations out of range"):
        read_checkpoint(tmp_path / "c").linear(name)


def test_readers_of_one_input_must_agree(tmp_path):
    quantize(write_tiny_llama(tmp_path / "m"), tmp_path / "c", method="rtn", calibration=FEW, mixed_bits=4.4)
    path = tmp_path / "c" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.act_bits"] = tensors["model.layers.0.mlp.up_proj.act_bits"] ^ 1
    tensors["model.layers.0.mlp.up_proj.act_steps"][:] = 0
    save_file(tensors, path)
    with pytest.raises(AgqError, match="disagree"):
        read_checkpoint(tmp_path / "c").fused(0, ("mlp.gate_proj", "mlp.up_proj"))


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"mixed_bits": 3.0}, "above 4 and up to 8"),
        ({"mixed_bits": float("nan")}, "above 4 and up to 8"),
        ({"mixed_bits": 5.0, "activation": "per-token"}, "per-token-group"),
        ({"mixed_bits": 5.0, "four_bit": ("o",)}, "four_bit"),
        ({"mixed_bits": 4.01}, "too few"),
    ],
)
def test_what_does_not_go_together(tmp_path, settings, words):
    with pytest.raises(AgqError, match=words):
        quantize(write_tiny_llama(tmp_path / "m"), tmp_path / "c", method="rtn", calibration=FEW, **settings)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("value", ["5", True, None])
def test_a_config_with_another_kind_of_budget_is_refused(tmp_path, value):
    quantize(write_tiny_llama(tmp_path / "m"), tmp_path / "c", method="rtn", calibration=FEW)
    path = tmp_path / "c" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["mixed_bits"] = value
    path.write_text(json.dumps(config))
    with pytest.raises(AgqError, match="bits of activations"):
        read_checkpoint(tmp_path / "c")


def test_bits_of_other_activations_are_counted_too(tmp_path):
    source = write_tiny_llama(tmp_path / "m")
    channels = 96 * 3 + 160
    cases = ({}, 8 + 32 * (2 * 3 + 3) / channels), ({"activation": "per-token"}, 8 + 32 * 4 / channels)
    for settings, expected in (*cases, ({"activation": "none"}, 32)):
        result = quantize(source, tmp_path / "c", method="rtn", group_size=64, **settings)
        assert result["activation_bits"] == pytest.approx(expected)


def test_scheme_of_older_checkpoints_has_neither(tmp_path):
    quantize(write_tiny_llama(tmp_path / "m"), tmp_path / "c", method="rtn")
    path = tmp_path / "c" / "config.json"
    config = json.loads(path.read_text())
    for name in ("mixed_bits", "fold"):
        del config["quantization_config"][name]
    path.write_text(json.dumps(config))
    scheme = read_checkpoint(tmp_path / "c").scheme
    assert (scheme.mixed_bits, scheme.fold) == (0, False) and replace(scheme) == scheme
