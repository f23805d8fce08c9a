"""The whole job, on a tiny model; on the real one in the slow test."""

import json
import time

import pytest

from agq_tvm.flow.quickstart import BOARDS
from tests.tiny import write_tiny_llama


def check_folder(folder, result: dict) -> None:
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == sorted(
        ["checkpoint", "host", *BOARDS, "results.json"]
    )
    assert json.loads((folder / "results.json").read_text()) == result
    assert result["speed"]["decode_tokens_per_second"] > 0
    assert result["quality"]["nll_difference_stderr"] > 0


def test_tiny_model_and_second_run(agq, tmp_path):
    model, folder = write_tiny_llama(tmp_path / "model"), tmp_path / "out"
    first = agq("quickstart", model, "-o", folder, "--json")
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout)
    check_folder(folder, result)
    libraries = [folder / name / "model.so" for name in ("host", *BOARDS)]
    made = [path.stat().st_mtime_ns for path in libraries]
    (folder / "raspberry-pi-4" / "params.bin").write_bytes(b"damaged")
    second = agq("quickstart", model, "-o", folder)
    assert second.returncode == 0, second.stderr
    assert "is damaged" in second.stderr and f"using {folder / 'host'}" in second.stderr
    now = [path.stat().st_mtime_ns for path in libraries]
    assert (now[0], now[2]) == (made[0], made[2]) and now[1] != made[1]
    for word in ("perplexity", "prefill", "decode", "size", *BOARDS, result["generated"]["prompt"]):
        assert word in second.stdout


@pytest.mark.slow
def test_real_model(agq, tmp_path):
    start = time.monotonic()
    process = agq("quickstart", "-o", tmp_path / "out", "--json", timeout=900)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    check_folder(tmp_path / "out", result)
    assert result["generated"]["text"].startswith(" convert sunlight into energy.")
    assert 30 < result["quality"]["float_perplexity"] < 45
    assert result["quality"]["perplexity_change"] + 2 * result["quality"]["perplexity_change_stderr"] < 0.01
    assert time.monotonic() - start < 900
