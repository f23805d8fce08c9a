"""Times and shares against the bounds that are asked for."""

import pytest

from benchmarks.kernels.verdict import verdicts


def row(engine, kind, rows, milliseconds, share=50.0, threads=1):
    unit = "GB/s" if rows == 1 else "GOP/s"
    found = {"engine": engine, "kind": kind, "threads": threads, "shape": "8x8", "rows": rows, "unit": unit}
    return {**found, "milliseconds": milliseconds, "share_percent": share}


def judged(*rows):
    return {each["what"]: each for each in verdicts(list(rows))}


def test_only_the_fastest_of_the_class_counts():
    found = judged(
        row("agq_tvm g32", "g32", 1, 2.0),
        row("slow", "g32", 1, 4.0),
        row("fast", "g32", 1, 3.0),
        row("another class", "g128", 1, 1.0),
        row("another number of rows", "g32", 16, 1.0),
        row("more threads", "g32", 1, 1.0, threads=2),
    )
    against = found["times the fastest g32"]
    assert (against["beside"], against["value"], against["met"]) == ("fast", 1.5, True)


@pytest.mark.parametrize(
    "rows,milliseconds,met",
    [(1, 1.0, False), (1, 1.001, True), (16, 1.2, True), (16, 1.19, False), (128, 1.25, True), (128, 1.24, False)],
)
def test_bounds_against_four_bit_engines(rows, milliseconds, met):
    found = judged(row("agq_tvm g128", "g128", rows, 1.0), row("other", "g128", rows, milliseconds))
    assert found["times the fastest g128"]["met"] is met


def test_int8_engines_count_at_many_rows_only():
    others = [row("other", "int8", rows, 0.9) for rows in (1, 16, 128)]
    for rows in (1, 16):
        assert "times the fastest int8" not in judged(row("agq_tvm g32", "g32", rows, 1.0), *others)
    assert judged(row("agq_tvm g32", "g32", 128, 1.0), *others)["times the fastest int8"]["met"] is False
    assert judged(row("agq_tvm g32", "g32", 128, 0.8), *others)["times the fastest int8"]["met"] is True


@pytest.mark.parametrize(
    "rows,kind,share,met",
    [(1, "g32", 85, True), (1, "g128", 84, False), (128, "g32", 75, True), (128, "g128", 89, False)],
)
def test_shares_of_the_limits(rows, kind, share, met):
    (found,) = verdicts([row(f"agq_tvm {kind}", kind, rows, 1.0, float(share))])
    assert found["met"] is met and found["what"].startswith("% of the limit")


def test_nothing_is_said_of_what_was_not_measured():
    assert verdicts([row("other", "g32", 1, 1.0)]) == []
    assert verdicts([row("agq_tvm g32", "g32", 16, 1.0)]) == []
    assert verdicts([row("agq_tvm g32", "g32", 1, 1.0, None)]) == []
