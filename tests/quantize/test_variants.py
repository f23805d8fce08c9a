"""Variants by name: each is what it is called."""

import pytest

from agq_tvm.errors import AgqError
from agq_tvm.flow.quantize import quantize
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.variants import VARIANTS, variant_settings
from tests.quantize.conftest import FEW
from tests.tiny import write_tiny_llama, write_tiny_model

WANTED = {  # method, weight bits, activation, TRIP, roles with 4-bit inputs, attention
    "agileq-8": ("gptq", 4, "static", True, (), "log2-paper"),
    "agileq-4": ("gptq", 4, "static", True, ("o", "gate_up", "down"), "log2-paper"),
    "w4a16": ("gptq", 4, "none", False, (), "float"),
    "w8a8": ("rtn", 8, "per-token", False, (), "float"),
    "ours": ("gptq", 4, "per-token-group", False, (), "float"),
    "ours-fast": ("gptq", 4, "per-token", False, (), "float"),
    "ours-4": ("gptq", 4, "per-token-group", False, (), "float"),
}


def test_all_are_tested():
    assert WANTED.keys() == VARIANTS.keys()


@pytest.mark.parametrize("name", WANTED)
def test_a_variant_is_what_it_is_called(tmp_path, name):
    write_tiny_llama(tmp_path / "m")
    quantize(tmp_path / "m", tmp_path / "c", calibration=FEW, **variant_settings(name))
    scheme = read_checkpoint(tmp_path / "c").scheme
    found = (scheme.method, scheme.weight_bits, scheme.activation, scheme.max_refine > 0, scheme.four_bit)
    assert (*found, scheme.attention) == WANTED[name]
    assert scheme.mixed_bits == (5 if name == "ours-4" else 0) and scheme.integer_grid == (name == "ours-fast")


def test_a_model_without_gate_has_up_for_gate_up(tmp_path):
    write_tiny_model(tmp_path / "m", "opt")
    quantize(tmp_path / "m", tmp_path / "c", calibration=FEW, **variant_settings("agileq-4"))
    assert read_checkpoint(tmp_path / "c").scheme.four_bit == ("o", "up", "down")


def test_settings_are_the_callers_own():
    variant_settings("agileq-8")["activation"] = "none"
    assert variant_settings("agileq-8")["activation"] == "static"
    assert variant_settings(None) == {}


@pytest.mark.parametrize("name,words", [("release", "does not factor out"), ("agileq", "choose one of agileq-8")])
def test_others_are_refused(name, words):
    with pytest.raises(AgqError, match=words):
        variant_settings(name)
