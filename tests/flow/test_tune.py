"""`agq tune` on this machine, in processes of their own, and what `agq compile` makes of it."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from agq_tvm.kernels.record import Record
from agq_tvm.kernels.record_library import Library
from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.engine import Engine
from agq_tvm.targets import load_device

ONLY = "m8_n96_k96"


def records(folder) -> list[Record]:
    return Library(folder, device=load_device("host").name).read()


def start(checkpoint, folder, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "agq_tvm", "tune", str(checkpoint), "--target", "host", "--only", ONLY]
    command += ["--trials", "8", "--strategy", "random", "--library", str(folder), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_records(process, folder, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(records(folder)) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def tuned(tiny_checkpoint, tmp_path_factory):
    """Return a library that was made in three runs, of which one was interrupted and one killed, and their words."""
    folder = tmp_path_factory.mktemp("library")
    interrupted = start(tiny_checkpoint, folder)
    wait_for_records(interrupted, folder, 1)
    interrupted.send_signal(signal.SIGINT)
    _, words = interrupted.communicate(timeout=120)
    killed = start(tiny_checkpoint, folder)
    wait_for_records(killed, folder, 3)
    killed.kill()
    killed.communicate()
    before = [record.line() for record in records(folder)]
    last = start(tiny_checkpoint, folder, "--json")
    out, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    return folder, interrupted.returncode, words, before, json.loads(out)


def test_interrupted_and_killed_it_loses_and_repeats_nothing(tuned):
    folder, code, words, before, result = tuned
    assert code == 130
    assert "the same command goes on from there" in words and words.splitlines()[-1] == "agq: interrupted"
    found = records(folder)
    assert [record.line() for record in found][: len(before)] == before
    tried = [record.key for record in found if not record.confirmed]
    assert len(tried) == len(set(tried)) == 8
    (task,) = result["tasks"]
    assert (task["trials"], task["wanted"], task["failures"]) == (8, 8, 0)
    assert result["measured"] == 8 - len([line for line in before if b'"default_seconds"' not in line])


def test_records_say_where_they_come_from(tuned):
    folder, *_ = tuned
    for record in records(folder):
        assert record.provenance["threads"] == load_device("host").threads
        assert record.provenance["device"] == load_device("host").name
        assert record.provenance["kernel_version"] and record.provenance["versions"]["tvm"]
        assert record.record[1] == [pytest.approx(each) for each in record.seconds] or record.confirmed


def test_a_tuned_bundle_computes_what_the_default_does(agq, tuned, tiny_checkpoint, tiny_bundle, tmp_path):
    folder, *_ = tuned
    task = records(folder)[0].task
    # The default may be the best: then another is made so, to see it used.
    other = next(record for record in records(folder) if record.decisions != records(folder)[0].decisions)
    path = Library(folder, device=load_device("host").name).files[0].path
    line = json.loads(other.line())
    line["seconds"], line["provenance"] = [1e-9], line["provenance"] | {"default_seconds": 1.0}
    path.write_text("".join(record.line().decode() for record in records(folder) if record.key != _key(line)))
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n" + json.dumps(line | {"decisions": {"rows": 3}, "seconds": [1e-10]}) + "\n")
        file.write("not a record\n")
    made = agq("compile", tiny_checkpoint, "--target", "host", "--library", folder, "-o", tmp_path / "b", "--json")
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)["schedules"]
    assert report["tuned"] == 1 and report["nearest"] >= 1 and len(report["left_out"]) == 1
    (tuned_kernel,) = [found for found in report["kernels"].values() if found["schedule"] == "tuned"]
    assert tuned_kernel["task"] == task and tuned_kernel["decisions"] == line["decisions"]
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["schedules"] == report
    tokens = list(range(5, 13))
    logits = [_logits(bundle, tokens) for bundle in (tiny_bundle, tmp_path / "b")]
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def _key(line: dict) -> tuple:
    return Record(**line).key


def _logits(bundle, tokens):
    return Engine(Bundle(bundle)).prefill(tokens, all_logits=True)


def test_exported_records_are_metaschedules_own(agq, tuned, tmp_path):
    folder, *_ = tuned
    device = load_device("host").name
    done = agq("schedules", "export", device, "--library", folder, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    from tvm.s_tir import meta_schedule as ms

    database = ms.database.JSONDatabase(work_dir=str(tmp_path / "out"))
    assert len(database) == json.loads(done.stdout)["records"] >= 8


def test_what_cannot_be_tuned_is_said(agq, tiny_checkpoint, tmp_path):
    for options, word in (
        (("--target", "raspberry-pi-4"), "cannot run code for raspberry-pi-4"),
        (("--target", "host", "--tracker", "127.0.0.1:1"), "--key"),
        (("--target", "host", "--only", "gemm"), "tasks, which begin with add_rms_norm_quantize_per_token"),
    ):
        done = agq("tune", tiny_checkpoint, "--library", tmp_path, *options)
        assert done.returncode == 2 and word in done.stderr.splitlines()[-1]


def test_where_the_time_was_too_short_it_is_said(tiny_checkpoint, tmp_path):
    process = start(tiny_checkpoint, tmp_path, "--time-limit", "0.001", "--json")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert json.loads(out)["measured"] == 0
    assert "time is up with 8 trials to go: the same command goes on from there" in errors.splitlines()


def test_more_trials_than_asked_for_are_announced(agq, tiny_checkpoint, tmp_path):
    done = agq(
        "tune", tiny_checkpoint, "--target", "host", "--trials", "3", "--time-limit", "0.001", "--library", tmp_path
    )
    assert done.returncode == 0 and "3 trials are not two for each task: there will be " in done.stderr
