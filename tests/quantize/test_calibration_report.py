"""The report on static activations: what is clipped, channel by channel."""

import json

import numpy as np
import pytest
import torch

from agq_tvm.flow.quantize import quantize
from agq_tvm.quantize.calibration import cut_windows
from agq_tvm.quantize.calibration_report import REPORT
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.forward import read_norms
from agq_tvm.quantize.reference import float_entry
from agq_tvm.quantize.source import open_source
from tests.quantize.conftest import FEW
from tests.tiny import write_tiny_llama


def test_the_report_has_what_codes_do_not_reach(tmp_path):
    source = open_source(write_tiny_llama(tmp_path / "m", 2))
    settings = {"activation": "static", "max_refine": 5, "four_bit": ("qkv",), "calibration": FEW}
    result = quantize(source, tmp_path / "c", method="rtn", group_size=32, **settings)
    report = json.loads((tmp_path / "c" / REPORT).read_text())
    assert list(report["linears"])[:5] == [
        *(f"layers.0.{role}" for role in ("qkv", "o", "gate_up", "down")),
        "layers.1.qkv",
    ]
    first, linear = (
        report["linears"]["layers.0.qkv"],
        read_checkpoint(tmp_path / "c").fused(0, ("self_attn.q_proj",))[0],
    )
    assert (first["scale"], first["zero"]) == (float(linear.act_scale[0]), int(linear.act_zero[0]))
    assert first["alpha_histogram"] == np.bincount(linear.alpha).tolist()
    # By hand: the input of the first linear is a norm of the embedding.
    windows = cut_windows(tmp_path / "m" / "tokenizer.json", FEW.text, FEW.samples, FEW.length)
    entry, norm = float_entry(source), read_norms(source.config, 0, source.tensor).attention
    x = torch.cat([norm(entry(window)) for window in windows]).numpy().astype("float64")
    step = first["scale"] * np.exp2(np.repeat(linear.alpha, 32)[: x.shape[1]].astype("float64"))
    beyond = (x > (7.5 - first["zero"]) * step) | (x < (-7.5 - first["zero"]) * step)
    assert beyond.any()
    np.testing.assert_allclose(first["clipped"], beyond.mean(0), atol=1e-6)
    assert result["clipped"] == report["clipped"]
    both = [share for layer in range(2) for share in report["linears"][f"layers.{layer}.qkv"]["clipped"]]
    assert result["clipped"]["qkv"] == {"mean": pytest.approx(np.mean(both)), "largest": max(both)}


@pytest.mark.parametrize("activation", ["per-token", "none"])
def test_only_static_activations_are_reported(quantized, activation):
    assert not (quantized(activation=activation) / REPORT).exists()


def test_without_trip_there_are_no_exponents_and_nothing_is_clipped(static, quantized):
    report = json.loads((quantized(activation="static") / REPORT).read_text())
    assert {str(found["alpha_histogram"]) for found in report["linears"].values()} == {"None"}
    assert all(share == {"mean": 0, "largest": 0} for share in report["clipped"].values())
    assert json.loads((static / REPORT).read_text())["linears"]["layers.1.down"]["alpha_histogram"]
