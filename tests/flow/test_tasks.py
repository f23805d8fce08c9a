"""The tasks of a checkpoint, and the schedules that its kernels get from a library."""

import io
from dataclasses import replace

import pytest

from agq_tvm.errors import AgqError
from agq_tvm.flow.schedule_library import export_schedules
from agq_tvm.flow.schedules import Chooser, summary
from agq_tvm.flow.tasks import extract_tasks
from agq_tvm.flow.tune import chosen
from agq_tvm.kernels import linear_space, tunable
from agq_tvm.kernels.attention_form import AttentionKernel, attention_form
from agq_tvm.kernels.attrs import describe
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.nearest import nearest
from agq_tvm.kernels.record import Record
from agq_tvm.kernels.record_library import Library
from agq_tvm.progress import say
from agq_tvm.targets import load_device
from agq_tvm.tuning.display import Lines
from agq_tvm.tuning.progress import Progress
from agq_tvm.tuning.task import make_task

DEVICE = load_device("x86-64-avx512vnni")
ISA = instruction_set("avx512vnni")
KERNEL = LinearKernel(16, 64, 256, 4, 32, True, None, False)
VERSION = tunable.version_of(KERNEL)


@pytest.fixture(scope="module")
def tasks(tiny_checkpoint):
    return extract_tasks(tiny_checkpoint, DEVICE, 256, "float16")


def test_each_shape_is_a_task_once_and_counts_how_often_it_runs(tasks):
    names = [task.name for task in tasks]
    assert len(names) == len(set(names))
    products = [task for task in tasks if isinstance(task.kernel, LinearKernel)]
    counts = {(each.kernel.rows, each.kernel.columns, each.kernel.channels): each.count for each in products}
    # Two layers, in a decode step and in four chunks of 128 rows; buckets that 512 tokens do not take count nothing.
    assert counts[1, 160, 96] == 2 and counts[128, 160, 96] == 8
    assert counts[16, 160, 96] == 0
    # The head: a decode step, and the last row of each chunk.
    assert counts[1, 260, 96] == 5
    assert {task.kernel.context for task in tasks if hasattr(task.kernel, "kv_heads")} == {256}
    assert all(task.bytes >= task.cold_bytes for task in tasks)


def test_only_chooses_by_name(tasks):
    assert all("m128_" in task.name for task in chosen(tasks, "m128_"))
    with pytest.raises(AgqError, match="in the name of none of the"):
        chosen(tasks, "nonsense")


def record(kernel, seconds: float, decisions=None, version: int = VERSION, **changes) -> Record:
    task = make_task(kernel, "avx512vnni", DEVICE, 2)
    point = decisions or next(each for each in task.space.points() if each != task.space.default)
    origin = {"kernel_version": version, "threads": 2}
    made = Record(task.name, describe(kernel), "avx512vnni", point, (seconds,), None, "measured", None, origin)
    return replace(made, **changes)


def changed(kernel, **decisions) -> dict[str, int]:
    """Return the default of a kernel but for some decisions."""
    return linear_space.default(kernel, ISA) | decisions


def test_a_kernel_gets_the_best_record_the_nearest_or_the_default(tmp_path):
    library = Library(tmp_path, device=DEVICE.name)
    choose = Chooser(library, ISA, 2)
    assert choose(KERNEL) is None and choose.report()["default"] == 1
    near = record(replace(KERNEL, rows=32), 1e-3, changed(replace(KERNEL, rows=32), columns_first=1, vectors=2))
    library.append(near)
    library.append(record(replace(KERNEL, rows=64), 1e-9))
    assert choose(KERNEL) == changed(KERNEL, columns_first=1, vectors=2)
    assert choose.kernels[KERNEL.name]["schedule"] == "nearest"
    assert choose.kernels[KERNEL.name]["decisions"] == choose(KERNEL)
    own = record(KERNEL, 1e-2)
    library.append(own)
    assert choose(KERNEL) == own.decisions and choose.kernels[KERNEL.name]["schedule"] == "tuned"
    assert choose(replace(KERNEL, rows=1)) is None


def test_decisions_that_the_space_does_not_allow_are_not_used(tmp_path):
    library = Library(tmp_path, device=DEVICE.name)
    library.append(record(KERNEL, 1e-9, {"rows": 3}))
    library.append(record(replace(KERNEL, rows=32), 1e-9, {"rows": 3}))
    choose = Chooser(library, ISA, 2)
    assert choose(KERNEL) is None and choose.kernels[KERNEL.name]["schedule"] == "default"
    near = record(replace(KERNEL, rows=32), 1e-3, changed(replace(KERNEL, rows=32), unroll=2))
    own = record(KERNEL, 1e-3)
    library.append(near)
    assert choose(KERNEL) == changed(KERNEL, unroll=2)
    library.append(own)
    assert choose(KERNEL) == own.decisions and choose.kernels[KERNEL.name]["schedule"] == "tuned"


def test_of_a_like_kernel_is_taken_what_it_has_otherwise_than_its_own_default(tmp_path):
    """Codes of many rows are unpacked once by default, those of 8 are not: that stays, where tuning left it so."""
    isa, many, few = instruction_set("avx512vnni-xeon"), replace(KERNEL, rows=64), replace(KERNEL, rows=8)
    theirs, own = linear_space.default(many, isa), linear_space.default(few, isa)
    assert not theirs["inline"] and own["inline"]
    library = Library(tmp_path, device=DEVICE.name)
    origin = {"kernel_version": VERSION, "threads": 2}
    point = theirs | {"vectors": 2, "split": 1}
    library.append(Record("t", describe(many), isa.name, point, (1e-3,), None, "measured", None, origin))
    ((found, decisions),) = nearest(library, few, isa, 2)
    assert found.decisions == point and decisions == own | {"vectors": 2, "split": 1}
    assert nearest(library, replace(few, columns=1 << 20), isa, 2) == []


@pytest.mark.parametrize("changes", [{"heads": 3, "kv_heads": 4}, {"head_dim": 64.0}, {"rows": True}])
def test_descriptions_of_no_kernel_are_passed_over(tmp_path, changes):
    """A space is made of what a file says: nothing there may end the program."""
    kernel = tunable.specialized(AttentionKernel(1, 9, 3, 64, 1024, attention_form(ISA)), 1024)
    space = tunable.space_of(kernel, ISA, 2)
    library = Library(tmp_path, device=DEVICE.name)
    origin = {"kernel_version": tunable.version_of(kernel), "threads": 2}
    description = describe(kernel) | changes
    library.append(Record("t", description, ISA.name, space.default, (1e-3,), None, "measured", None, origin))
    assert nearest(library, kernel, ISA, 2) == []


@pytest.mark.parametrize("changes", [{"rows": "x"}, {"bits": -1}, {"class": "AttentionKernel"}, {"group_size": 0}])
def test_an_export_leaves_out_what_describes_no_kernel(tmp_path, changes):
    library, good = Library(tmp_path, device=DEVICE.name), record(KERNEL, 1e-3)
    library.append(good)
    library.append(replace(good, task="other", kernel=good.kernel | changes))
    found = export_schedules(str(tmp_path), DEVICE.name, str(tmp_path / "out"))
    assert (found["records"], found["left_out"]) == (1, 1)


def test_other_versions_are_ignored_with_a_word(tmp_path):
    library = Library(tmp_path, device=DEVICE.name)
    old = record(KERNEL, 1e-9, version=0)
    library.append(replace(old, task=old.task.rpartition(".")[0] + ".v0"))
    choose = Chooser(library, ISA, 2)
    assert choose(KERNEL) is None
    assert summary(choose.report()).endswith("; records ignored: 1 for other versions of the kernels")


def test_emulated_boards_are_ignored_with_a_word(tmp_path):
    library = Library(tmp_path, device=DEVICE.name)
    made = record(KERNEL, 1e-9)
    library.append(replace(made, provenance=made.provenance | {"emulated": True}))
    choose = Chooser(library, ISA, 2)
    assert choose(KERNEL) is None
    assert "records ignored: 1 of emulated boards" in summary(choose.report())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_limit_is_measured_before_any_candidate_is():
    asked = []
    Lines(lambda task: asked.append(task), stream=Terminal()).update(
        Progress(make_task(KERNEL, "avx512vnni", DEVICE, 2), 20)
    )
    assert len(asked) == 1


def test_the_line_of_a_task_says_where_it_is():
    task = make_task(KERNEL, "avx512vnni", DEVICE, 2)
    progress = Progress(task, 20, known=7, failures=2, best=2e-6, default=3e-6, time_left=3725)
    stream = Terminal()
    lines = Lines(lambda _: 1e-6, stream=stream)
    lines.update(progress)
    lines.finish(progress)
    shown = stream.getvalue()
    words = ("7/20", "best 2 µs", "262.1 GOP/s", "50 % of the limit", "default 3 µs", "2 failed", "1:02:05 left in all")
    assert all(word in shown for word in words)
    assert shown.count("\n") == 1 and shown.startswith("\r\x1b[2K")
    assert "µs" not in Lines(meaningful=False).line(progress)


@pytest.mark.parametrize("columns", [40, 120, 300])
def test_a_line_that_moves_does_not_wrap(columns, monkeypatch):
    """Only the row where the cursor stands is overwritten."""
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    progress = Progress(make_task(KERNEL, "avx512vnni", DEVICE, 2), 20, known=7, best=2e-6, default=3e-6, time_left=9)
    Lines(lambda _: 1e-6, stream=stream).update(progress)
    shown = stream.getvalue().removeprefix("\r\x1b[2K")
    assert shown.startswith("linear_w4a8g") and len(shown) < columns
    assert shown.endswith("0:09 left in all") == (columns > 40)
    Lines(lambda _: 1e-6, stream=stream).finish(progress)
    assert progress.task.name in stream.getvalue()


def test_a_word_takes_the_place_of_the_line_that_moves(monkeypatch):
    """Otherwise it would go on where that ends."""
    for stream, shown in ((Terminal(), "\r\x1b[2Ka word\n"), (io.StringIO(), "a word\n")):
        monkeypatch.setattr("sys.stderr", stream)
        say("a word")
        assert stream.getvalue() == shown
