"""A candidate is held against the default by turns of one board."""

import pytest

from agq_tvm.tuning.confirm import Turn, verdict


def turns(*seconds: float, boards: str = "") -> list[Turn]:
    names = boards or "-" * len(seconds)
    return [Turn([each], {"board": board, "hot": each > 9}) for each, board in zip(seconds, names, strict=True)]


def test_faster_in_every_turn_is_beyond_doubt():
    seconds, about = verdict(turns(2, 4, 6), turns(1, 3, 5))
    assert seconds == [1, 3, 5] and about["default_seconds"] == 4
    assert "doubtful" not in about and not about["hot"]


@pytest.mark.parametrize("own", [(1, 3, 6), (1, 1, 7), (2, 4, 6)])
def test_faster_in_most_turns_is_in_doubt(own):
    assert verdict(turns(2, 4, 6), turns(*own))[1]["doubtful"]


def test_the_default_is_never_in_doubt():
    default = turns(2, 4, 6)
    seconds, about = verdict(default, default)
    assert seconds == [2, 4, 6] and about["default_seconds"] == 4 and "doubtful" not in about


def test_turns_on_other_boards_do_not_count():
    """A slow board that measured more of the candidate's turns would make a faster one look slower."""
    seconds, about = verdict(turns(2, 20, 2, boards="ABA"), turns(10, 1, 10, boards="BAB"))
    assert (seconds, about["default_seconds"], about["board"]) in (([1], 2, "A"), ([10, 10], 20, "B"))
    assert "doubtful" not in about
    assert verdict(turns(2, 2, boards="AA"), turns(1, 1, boards="BB")) is None


def test_one_hot_turn_makes_it_hot():
    assert verdict(turns(20, 20), turns(10, 1))[1]["hot"]
