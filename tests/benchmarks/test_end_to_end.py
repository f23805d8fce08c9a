"""Models beside each other: the harness on an engine of its own, verdicts, and what converters write."""

import json
from dataclasses import replace

import numpy as np
import pytest

from agq_tvm.errors import AgqError
from benchmarks.end_to_end import run
from benchmarks.end_to_end.__main__ import measure
from benchmarks.end_to_end.models import Subject
from benchmarks.end_to_end.verdict import verdicts
from benchmarks.peers.base import ORIGIN
from tests.benchmarks import fake_engine


def row(engine, prefill, decode, pruned=False, head_bits=8, bits=4):
    found = {"model": "some", "threads": 1, "engine": engine, "pruned": pruned, "head_bits": head_bits, "bits": bits}
    return {**found, "prefill": prefill, "decode": decode}


BOUNDS = {"some": {"prefill": 1.7, "decode": 1.2}}


def test_each_work_has_its_fastest_engine_of_like_bits():
    rows = [
        row("agq_tvm g32", 340, 24),
        row("good prefill", 200, 10),
        row("good decode", 100, 20.1),
        row("8 bit", 900, 90, bits=8),
        row("another head", 900, 90, head_bits=4),
    ]
    prefill, decode = verdicts(rows, BOUNDS)
    assert (prefill["beside"], prefill["value"], prefill["met"]) == ("good prefill", 1.7, True)
    assert decode["beside"] == "good decode" and decode["met"] is False


def test_pruning_is_held_against_the_same_form_and_has_no_bound():
    rows = [row("agq_tvm g32", 100, 10), row("agq_tvm g32, pruned", 150, 10, pruned=True), row("other", 50, 10)]
    (gain,) = [each for each in verdicts(rows, BOUNDS) if each["bound"] is None]
    assert (gain["beside"], gain["value"], gain["met"]) == ("agq_tvm g32", 1.5, None)


def test_divergence():
    logits = np.random.default_rng(0).normal(size=(3, 50))
    assert run.divergence(logits, logits + 7) == pytest.approx(0, abs=1e-12)
    p, q = np.array([0.75, 0.25]), np.array([0.5, 0.5])
    expected = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert run.divergence(np.log([p]), np.log([q])) == pytest.approx(expected)
    with pytest.raises(AgqError, match="cannot be compared"):
        run.divergence(logits, logits[:2])


@pytest.fixture
def subject(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "text_tokens", lambda subject, count: list(range(6)))
    monkeypatch.setattr(run, "DECODE_TOKENS", 4)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 256}))
    (tmp_path / ORIGIN).write_text("some 4-bit model")
    return Subject("some", tmp_path, 1.7, 1.2)


def test_engines_are_measured_beside_each_other(subject, tmp_path):
    asked = run.Run(tmp_path / "work", [], 2, 60, {"fake": fake_engine})
    rows, found = run.measure_subject(asked, subject, 1)
    by_name = {each["engine"]: each for each in rows}
    assert set(by_name) == {form.name for form in fake_engine.MODELS} - {"fake failing"}
    assert set(found.missing) == {"fake failing"} and "cannot convert" in found.missing["fake failing"]
    assert by_name["torch float32"]["kl"] == 0
    assert by_name["fake g32"]["kl"] > 0 and by_name["fake int4 head"]["kl"] > 0
    assert all(each["rounds"] == 2 and each["prefill"] > 0 and each["decode"] > 0 for each in rows)
    assert verdicts(rows, {"some": {"prefill": 1.7, "decode": 1.2}})


def test_what_was_measured_is_written_before_the_next_model(subject, tmp_path, monkeypatch):
    measured = run.measure_subject

    def once(asked, which, threads):
        if which.name == "next":
            raise KeyboardInterrupt
        return measured(asked, which, threads)

    monkeypatch.setattr(run, "measure_subject", once)
    asked, path = run.Run(tmp_path / "work", ["fake g32"], 2, 60, {"fake": fake_engine}), tmp_path / "report.json"
    with pytest.raises(KeyboardInterrupt):
        measure(asked, [subject, replace(subject, name="next")], [1], path)
    assert {row["model"] for row in json.loads(path.read_text())["results"]} == {"some"}


def test_a_model_of_floats_has_neither_a_kept_grid_nor_float_engines(subject):
    (subject.path / ORIGIN).unlink()
    meant = {form.name for form in fake_engine.MODELS if run._meant(form, subject, [])}
    assert meant == {form.name for form in fake_engine.MODELS if form.bits <= 8}


def test_the_float_reference_is_measured_whatever_is_asked_for(subject):
    meant = {form.name for form in fake_engine.MODELS if run._meant(form, subject, ["int4"])}
    assert {"torch float32", "fake int4 head", "agq_tvm g32"} <= meant and "fake g32" not in meant
