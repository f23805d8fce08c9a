"""What stands around the results of a benchmark."""

import sys

from benchmarks import tables


def test_a_report_does_not_tell_where_things_lie(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "bundle"), "--targets", f"host,{tmp_path}/a.toml"])
    report = tables.report("benchmarks.speed", ("numpy",), results=[])
    assert report["command"] == "python -m benchmarks.speed bundle --targets host,a.toml" and report["results"] == []
