"""What stands around the results of a benchmark."""

import sys

from benchmarks import tables


def test_a_report_does_not_tell_where_things_lie(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "bundle"), "--rounds", "3"])
    report = tables.report("benchmarks.speed", ("numpy",), results=[])
    assert report["command"] == "python -m benchmarks.speed bundle --rounds 3" and report["results"] == []
