"""The library of tuned schedules: what is in a file stays there, and nothing else gets out of it."""

import json
import multiprocessing
import os
import resource
import signal
from dataclasses import replace

import pytest

from agq_tvm.cli.main import main
from agq_tvm.errors import AgqError
from agq_tvm.flow.schedule_library import list_schedules, merge_schedules, prune_schedules
from agq_tvm.kernels.record import Record, parse_record
from agq_tvm.kernels.record_file import RECORDS, RecordFile
from agq_tvm.kernels.record_library import Library
from agq_tvm.kernels.tunable import VERSIONS

NOW = VERSIONS["LinearKernel"]
KERNEL = {"class": "LinearKernel", "rows": 16, "columns": 64, "channels": 64, "bits": 4}


def record(point: int = 0, seconds=(1e-3,), task: str = "task", how: str = "measured", **provenance) -> Record:
    error = None if seconds else "wrong: it differs"
    origin = {"kernel_version": NOW, "threads": 2} | provenance
    return Record(task, KERNEL, "avx2", {"rows": point}, seconds, error, how, None, origin)


def library(folder) -> Library:
    return Library(folder, device="x86-64-avx2")


def test_another_processor_has_records_of_its_own(tmp_path):
    """Both may be in one file, of a shared home or merged: neither may keep the other's from being written."""
    mine = library(tmp_path)
    assert mine.append(record(1, cpu="fast")) and mine.append(record(1, (9e-3,), cpu="slow"))
    assert not mine.append(record(1, (8e-3,), cpu="slow"))
    other = library(tmp_path / "other")
    other.append(record(1, (1e-6,), cpu="slow"))
    merge_schedules([str(tmp_path / "other")], str(tmp_path))
    assert {each.cpu: each.time for each in library(tmp_path).read()} == {"fast": 1e-3, "slow": 1e-6}


def test_the_default_comes_before_what_was_not_faster_in_every_turn(tmp_path):
    mine = library(tmp_path)
    mine.append(record(0, (2e-3,), default_seconds=2e-3))
    mine.append(record(1, (1e-3,), default_seconds=2e-3, doubtful=True))
    mine.append(record(2, (1e-6,)))
    assert mine.best("task").decisions == {"rows": 0}
    mine.append(record(3, (1.9e-3,), default_seconds=2e-3))
    assert mine.best("task").decisions == {"rows": 3}


def test_what_is_added_is_read_again_once(tmp_path):
    mine = library(tmp_path)
    assert mine.append(record(1)) and mine.append(record(2, None))
    assert not mine.append(record(1, (5e-4,)))
    assert library(tmp_path).read() == [record(1), record(2, None)]


def test_a_reader_sees_what_others_add(tmp_path):
    reader, writer = library(tmp_path), library(tmp_path)
    assert reader.read() == []
    for point in range(3):
        writer.append(record(point))
        assert len(reader.read()) == point + 1


def test_a_reader_sees_every_replacement(tmp_path):
    """The file that replaces a second time may get the inode of the first."""
    reader, writer = library(tmp_path), library(tmp_path)
    for point in range(4):
        writer.append(record(point))
    for added in (5, 6, 7):
        before = reader.read()
        for new in (record(added), record(added + 10)):
            writer.files[0].replace(lambda records, new=new: [new, *records])
        assert reader.read() == library(tmp_path).read() == [record(added + 10), record(added), *before]
        assert reader.problems == []


@pytest.mark.parametrize("cut", (1, 2, 40))
def test_a_torn_last_line_is_not_read_and_gives_way_to_the_next(tmp_path, cut):
    mine = library(tmp_path)
    mine.append(record(1))
    path = mine.files[0].path
    whole = path.read_bytes()
    torn = record(2).line()[:-cut]
    path.write_bytes(whole + torn)
    again = library(tmp_path)
    kept = [record(1), record(2)] if cut == 1 else [record(1)]  # only the end of the line is missing
    assert again.read() == kept and again.problems == []
    again.append(record(3))
    assert library(tmp_path).read() == [*kept, record(3)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def broken(**changes) -> bytes:
    return json.dumps(json.loads(record().line()) | changes).encode()


@pytest.mark.parametrize(
    "line",
    (
        b"[]",
        b"{}",
        b"nonsense",
        b"[" * 100_000,
        b"\xff\xfe",
        broken(seconds=[]),
        broken(seconds=[-1.0]),
        broken(seconds=[True]),
        broken(seconds=["1"]),
        broken(seconds=None),
        broken(error="both"),
        broken(decisions={"rows": 1.5}),
        broken(decisions={"rows": True}),
        broken(decisions=[1]),
        broken(how="guessed"),
        broken(kernel={}),
        broken(task=""),
        broken(provenance=None),
        broken(record="trace"),
        broken(extra=1),
        broken(task="\ud800"),
        broken(task="two\nlines"),
        broken(seconds=[10**400]),
        broken(provenance={"default_seconds": 10**400}),
        broken(provenance={"threads": 10**400}),
        broken(provenance={"deep": json.loads("[" * 600 + "]" * 600)}),
        broken(kernel=KERNEL | {"columns": 1 << 40}),
        broken(kernel=KERNEL | {"bits": -(1 << 40)}),
        broken(kernel=KERNEL | {"columns": float("inf")}),
        record().line().replace(b"0.001", b"Infinity"),
        record().line().replace(b"0.001", b"NaN"),
    ),
)
def test_lines_that_are_no_records_are_left_out_with_a_word(tmp_path, line):
    mine = library(tmp_path)
    mine.append(record(1))
    with open(mine.files[0].path, "ab") as file:
        file.write(line + b"\n" + record(2).line())
    assert mine.read() == [record(1), record(2)]
    assert len(mine.problems) == 1 and "line 2" in mine.problems[0]
    with pytest.raises(AgqError):
        parse_record(line)


def test_a_file_that_is_one_endless_line_is_refused(tmp_path):
    mine = library(tmp_path)
    mine.append(record(1))
    with open(mine.files[0].path, "ab") as file:
        file.write(b"x" * (2 << 20))
    with pytest.raises(AgqError, match="too long"):
        mine.read()


def test_measured_comes_before_simulated_and_confirmed_before_both(tmp_path):
    mine = library(tmp_path)
    assert mine.best("task") is None
    mine.append(record(0, None))
    assert mine.best("task") is None
    for number, each in enumerate((record(1, (1e-9,), how="simulated"), record(2, (3e-3,)), record(3, (2e-3,)))):
        mine.append(each)
        assert mine.best("task").decisions["rows"] == number + 1
    mine.append(record(4, (1e-6,), emulated=True))
    assert mine.best("task").decisions["rows"] == 3
    mine.append(record(5, (4e-3,), default_seconds=4.4e-3))
    assert mine.best("task").decisions["rows"] == 5


def test_the_best_of_confirmed_ones_gained_most_over_the_default_of_its_own_turns(tmp_path):
    """Times of different runs do not compare."""
    mine = library(tmp_path)
    mine.append(record(1, (2e-3,), default_seconds=2e-3))
    mine.append(record(2, (4e-3,), default_seconds=5e-3))
    assert mine.best("task").decisions["rows"] == 2 and mine.best("task").gain == pytest.approx(1.25)
    mine.append(record(3, (1e-3,), default_seconds=0.9e-3))
    assert mine.best("task").decisions["rows"] == 2


@pytest.mark.parametrize("seconds", [True, "1", 0, -1.0, float("nan"), None])
def test_what_is_no_time_of_the_default_confirms_nothing(seconds):
    assert not record(1, (1e-3,), default_seconds=seconds).confirmed


def test_what_one_has_measured_oneself_comes_before_other_libraries_and_only_the_first_is_written(tmp_path):
    """A device's name does not tell its processor: a faster one would win with what is slow on this one."""
    other = library(tmp_path / "other")
    other.append(record(1, (1e-4,), cpu="fast"))
    both = Library(tmp_path / "mine", tmp_path / "other", device="x86-64-avx2")
    both.append(record(2, (1e-5,), how="simulated", cpu="fast"))
    assert both.best("task").decisions == {"rows": 1}
    both.append(record(3, (1e-3,), cpu="slow"))
    other.append(record(4, (1e-4,), default_seconds=1e-3, cpu="fast"))
    assert both.best("task").decisions == {"rows": 3}
    assert [each.decisions for each in both.nearest(KERNEL, "avx2", 2, NOW)] == [{"rows": 3}]
    other.append(record(5, (5e-4,), cpu="slow"))  # on one's own processor, somebody else
    assert both.best("task").decisions == {"rows": 5}
    assert len(library(tmp_path / "other").read()) == 3
    assert library(tmp_path / "mine").best("task").decisions == {"rows": 3}


def test_the_nearest_is_of_a_like_kernel(tmp_path):
    mine = library(tmp_path)

    def add(point, version=NOW, **fields):
        each = replace(record(point, task=f"task{point}", kernel_version=version), kernel=KERNEL | fields)
        mine.append(each)

    add(1, rows=64)
    add(2, rows=32)
    add(3, rows=1)  # decode is another matter
    add(4, bits=8)
    add(5, columns=4096)  # too far
    add(6, version=NOW + 1)
    near = mine.nearest(KERNEL, "avx2", 2, NOW)
    assert [each.decisions["rows"] for each in near] == [2, 1]
    assert mine.nearest(KERNEL, "neon", 2, NOW) == []


def append_many(folder, first: int, barrier) -> None:
    mine = library(folder)
    barrier.wait()
    for point in range(first, first + 60):
        mine.append(record(point))


def test_two_processes_add_to_one_file(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    children = [context.Process(target=append_many, args=(tmp_path, first, barrier)) for first in (0, 30)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    points = [each.decisions["rows"] for each in library(tmp_path).read()]
    assert sorted(points) == list(range(90))


def fill_the_disk(folder) -> None:
    """Add records until no more fit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    mine = library(folder)
    try:
        for point in range(1000):
            mine.append(record(point))
    except AgqError as error:
        os._exit(0 if "cannot write" in str(error) and RECORDS in str(error) else 1)
    os._exit(2)


def test_a_record_that_does_not_fit_on_the_disk_leaves_the_others_whole(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=fill_the_disk, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    mine = library(tmp_path)
    count = len(mine.read())
    assert count > 3 and mine.problems == []
    assert mine.files[0].path.read_bytes().endswith(b"\n")
    assert mine.append(record(5000))
    assert len(library(tmp_path).read()) == count + 1


def test_merging_keeps_the_better_of_each(tmp_path):
    mine, other = library(tmp_path / "mine"), library(tmp_path / "other")
    for each in (record(1, (2e-3,)), record(2, (1e-3,)), record(3, None)):
        mine.append(each)
    for each in (record(1, (1e-3,)), record(2, (2e-3,)), record(3, (3e-3,)), record(4)):
        other.append(each)
    result = merge_schedules([str(tmp_path / "other")], str(tmp_path / "mine"))
    assert (result["added"], result["replaced"]) == (1, 2)
    times = {each.decisions["rows"]: each.time for each in library(tmp_path / "mine").read()}
    assert times == {1: 1e-3, 2: 1e-3, 3: 3e-3, 4: 1e-3}
    assert merge_schedules([str(tmp_path / "other")], str(tmp_path / "mine"))["added"] == 0
    with open(mine.files[0].path, "ab") as file:
        file.write(b"\xff of a later program\n")
    other.append(record(5))
    merge_schedules([str(tmp_path / "other")], str(tmp_path / "mine"))
    assert len(library(tmp_path / "mine").read()) == 5
    assert mine.files[0].path.read_bytes().endswith(b"\xff of a later program\n")
    with pytest.raises(AgqError, match="no library"):
        merge_schedules([str(tmp_path / "nothing")], str(tmp_path / "mine"))


def test_pruning_leaves_the_best_of_each_task(tmp_path):
    mine = library(tmp_path)
    for point in range(5):
        mine.append(record(point, (1e-3 * (point + 1),)))
    mine.append(record(9, None))
    mine.append(record(10, (1e-9,), kernel_version=NOW - 1))
    mine.append(record(11, task="another"))
    mine.append(record(12, (1e-9,), kernel_version=999))  # of a later program: ours cannot use it, nor does it count
    mine.append(record(13, (9e-3,), cpu="another"))
    with open(mine.files[0].path, "ab") as file:
        file.write(b"of a later program\n")
    removed = prune_schedules(str(tmp_path), keep=2)
    assert (removed["kept"], removed["removed"], len(removed["left_out"])) == (5, 5, 1)
    assert sorted(each.decisions["rows"] for each in mine.read()) == [0, 1, 11, 12, 13]
    assert b"of a later program\n" in mine.files[0].path.read_bytes()
    listed = list_schedules(str(tmp_path), None)["devices"]["x86-64-avx2"]
    assert [task["task"] for task in listed["tasks"]] == ["another", "task"]
    with pytest.raises(AgqError, match="no schedules for 'x86-64', only for x86-64-avx2"):
        list_schedules(str(tmp_path), "x86-64")


def test_a_list_tells_of_emulated_boards(tmp_path, capsys):
    """They have no row: without a word they would seem to be lost."""
    library(tmp_path).append(record(1, emulated=True))
    main(["schedules", "list", "--library", str(tmp_path)])
    assert "x86-64-avx2 has a record of emulated boards" in capsys.readouterr().out
    library(tmp_path).append(record(2, emulated=True))
    main(["schedules", "list", "--library", str(tmp_path)])
    assert "x86-64-avx2 has 2 records of emulated boards" in capsys.readouterr().out


def append_later(folder, begun) -> None:
    begun.set()
    library(folder).append(record(2))


def test_a_record_added_while_the_file_is_replaced_is_not_lost(tmp_path):
    mine, file = library(tmp_path), RecordFile(tmp_path / "x86-64-avx2" / RECORDS)
    mine.append(record(1))
    context = multiprocessing.get_context("spawn")  # a fork would hold the lock, too
    begun = context.Event()
    child = context.Process(target=append_later, args=(tmp_path, begun))

    def choose(records):
        child.start()
        assert begun.wait(60)
        child.join(0.5)  # it waits for the lock
        assert child.is_alive()
        return records

    file.replace(choose)
    child.join(60)
    assert child.exitcode == 0
    assert library(tmp_path).read() == [record(1), record(2)]
