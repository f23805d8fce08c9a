"""The harness that measures engines beside each other: processes, rounds, what is missing. No time is asserted."""

import json
import tomllib

import numpy as np
import pytest

from agq_tvm.errors import AgqError
from agq_tvm.quantize.weights import codes_of, rtn
from benchmarks.kernels import beside
from benchmarks.peers import base, environments, fleet
from benchmarks.peers.host import Worker
from benchmarks.tables import ROOT
from tests.benchmarks import fake_engine

SHAPE = (64, 128)


def rounded(w, size):
    linear = rtn(w, size, symmetric=True)
    return codes_of(linear), linear.scales.astype("float32")


@pytest.fixture
def operands(tmp_path):
    path = tmp_path / "operands"
    base.Operands.write(path, *SHAPE, 128, rounded)
    return path


def test_operands_are_a_product_and_its_rounded_weights(operands):
    given = base.Operands(operands, 3, 1)
    assert given.x.shape == (3, SHAPE[1]) and given.w.shape == SHAPE
    np.testing.assert_allclose(given.error(given.x @ given.w.T), 0, atol=1e-6)
    assert given.error(2 * given.x @ given.w.T) == pytest.approx(1)
    for size in base.GROUP_SIZES:
        codes, scales = given.grid(size)
        restored = (codes.astype("float32") - 8) * np.repeat(scales, size, 1)
        assert 0.02 < given.error(given.x @ restored.T) < 0.2


def test_copies_differ():
    w = np.random.default_rng(0).integers(0, 255, (4096, 2))
    copies = [base.copy_of(w, i).tobytes() for i in range(30)]
    assert len(set(copies)) == 30


def test_engines_are_found_and_their_forms_have_names_of_their_own():
    found = base.engines()
    assert {"ours", "llamacpp", "ort", "ov", "torch_eager"} <= set(found)
    for attribute in ("PRODUCTS", "MODELS"):
        names = [form.name for engine in found.values() for form in getattr(engine, attribute, ())]
        assert len(names) == len(set(names)) > 5
    for engine in found.values():
        assert engine.ENVIRONMENT in ("", *environments.EXTRAS)
        assert hasattr(engine, "PRODUCTS") == hasattr(engine, "Product")
        assert hasattr(engine, "MODELS") == hasattr(engine, "Model")


def test_engines_are_pinned():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for engine in base.engines().values():
        if engine.ENVIRONMENT:
            held = extras[environments.EXTRAS[engine.ENVIRONMENT]]
            assert any(line.startswith(f"{engine.PACKAGE}==") for line in held), engine.PACKAGE


def test_an_environment_that_is_not_there_is_ours(tmp_path):
    import sys

    assert environments.interpreter(tmp_path, "shared") == sys.executable
    assert environments.interpreter(tmp_path, "") == sys.executable
    (tmp_path / "shared" / "bin").mkdir(parents=True)
    (tmp_path / "shared" / "bin" / "python").symlink_to(sys.executable)
    assert environments.interpreter(tmp_path, "shared") == str(tmp_path / "shared" / "bin" / "python")


def worker(tmp_path, form: str) -> Worker:
    return fleet.Fleet(tmp_path, 1).worker(fake_engine, form)


def test_a_worker_multiplies(tmp_path, operands):
    with worker(tmp_path, "fake exact") as process:
        prepared = process.ask("prepare", operands=str(operands), rows=2, copies=3)
        assert prepared["bytes"] == 4 * SHAPE[0] * SHAPE[1] and prepared["error"] < 1e-6
        times = process.ask("run")
        assert times["wall"] > 0 and times["cpu"] >= 0


def test_a_worker_that_fails_says_why(tmp_path, operands):
    with worker(tmp_path, "fake failing") as process, pytest.raises(AgqError, match="no such kernel"):
        process.ask("prepare", operands=str(operands), rows=2, copies=1)


def test_reports_have_no_path_of_this_machine(tmp_path, capsys):
    found = fleet.Fleet(tmp_path, 1)
    found.leave_out("fake", f"it failed: see {tmp_path}/logs/fake.txt")
    assert str(tmp_path) in capsys.readouterr().err
    assert found.missing == {"fake": "it failed: see DIR/logs/fake.txt"}


def test_a_worker_that_dies_is_named(tmp_path, operands):
    with worker(tmp_path, "fake dying") as process:
        process.ask("prepare", operands=str(operands), rows=1, copies=1)
        process.ask("run")
        with pytest.raises(AgqError, match=r"fake dying died \(exit status 3\)"):
            process.ask("run")
        with pytest.raises(AgqError, match="fake dying"):
            process.ask("run")


def test_a_product_and_a_model_may_have_one_name(tmp_path, operands):
    with worker(tmp_path, "agq_tvm g32") as process:
        process.ask("prepare", operands=str(operands), rows=2, copies=1)
        process.ask("load", source=str(tmp_path), context=16)
        assert process.ask("decode", tokens=[1, 2])["wall"] > 0


def test_rounds_go_through_all_steps_in_turn():
    order = []
    steps = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    kept = fleet.rounds_of(steps, 1, 2, 100)
    assert order == ["a", "b"] * 3
    assert kept == {"a": [3, 5], "b": [4, 6]}


def test_rounds_end_when_time_is_up_but_not_before_the_fewest():
    assert len(fleet.rounds_of({"a": lambda: 1}, 1, 50, 0)["a"]) == fleet.FEWEST_ROUNDS
    assert len(fleet.rounds_of({"a": lambda: 1}, 1, 50, 0, fewest=2)["a"]) == 2
    assert len(fleet.rounds_of({"a": lambda: 1}, 1, 1, 0)["a"]) == 1


def test_a_step_without_a_result_is_not_asked_again():
    calls = []
    kept = fleet.rounds_of({"a": lambda: calls.append(0), "b": lambda: 1}, 1, 3, 100)
    assert kept == {"a": [], "b": [1, 1, 1]} and len(calls) == 1


def test_on_one_thread_the_lower_clock_counts():
    times = {"wall": 2.0, "cpu": 1.5}
    assert fleet.lower(times, 1) == 1.5
    assert fleet.lower(times, 2) == 2.0


def test_more_threads_than_processors_are_refused():
    with pytest.raises(AgqError, match="100000 threads"):
        fleet.cores(100000)


def test_only_keeps_ours():
    forms = [form.name for form in fake_engine.PRODUCTS if fleet.named(form, ["INT8"])]
    assert forms == ["agq_tvm g32", "fake int8"]
    assert all(fleet.named(form, []) for form in fake_engine.PRODUCTS)


@pytest.fixture
def one_shape(tmp_path, monkeypatch):
    """Measure the fake engine, and one that is not installed, at a small shape."""
    import types

    absent = types.ModuleType("absent")
    absent.ENVIRONMENT, absent.PACKAGE, absent.PRODUCTS = "", "no-such-package", (base.Form("absent g32", "g32"),)
    monkeypatch.setattr(beside, "ours", fake_engine)
    monkeypatch.setattr(beside, "DISTINCT_BYTES", 3 * SHAPE[0] * SHAPE[1] // 2)
    engines = {"fake": fake_engine, "absent": absent}
    return beside.Run(tmp_path, [], 4, 60, shapes=(SHAPE,), rows=(1, 128), engines=engines)


def test_a_run_names_what_it_did_not_measure_and_goes_on(one_shape, tmp_path, capsys):
    beside.measure(one_shape, [1], tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    measured = {(row["engine"], row["rows"]) for row in found["results"]}
    assert {("agq_tvm g32", 1), ("fake exact", 128), ("fake int8", 128)} <= measured
    assert not any(engine in ("absent g32", "fake failing") for engine, _ in measured)
    missing = {name.split(",")[0]: reason for name, reason in found["missing"].items()}
    assert set(missing) == {"absent g32", "fake failing", "fake dying"}
    assert "no-such-package is not installed" in missing["absent g32"]
    printed = capsys.readouterr()
    for name in missing:
        assert f"NOT MEASURED: {name}" in printed.out and f"NOT MEASURED: {name}" in printed.err
    assert found["limits"]["1"]["GB/s"]["median"] == 1e3
    for row in found["results"]:
        limit = {"GB/s": 1e3, "GOP/s": 1e6}[row["unit"]]
        assert row["share_percent"] == pytest.approx(100 * row["rate"] / limit)
    assert found["verdicts"]


def test_copies_fill_what_no_cache_holds():
    million = (1024, 1024, 1)
    copies = {kind: beside.copies_of(kind, million) for kind in beside.BYTES}
    assert copies == {"g32": 320, "g128": 320, "int8": 160, "float": 80}
    assert beside.copies_of("g32", (1024, 1024, 16)) == 320
    assert beside.copies_of("g32", (1024, 1024, 128)) == 1


def test_a_row_has_the_median_and_the_rate_of_what_is_stored():
    form, prepared = base.Form("some", "g32"), {"bytes": 1000, "error": 0.1}
    times = [{"wall": wall, "cpu": 9.0} for wall in (1e-6, 2e-6, 9e-6)]
    one = beside.row_of(form, (40, 50, 1), 1, prepared, times)
    assert one["milliseconds"] == pytest.approx(2e-3) and one["bits_per_weight"] == 4
    assert one["rate"] == pytest.approx(1000 / 2e-6 / 1e9) and one["unit"] == "GB/s"
    many = beside.row_of(form, (40, 50, 128), 1, prepared, times)
    assert many["rate"] == pytest.approx(2 * 128 * 40 * 50 / 2e-6 / 1e9) and many["unit"] == "GOP/s"


def test_more_bits_and_less_error_are_named():
    own = {"bits_per_weight": 4.5, "error": 0.1}
    assert beside.differences({"bits_per_weight": 4.5, "error": 0.1}, own) == []
    assert beside.differences({"bits_per_weight": 5.0, "error": 0.08}, own) == ["more bits", "less error"]
