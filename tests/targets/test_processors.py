"""Which processors threads take, from trees as Linux has them."""

import os
from pathlib import Path

import pytest

from agq_tvm.targets.processors import alike, big_cores, parse_list, processor_quota, usable_processors


def tree(root: Path, **items: list) -> Path:
    """Write a file for each processor: capacity, frequency, siblings; None leaves it out."""
    paths = {
        "capacity": "cpu_capacity",
        "frequency": "cpufreq/cpuinfo_max_freq",
        "siblings": "topology/thread_siblings_list",
    }
    for item, values in items.items():
        for number, value in enumerate(values):
            path = root / f"cpu{number}" / paths[item]
            path.parent.mkdir(parents=True, exist_ok=True)
            if value is not None:
                path.write_text(f"{value}\n")
    return root


def numbers(processors) -> list[int]:
    return [each.number for each in processors]


def test_big_cores_come_first(tmp_path):
    # A Snapdragon 870: four small ones, three big ones, one a little bigger.
    system = tree(tmp_path, capacity=[250] * 4 + [780] * 3 + [1024], frequency=[1804800] * 4 + [2419200] * 4)
    processors = usable_processors(system, range(8))
    assert numbers(processors) == [7, 4, 5, 6, 0, 1, 2, 3]
    assert big_cores(processors) == 4
    assert numbers(alike(processors, 4)) == [7, 4, 5, 6]
    assert numbers(alike(processors, 2)) == [7, 4, 5, 6]  # two of the three big ones: the scheduler knows which
    assert numbers(alike(processors, 1)) == [7]
    assert numbers(alike(processors, 5)) == [7, 4, 5, 6, 0, 1, 2, 3]


def test_physical_cores_come_before_hyperthreads(tmp_path):
    pairs = tree(tmp_path / "pairs", frequency=[3500000] * 4, siblings=["0-1", "0-1", "2-3", "2-3"])
    assert numbers(usable_processors(pairs, range(4))) == [0, 2, 1, 3]
    halves = tree(tmp_path / "halves", frequency=[3500000] * 4, siblings=["0,2", "1,3", "0,2", "1,3"])
    processors = usable_processors(halves, range(4))
    assert numbers(processors) == [0, 1, 2, 3] and big_cores(processors) == 2
    assert numbers(alike(processors, 2)) == [0, 1]
    assert numbers(alike(processors, 3)) == [0, 1, 2, 3]


def test_a_hyperthread_whose_sibling_may_not_be_used_is_a_core(tmp_path):
    system = tree(tmp_path, siblings=["0,2", "1,3", "0,2", "1,3"])
    processors = usable_processors(system, [1, 2, 3])
    assert numbers(processors) == [1, 2, 3] and big_cores(processors) == 2


def test_fast_cores_then_slow_ones_then_hyperthreads(tmp_path):
    # Two fast cores of two threads, two slow cores of one; one fast core is allowed a little more.
    system = tree(tmp_path, frequency=[5000000] * 2 + [5200000] * 2 + [3900000] * 2, siblings=["0-1"] * 2 + ["2-3"] * 2)
    processors = usable_processors(system, range(6))
    assert numbers(processors) == [2, 0, 4, 5, 3, 1]
    assert numbers(alike(processors, 1)) == [2, 0]


def test_frequencies_count_where_a_capacity_is_missing(tmp_path):
    system = tree(tmp_path, capacity=[1024, None], frequency=[1500000, 1800000])
    assert numbers(usable_processors(system, [0, 1])) == [1, 0]


def test_what_linux_does_not_say_counts_as_alike(tmp_path):
    processors = usable_processors(tmp_path, [5, 3])
    assert numbers(processors) == [3, 5] and big_cores(processors) == 2


def test_only_processors_of_the_affinity_are_used():
    assert set(numbers(usable_processors())) == os.sched_getaffinity(0)


@pytest.mark.parametrize(
    ("text", "expected"), [("0-3,8", [0, 1, 2, 3, 8]), ("5\n", [5]), ("", []), ("a-b", []), ("3-", [3]), ("-3", [])]
)
def test_lists(text, expected):
    assert parse_list(text) == expected


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "250000 100000"}, 1),  # less than one is one
        ("0::/elsewhere", {"cpu.max": "300000 100000"}, 3),  # a container sees its own group as the root
        ("0::/a", {"a/cpu.max": "max 100000"}, None),
        (
            "4:cpu,cpuacct:/a\n0::/",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "400000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("3:memory:/a", {"memory/a/cpu.cfs_quota_us": "100000", "memory/a/cpu.cfs_period_us": "100000"}, None),
        ("", {}, None),
        ("no group", {}, None),
    ],
)
def test_quotas_of_control_groups(tmp_path, groups, files, expected):
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert processor_quota(tmp_path / "groups", tmp_path / "mount") == expected
