import pytest

from agq_tvm.quantize.source import open_source
from benchmarks import quantize
from benchmarks.random_model import SHAPES, write_random_model

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_a_random_model_is_measured_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "7b", TINY)
    path = write_random_model(tmp_path / "random-7b-2", "7b", 2)
    written = (path / "model-0.safetensors").stat().st_mtime_ns
    source = open_source(path)
    assert source.config.num_layers == 2
    assert abs(source.tensor("model.layers.1.mlp.down_proj.weight").std() * 96**0.5 - 1) < 0.05
    row = quantize._measured(quantize.Run("tiny", str(path), "gptq", 2, 16), tmp_path)
    assert (path / "model-0.safetensors").stat().st_mtime_ns == written
    assert row["bytes"] == (tmp_path / "quantized" / "model.safetensors").stat().st_size
    assert (row["calibration"]["samples"], row["calibration"]["length"]) == (2, 16)
    assert 0 < row["idle_own_bytes"] < row["peak_own_bytes"] < row["peak_resident_bytes"]
    assert row["seconds"] > 0 and row["cpu_seconds"] > 0


def test_all_layers_are_those_measured_and_as_many_more_as_are_missing():
    def row(layers: int, seconds: float, peak: int) -> dict:
        numbers = {"seconds": seconds, "cpu_seconds": 2 * seconds, "bytes": 100 + layers, "peak_own_bytes": peak}
        return {"label": f"random 7B, layers: {layers}", "method": "rtn", **numbers}

    assert quantize._whole_7b([row(1, 10.0, 7)]) == {}
    whole = quantize._whole_7b([row(1, 10.0, 7), row(2, 13.0, 6)])
    assert whole == {"rtn": {"seconds": 103.0, "cpu_seconds": 206.0, "bytes": 132, "peak_own_bytes": 7}}
    lines = quantize._table([row(1, 10.0, 7) | {"samples": 0, "length": 0, "peak_resident_bytes": 9}], whole)
    assert [line[0] for line in lines[1:]] == ["random 7B, layers: 1", "7B, 32 layers, from these"]


def test_a_run_that_fails_is_reported(tmp_path):
    with pytest.raises(Exception, match="the process ended with code 1"):
        quantize._measured(quantize.Run("absent", str(tmp_path / "absent"), "rtn"), tmp_path)
