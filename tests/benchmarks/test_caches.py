"""The measure of caches, on a model of its own."""

from benchmarks.caches import FORMS, measure
from tests.tiny import write_tiny_model


def test_coarser_caches_differ_more(tmp_path):
    found = measure(write_tiny_model(tmp_path / "m", "llama", 3), "persuasion", windows=2, window=32)
    assert list(found) == list(FORMS)[1:]
    assert 0 < abs(found["float16"].nll) < abs(found["int8 queries, keys and values"].nll) < 0.1
