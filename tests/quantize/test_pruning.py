"""The pruning schedule and the choice of rows."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agq_tvm.errors import AgqError
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.pruning import PruningSchedule, read_schedule, select

SCHEDULES = st.builds(
    PruningSchedule,
    st.sets(st.integers(1, 40), min_size=1, max_size=6).map(lambda layers: tuple(sorted(layers))),
    st.floats(1e-12, 1 - 1e-12),
)


def test_the_published_example():
    schedule = PruningSchedule((10, 11, 12), 0.9)
    assert schedule.counts(2048) == (2048, 951, 442, 206)
    assert schedule.gamma == pytest.approx(0.5358, abs=1e-4)
    assert schedule.sparsity(2048, 12) == pytest.approx(0.185, abs=1e-3)


@settings(max_examples=200, deadline=None)
@given(SCHEDULES, st.integers(1, 4096))
def test_counts_fall_and_never_below_what_always_stays(schedule, rows):
    counts = schedule.counts(rows)
    assert counts[0] == rows and len(counts) == len(schedule.layers) + 1
    assert all(min(2, rows) <= after <= before for before, after in pairwise(counts))
    for before, after in pairwise(counts):
        assert after in (before - int(before * schedule.gamma), 2)
    # A chunk that is not full needs no more room than a full one.
    assert all(few <= many for few, many in zip(counts, schedule.counts(rows + 1), strict=True))


@settings(max_examples=50, deadline=None)
@given(SCHEDULES, st.integers(40, 60), st.integers(1, 500))
def test_sparsity_is_the_sum_over_layers(schedule, num_layers, rows):
    counts, left, dropped = schedule.counts(rows), 0, 0
    for layer in range(1, num_layers + 1):
        left += layer in schedule.layers
        dropped += rows - counts[left]
    assert schedule.sparsity(rows, num_layers) == dropped / (rows * num_layers)


def test_most_of_a_long_prompt_goes_as_asked():
    for beta in (0.1, 0.5, 0.9):
        for layers in ((3,), (8, 16, 24)):
            assert PruningSchedule(layers, beta).counts(10**6)[-1] == pytest.approx(10**6 * (1 - beta), rel=1e-4)


def test_a_tiny_share_prunes_nothing():
    assert PruningSchedule((1, 2), 1e-20).counts(4096) == (4096, 4096, 4096)
    assert PruningSchedule((1, 2), 0.01).counts(100) == (100, 100, 100)


@pytest.mark.parametrize(
    ("layers", "beta", "words"),
    [
        ((), 0.5, "needs layers"),
        ((3, 2), 0.5, "3,2 are not rising"),
        ((2, 2), 0.5, "not rising"),
        ((0, 2), 0.5, "from 1 on"),
        (("1",), 0.5, "not rising"),
        ((True,), 0.5, "not rising"),
        ((1,), 0.0, "0.0 is not between"),
        ((1,), 1.0, "not between"),
        ((1,), float("nan"), "not between"),
        ((1,), "0.5", "not between"),
    ],
)
def test_schedules_that_mean_nothing(layers, beta, words):
    with pytest.raises(AgqError, match=words):
        PruningSchedule(layers, beta)


def test_a_layer_beyond_the_model():
    schedule = PruningSchedule((2, 13), 0.5)
    schedule.check_layers(13)
    with pytest.raises(AgqError, match="layer 13 does not exist: the model has layers 1 to 12"):
        schedule.check_layers(12)


def test_positions_are_kept_unless_a_checkpoint_says_otherwise():
    value = {"layers": [1], "beta": 0.5}
    assert read_schedule(value) == PruningSchedule((1,), 0.5, False)
    assert read_schedule(value | {"renumber": True}) == PruningSchedule((1,), 0.5, True)
    with pytest.raises(AgqError, match="renumber must be true or false, not 1"):
        read_schedule(value | {"renumber": 1})


@pytest.mark.parametrize(
    "value",
    [
        [],
        5,
        {"layers": [1]},
        {"layers": [1], "renumber": True},
        {"layers": [1], "beta": 0.5, "more": 1},
        {"layers": "12", "beta": 0.5},
        {"layers": [], "beta": 0.5},
    ],
)
def test_what_is_no_schedule(value):
    with pytest.raises(AgqError):
        read_schedule(value)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=30), st.data())
def test_the_choice_is_the_best_and_of_equals_the_earliest(scores, data):
    keep = data.draw(st.integers(2, len(scores)))
    always = (0, len(scores) - 1)
    chosen = select(np.array(scores, "float32"), keep, always)
    assert len(chosen) == keep and (np.diff(chosen) > 0).all() and {*always} <= {*chosen.tolist()}
    for row in set(chosen.tolist()) - {*always}:
        for other in set(range(len(scores))) - set(chosen.tolist()):
            assert (-scores[row], row) < (-scores[other], other)


def test_the_scores_are_left_as_they_were():
    scores = np.array([1.0, 3.0, 2.0])
    np.testing.assert_array_equal(select(scores, 2, [2]), [1, 2])
    np.testing.assert_array_equal(scores, [1.0, 3.0, 2.0])


def test_a_checkpoint_keeps_its_schedule(quantized, tmp_path):
    schedule = PruningSchedule((1, 2), 0.25)
    path = quantized(pruning=schedule)
    assert read_checkpoint(path).scheme.pruning == schedule
    assert read_checkpoint(quantized()).scheme.pruning is None
    raw = json.loads((path / "config.json").read_text())
    assert raw["quantization_config"]["pruning"] == {
        "layers": [1, 2],
        "beta": 0.25,
        "renumber": False,
    }
    for pruning, words in (({"layers": [3], "beta": 0.5}, "layer 3 does not exist"), (7, "neither null")):
        raw["quantization_config"]["pruning"] = pruning
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(AgqError, match=words):
            read_checkpoint(tmp_path)


def test_quantizing_refuses_a_layer_beyond_the_model(quantized):
    with pytest.raises(AgqError, match="layer 3 does not exist"):
        quantized(pruning=PruningSchedule((3,), 0.5))
