"""The measure of caches and heads, on a model of its own."""

from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.quantize.source import open_source
from benchmarks.caches import FORMS, HEADS, rows_of, score_caches, score_heads
from tests.tiny import write_tiny_model


def test_coarser_caches_differ_more(tmp_path):
    source = open_source(write_tiny_model(tmp_path / "m", "llama", 3))
    first, *rows = rows_of("persuasion", "caches", score_caches(source, "persuasion", windows=2, window=32))
    assert [first["form"], *(row["form"] for row in rows)] == list(FORMS) and "change" not in first
    found = {row["form"]: row["nll"] for row in rows}
    assert 0 < abs(found["float16"]) < abs(found["int8 queries, keys and values"]) < 0.1


def test_heads_of_fewer_bits_differ_more(tmp_path, monkeypatch):
    source = open_source(write_tiny_model(tmp_path / "m", "llama", 3))
    made = []
    monkeypatch.setattr("benchmarks.caches.quantize", lambda *a, **k: made.append(k["head_bits"]) or short(*a, **k))
    scores = [score_heads(source, "persuasion", tmp_path, windows=2, window=32) for _ in range(2)]
    assert made == list(HEADS.values()), "the second time they are there"
    _, eight, four = rows_of("persuasion", "heads", scores[0])
    assert 0 < abs(eight["nll"]) < abs(four["nll"]) < 0.5
    assert rows_of("persuasion", "heads", scores[1])[2] == four


def short(*arguments, **settings):
    """Quantize, but calibrate on little."""
    calibration = Calibration(samples=2, length=48)
    return quantize(*arguments, method="rtn", group_size=32, calibration=calibration, **settings)
