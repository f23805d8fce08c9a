"""The tuner: it finds what is fast, and what it has measured is there whatever happens to it."""

import collections
import importlib.util
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from tvm.s_tir.meta_schedule.runner import RunnerResult

from agq_tvm.errors import AgqError
from agq_tvm.kernels.record_library import Library
from agq_tvm.tuning.allotment import allot
from agq_tvm.tuning.claims import Claims
from agq_tvm.tuning.measure import Measurement
from agq_tvm.tuning.measurer import Outcome
from agq_tvm.tuning.tuner import Settings
from tests.missing import leave_out
from tests.tuning.fake_tuning import DEVICE, Done, FakeBuilder, FakeRunner, landscape, tasks, tuner

TRIALS = 60


def records(folder):
    return Library(folder, device=DEVICE).read()


def tried(folder) -> list:
    return [(each.task, tuple(sorted(each.decisions.items()))) for each in records(folder) if not each.confirmed]


def test_the_search_finds_one_of_the_best_of_a_landscape(tmp_path):
    if importlib.util.find_spec("xgboost") is None:
        leave_out("the evolutionary search", "xgboost is missing: pip install -e '.[tune]' for it")
    (task,) = tasks(16, isa="generic")  # few vectors to a tile: its candidates are built in half the time
    late = {}
    for strategy in ("evolutionary", "random"):
        folder = tmp_path / strategy
        tuner(folder, [task], Settings(48, strategy, default=False, seed=1)).run()
        assert len(tried(folder)) == len(set(tried(folder))) == 48
        late[strategy] = statistics.mean(each.time for each in records(folder)[24:])
    assert task.space.size > 10 * 48
    # Chance finds one of the best two in 48 trials once in six times.
    best = sorted(landscape(task, point) for point in task.space.points())[:2]
    assert min(each.time for each in records(tmp_path / "evolutionary")) <= best[-1] * (1 + 1e-5)
    assert late["evolutionary"] < 0.85 * late["random"], late


def test_a_space_smaller_than_the_trials_ends_when_it_is_exhausted(tmp_path):
    from agq_tvm.kernels.norm import LayerNormKernel
    from agq_tvm.targets import load_device
    from agq_tvm.tuning.task import make_task

    task = make_task(LayerNormKernel(16, 64, 1e-5), "avx512vnni", load_device(DEVICE), 2)
    (progress,) = tuner(tmp_path, [replace(task, count=9)], Settings(10_000, "random")).run()
    assert progress.known == progress.wanted == task.space.size == len(tried(tmp_path))


def test_the_default_comes_first_and_the_best_is_measured_again_beside_it(tmp_path):
    (task,) = tasks(16)
    tuner(tmp_path, [task], Settings(20, "random")).run()
    found = records(tmp_path)
    assert found[0].decisions == task.space.default
    confirmed = [each for each in found if each.confirmed]
    assert 2 <= len(confirmed) <= 4 and all(len(each.seconds) == 9 for each in confirmed)
    best = Library(tmp_path, device=DEVICE).best(task.name)
    assert best.confirmed
    assert best.time == pytest.approx(min(landscape(task, each.decisions) for each in found), rel=1e-5)


class Lucky(FakeRunner):
    """Candidates seem faster than they are when they are measured for the first time, some of them much."""

    def __init__(self, task):
        super().__init__(task)
        self.met = set()

    def _one(self, each):
        text = Path(str(each.artifact_path)).read_text()
        seconds, first = landscape(self.task, json.loads(text)), text not in self.met
        self.met.add(text)
        luck = 0.5 + 0.5 * random.Random(f"1{text}").random() if first else 1
        return Done(RunnerResult([seconds * luck] * 3, None), 0)


@pytest.mark.parametrize("default", [True, False])
def test_of_many_candidates_the_best_is_not_only_lucky(tmp_path, default):
    (task,) = tasks(16, isa="generic")
    made = tuner(tmp_path, [task], Settings(192, "random", default=default, batch=64))
    made.runner_of = Lucky
    made.run()
    found = [each for each in records(tmp_path) if each.decisions != task.space.default]
    seeming = sorted((each for each in found if not each.confirmed), key=lambda each: each.time)
    best = Library(tmp_path, device=DEVICE).best(task.name)
    assert best.confirmed
    assert best.time == pytest.approx(min(landscape(task, each.decisions) for each in seeming[:12]), rel=1e-5)
    assert best.time < min(landscape(task, each.decisions) for each in seeming[:3]) - 1e-6  # with such luck
    assert sum(each.confirmed for each in found) == 3
    assert best.gain == pytest.approx(landscape(task, task.space.default) / best.time, rel=1e-5)
    assert any(each.decisions == task.space.default for each in records(tmp_path)) == default
    before = records(tmp_path)
    made = tuner(tmp_path, [task], made.settings)
    assert not made.lacks(task)
    made.run()
    assert records(tmp_path) == before


def test_a_default_that_is_best_needs_no_confirmation(tmp_path):
    class Default(FakeRunner):
        def _one(self, each):
            decisions = json.loads(Path(str(each.artifact_path)).read_text())
            return Done(RunnerResult([1e-9 if decisions == self.task.space.default else 1e-3] * 3, None), 0)

    (task,) = tasks(16)
    made = tuner(tmp_path, [task], Settings(12, "random"))
    made.runner_of = Default
    (progress,) = made.run()
    assert progress.known == len(records(tmp_path)) == 12 and not any(each.confirmed for each in records(tmp_path))


def test_what_is_known_is_not_measured_again_nor_are_failures(tmp_path):
    log, some = tmp_path / "log", tasks(16)
    for trials in (10, 10, 24):
        tuner(tmp_path, some, Settings(trials, "random"), log, wrong=lambda each: each["rows"] != 1).run()
    failed = [each for each in records(tmp_path) if each.error]
    assert failed and all(each.error.startswith("wrong:") and each.record is None for each in failed)
    assert len(tried(tmp_path)) == len(set(tried(tmp_path))) == 24


def test_records_that_the_space_does_not_allow_are_no_trials(tmp_path):
    (task,) = tasks(16)
    tuner(tmp_path, [task], Settings(4, "random")).run()
    path = Library(tmp_path, device=DEVICE).files[0].path
    path.write_text(path.read_text().replace('"decisions":{"rows":', '"decisions":{"rows":77'))
    (progress,) = tuner(tmp_path, [task], Settings(4, "random")).run()
    assert progress.known == progress.measured == 4


def test_time_is_up(tmp_path):
    begun = time.monotonic()
    (progress,) = tuner(tmp_path, tasks(16), Settings(1000, "random", time_limit=1.5), delay=0.05).run()
    assert time.monotonic() - begun < 30
    assert 0 < progress.known < 1000
    assert progress.known == len(tried(tmp_path))


def test_trials_go_where_time_goes():
    light, heavy = tasks(16, 128)
    shares = allot([light, replace(heavy, count=100)], {light.name: 1000, heavy.name: 1000}, 200)
    assert sum(shares.values()) == 200 and shares[heavy.name] > 5 * shares[light.name] >= 10
    assert allot([light, heavy], {light.name: 3, heavy.name: 5}, 200) == {light.name: 3, heavy.name: 5}


def start(folder, log, delay: float, trials: int = TRIALS, **options) -> subprocess.Popen:
    # TVM would import torch, which takes seconds.
    program = "import sys; sys.modules['torch'] = None; from tests.tuning.fake_tuning import main; sys.exit(main())"
    command = [sys.executable, "-c", program, str(folder), str(log), str(trials), str(delay)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition, process, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(process) -> None:
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors


def test_killed_at_any_moment_it_goes_on_without_loss_or_repetition(tmp_path):
    log, before = tmp_path / "log", []
    for goal in (3, 11):
        process = start(tmp_path, log, 0.01)
        wait_for(lambda goal=goal: len(tried(tmp_path)) >= goal, process)
        process.kill()
        process.wait()
        kept = [each.line() for each in records(tmp_path)]
        assert kept[: len(before)] == before
        before = kept
    finish(start(tmp_path, log, 0))
    assert [each.line() for each in records(tmp_path)][: len(before)] == before
    assert len(tried(tmp_path)) == len(set(tried(tmp_path))) == TRIALS
    counted = collections.Counter(log.read_text().splitlines())
    confirmed = {json.dumps([each.task, each.decisions]) for each in records(tmp_path) if each.confirmed}
    begun = [line for line, count in counted.items() if count > 1 and line not in confirmed]
    assert len(begun) <= 2 * 4  # what was being measured when it was killed, and no more


def test_two_tuners_share_a_library(tmp_path):
    log = tmp_path / "log"
    both = [start(tmp_path, log, 0.01) for _ in range(2)]
    for process in both:
        finish(process)
    assert len(tried(tmp_path)) == len(set(tried(tmp_path))) == TRIALS
    confirmed = {json.dumps([each.task, each.decisions]) for each in records(tmp_path) if each.confirmed}
    counted = collections.Counter(log.read_text().splitlines())
    assert all(count == 1 for line, count in counted.items() if line not in confirmed)


def limit_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def test_a_full_disk_ends_it_with_a_sentence_and_whole_records(tmp_path):
    log = tmp_path / "log"
    process = start(tmp_path, log, 0, preexec_fn=limit_files)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 2
    assert "cannot write" in errors.splitlines()[-1] and "records.jsonl" in errors
    library = Library(tmp_path, device=DEVICE)
    kept = len(library.read())
    assert kept > 0 and not library.problems
    finish(start(tmp_path, log, 0))
    assert len(tried(tmp_path)) == len(set(tried(tmp_path))) == TRIALS > kept


class Lost:
    """A runner whose boards are gone, or of another kind."""

    def __init__(self, error: str):
        self.error = error

    def run(self, inputs):
        return [Done(RunnerResult(None, self.error), 0) for _ in inputs]


def test_a_default_that_was_lost_is_measured_next(tmp_path):
    """Without its time nothing could be confirmed."""

    class LosesTheFirst(FakeRunner):
        lost = False

        def _one(self, each):
            done = super()._one(each)
            if not self.lost:
                self.lost = True
                return Done(RunnerResult(None, "lost: the board was stopped"), 0)
            return done

    (task,) = tasks(16)
    made = tuner(tmp_path, [task], Settings(20, "random", batch=4))
    made.runner_of = LosesTheFirst
    made.run()
    found = records(tmp_path)
    assert task.space.default in [each.decisions for each in found[:4]]
    assert any(each.confirmed for each in found)


def test_a_confirmed_record_tells_of_its_own_measurements(tmp_path):
    class Telling(FakeRunner):
        """Tells a spread that is a candidate's own, and that the processor was hot in its first turn."""

        def __init__(self, task):
            super().__init__(task)
            self.outcomes, self.met = {}, collections.Counter()

        def _one(self, each):
            path = str(each.artifact_path)
            seconds = landscape(self.task, json.loads(Path(path).read_text()))
            self.met[path] += 1
            self.outcomes[path] = Future()
            hot = self.met[path] == 1
            self.outcomes[path].set_result(Outcome(Measurement([seconds], spread=seconds, hot=hot)))
            return super()._one(each)

    (task,) = tasks(16)
    made = tuner(tmp_path, [task], Settings(20, "random"))
    made.runner_of = Telling
    made.run()
    confirmed = [each for each in records(tmp_path) if each.confirmed]
    assert len({each.time for each in confirmed}) > 1
    for each in confirmed:
        assert each.provenance["spread"] == landscape(task, each.decisions) and each.provenance["hot"]


def test_no_library_has_the_name_of_another(tmp_path):
    """A worker that has loaded one would get that again: only the first task's best could be confirmed."""
    code = collections.defaultdict(set)

    class Noting(FakeRunner):
        def _one(self, each):
            text = Path(each.artifact_path).read_text()
            code[str(each.artifact_path)].add((self.task.name, text))
            return super()._one(each)

    both = [*tasks(16), *tasks(8)]
    made = tuner(tmp_path, both, Settings(40, "random"))
    made.runner_of = Noting
    made.run()
    assert {each.task for each in records(tmp_path) if each.confirmed} == {task.name for task in both}
    assert all(len(each) == 1 for each in code.values())


@pytest.mark.parametrize("error", ("lost: the board was stopped", "unfit: 10.0.0.7:9090 lacks asimddp"))
def test_boards_that_cannot_measure_leave_no_record(tmp_path, error):
    made = tuner(tmp_path, tasks(16), Settings(20, "random"))
    made.runner_of = lambda task: Lost(error)
    with pytest.raises(AgqError, match=error.partition(": ")[2].split()[-1]):
        made.run()
    assert records(tmp_path) == []


def test_a_build_that_finds_no_room_is_no_verdict(tmp_path):
    class Full(FakeBuilder):
        def submit(self, task, decisions, path):
            future = super().submit(task, decisions, path)
            future._result = "not built: LLVM ERROR: IO failure on output stream: No space left on device"
            return future

    made = tuner(tmp_path, tasks(16), Settings(20, "random"))
    made._make_builder = Full
    with pytest.raises(AgqError, match="the disk is full"):
        made.run()
    assert records(tmp_path) == []


@pytest.mark.parametrize("overlap", [False, True])
def test_what_failed_on_a_board_did_not_fail_on_this_machine(tmp_path, overlap):
    made = tuner(tmp_path, tasks(16), Settings(3, "random", overlap=overlap))
    made.runner_of = lambda task: Lost("crashed: signal 11")
    made.run()
    assert {each.provenance["cpu"] == made.tasks[0].device.cpu for each in records(tmp_path)} == {overlap}


def test_records_of_another_processor_are_hints_and_no_trials(tmp_path):
    (task,) = tasks(16)
    tuner(tmp_path / "shipped", [task], Settings(24, "random")).run()
    shipped = Library(tmp_path / "shipped", device=DEVICE)
    shipped.files[0].replace(lambda found: [faster(each) for each in found])
    best = shipped.best(task.name)
    assert best.confirmed and best.decisions != task.space.default
    made = tuner(tmp_path / "own", [task], Settings(6, "random"))
    made.library = Library(tmp_path / "own", tmp_path / "shipped", device=DEVICE)
    (progress,) = made.run()
    found = [each for each in records(tmp_path / "own") if not each.confirmed]
    assert progress.known == len(found) == 6 and progress.best == min(each.time for each in found)
    assert [each.decisions for each in found[:2]] == [task.space.default, best.decisions]
    assert any(each.confirmed for each in records(tmp_path / "own"))


def test_records_of_another_processor_in_ones_own_file_keep_nothing_from_being_written(tmp_path):
    """Of a shared home, or merged: the same points have to be measured here, and count."""
    (task,) = tasks(16)
    tuner(tmp_path, [task], Settings(24, "random")).run()
    library = Library(tmp_path, device=DEVICE)
    library.files[0].replace(lambda found: [faster(each) for each in found])
    others = len(records(tmp_path))
    (progress,) = tuner(tmp_path, [task], Settings(6, "random")).run()
    found = [each for each in records(tmp_path)[others:] if not each.confirmed]
    assert progress.known == progress.measured == len(found) == 6
    assert found[0].decisions == task.space.default and any(each.confirmed for each in records(tmp_path)[others:])


def faster(record):
    """Return a record as another processor might have made it."""
    origin = record.provenance | {"cpu": "another"}
    if record.confirmed:
        origin |= {"default_seconds": origin["default_seconds"] / 1000}
    return replace(record, seconds=tuple(each / 1000 for each in record.seconds), provenance=origin)


def test_waiting_for_another_tuner_is_said(tmp_path, capsys):
    made = tuner(tmp_path, tasks(16), Settings(20, "random", time_limit=1.5))
    other = Claims(made.library.files[0].path.parent)
    assert all(other.claim(task.name) for task in made.tasks)
    made.run()
    words = f"other tuners of this library have what is left ({len(made.tasks)} of the tasks): waiting for them"
    assert capsys.readouterr().err.splitlines().count(words) == 1
    assert records(tmp_path) == []


def test_claims_end_with_their_process(tmp_path):
    script = f"from pathlib import Path; from agq_tvm.tuning.claims import Claims; c = Claims(Path({str(tmp_path)!r}))"
    script += "; print(c.claim('task'), flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert other.stdout.readline() == "True\n"
        mine = Claims(tmp_path)
        assert not mine.claim("task") and mine.claim("another")
    finally:
        other.kill()
        other.communicate()
    assert mine.claim("task")
