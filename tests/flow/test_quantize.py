import hashlib
import json
import weakref

import pytest

from agq_tvm.errors import AgqError
from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.quantize import checkpoint
from agq_tvm.quantize.checkpoint import read_checkpoint
from tests.tiny import write_tiny_llama

FEW = Calibration(samples=2, length=32)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_the_summary_is_what_was_written(tmp_path, method):
    write_tiny_llama(tmp_path / "m")
    result = quantize(tmp_path / "m", tmp_path / "out", method=method, calibration=FEW)
    scheme = read_checkpoint(tmp_path / "out").scheme
    for name in ("method", "group_size", "symmetric", "activation", "attention"):
        assert result[name] == getattr(scheme, name)
    assert (result["method"], result["activation"]) == (method, "per-token-group")
    assert result["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0.01 < result["relative_weight_error"] < 0.3
    assert result["seconds"] > 0
    # K = 96 and 160 in groups of 64: 2 and 3 groups of two float16 values.
    weights = {96: 96 + 2 * 32 + 96 + 2 * 160, 160: 96}
    groups = 2 * weights[96] + 3 * weights[160]
    total = 96 * weights[96] + 160 * weights[160]
    assert result["bits_per_weight"] == pytest.approx(4 + 32 * groups / total)


def test_8bit_weights_are_rounded_to_nearest(tmp_path):
    write_tiny_llama(tmp_path / "m")
    result = quantize(tmp_path / "m", tmp_path / "out", weight_bits=8)
    assert (result["method"], result["weight_bits"], result["symmetric"]) == ("rtn", 8, True)
    assert 8.2 < result["bits_per_weight"] < 8.5 and result["relative_weight_error"] < 0.01


def test_gptq_is_the_default_for_float_models(tmp_path):
    write_tiny_llama(tmp_path / "m")
    assert quantize(tmp_path / "m", tmp_path / "out", calibration=FEW)["method"] == "gptq"


@pytest.mark.parametrize(
    ("sizes", "group_size"), [({}, 64), ({"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}, 128)]
)
def test_groups_are_128_where_that_divides(tmp_path, sizes, group_size):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if sizes else {}
    write_tiny_llama(tmp_path / "m", **sizes, **heads)
    assert quantize(tmp_path / "m", tmp_path / "out", method="rtn")["group_size"] == group_size


def test_an_earlier_checkpoint_is_replaced_and_nothing_else(tmp_path):
    write_tiny_llama(tmp_path / "m")
    quantize(tmp_path / "m", tmp_path / "out", method="rtn")
    quantize(tmp_path / "m", tmp_path / "out", method="rtn", symmetric=True)
    assert read_checkpoint(tmp_path / "out").scheme.symmetric
    with pytest.raises(AgqError, match="choose another"):
        quantize(tmp_path / "m", tmp_path / "m", method="rtn")
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "awq"}, "method 'awq'"),
        ({"method": "rtn", "group_size": 48}, "group size 48"),
        ({"method": "rtn", "activation": "int4"}, "activation 'int4'"),
        ({"method": "rtn", "max_refine": 2}, "per-token-group ones need none"),
        ({"method": "rtn", "activation": "static", "max_refine": -1}, "max_refine -1"),
        ({"method": "rtn", "four_bit": ("q_proj",)}, "no linear 'q_proj': choose from qkv, o, gate_up, down"),
        ({"method": "rtn", "activation": "none", "four_bit": ("o",)}, "float activations have no 4-bit codes"),
        ({"method": "rtn", "attention": "log3"}, "attention 'log3'"),
        ({"method": "keep"}, "not 4 bit"),
        ({"method": "rtn", "weight_bits": 6}, "weight_bits 6 .* choose 4 or 8"),
        ({"method": "gptq", "weight_bits": 8}, "8-bit weights .* choose the method rtn"),
        ({"method": "keep", "weight_bits": 8}, "8-bit weights .* choose the method rtn"),
        ({"method": "gptq", "calibration": Calibration(text="absent.txt")}, "no text absent.txt"),
        ({"method": "gptq", "calibration": Calibration(samples=0)}, "1 or more"),
        ({"method": "gptq", "calibration": Calibration(text=__file__, length=0)}, "less than one window of 0"),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path, arguments, words):
    write_tiny_llama(tmp_path / "m")
    with pytest.raises(AgqError, match=words):
        quantize(tmp_path / "m", tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_was_looked_at_is_on_record(tmp_path):
    write_tiny_llama(tmp_path / "m")
    (tmp_path / "t").write_text("It was a dark and stormy night. " * 20)

    def made(**calibration):
        result = quantize(
            tmp_path / "m", tmp_path / "out", method="gptq", calibration=Calibration(str(tmp_path / "t"), **calibration)
        )
        recorded = read_checkpoint(tmp_path / "out").raw_config["quantization_config"]["calibration"]
        assert recorded == result["calibration"]
        return recorded, (tmp_path / "out" / "model.safetensors").read_bytes()

    spread, weights = made(samples=3, length=40)
    sha256 = hashlib.sha256((tmp_path / "t").read_bytes()).hexdigest()
    assert spread == {"text": str(tmp_path / "t"), "sha256": sha256, "samples": 3, "length": 40, "seed": None}
    drawn, other = made(samples=3, length=40, seed=5)
    assert drawn == spread | {"seed": 5} and other != weights
    assert made(samples=3, length=40, seed=5)[1] == other
    assert made(samples=1000, length=1000)[0]["samples"] == 2  # 640 tokens, windows of the model's 256
    result = quantize(tmp_path / "m", tmp_path / "out", method="rtn")
    assert result["calibration"] is None
    assert "calibration" not in read_checkpoint(tmp_path / "out").raw_config["quantization_config"]


def test_the_same_model_gives_the_same_bytes(tmp_path):
    write_tiny_llama(tmp_path / "m")
    for name in ("a", "b"):
        quantize(tmp_path / "m", tmp_path / name, method="rtn", activation="static", calibration=FEW)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_matrices_are_written_and_forgotten(tmp_path, monkeypatch, method):
    """Of 28 matrices only those that share an input, and the ones before them, are there at a time."""
    seen, alive = [], []
    write = checkpoint.write_tensors

    def watched(path, names, tensors, metadata):
        def passing():
            for name, value in tensors:
                if name.endswith(".qweight") and "layers" in name:
                    seen.append(weakref.ref(value))
                    alive.append(sum(ref() is not None for ref in seen))
                yield name, value
                del value

        write(path, names, passing(), metadata)

    monkeypatch.setattr(checkpoint, "write_tensors", watched)
    write_tiny_llama(tmp_path / "m", num_hidden_layers=4)
    quantize(tmp_path / "m", tmp_path / "out", method=method, calibration=FEW)
    assert len(alive) == 28 and max(alive) <= 5
