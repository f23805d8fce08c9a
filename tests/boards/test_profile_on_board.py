"""A profile of an emulated board: every kernel runs there, and no time is told."""

import json

import pytest

from agq_tvm.boards.tracker import board_is_emulated
from agq_tvm.cli.main import main
from agq_tvm.errors import AgqError
from agq_tvm.flow.profile import PICTURE, profile
from agq_tvm.flow.profile_file import read_profile

pytestmark = pytest.mark.emulator


def test_emulated_board(boards, tiny_checkpoint, tmp_path, capsys):
    with boards.session("raspberry-pi-4") as session:
        assert board_is_emulated(session)
    place = ("--target", "raspberry-pi-4", "--tracker", boards.tracker)
    command = ["profile", str(tiny_checkpoint), *place, "--rows", "8", "--cache", "int8", "-o", str(tmp_path / "p")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "time means nothing" in printed and "µs" not in printed
    assert not (tmp_path / "p" / PICTURE).exists()
    read = read_profile(tmp_path / "p")
    assert read.emulated and read.board == "raspberry-pi-4" and list(read.operations) == [8]
    assert all(operation.seconds == operation.spread == {} for operation in read.operations[8])
    assert read.proposal.four_bit == () and read.cache == "int8" and read.weight_stream() == {}
    assert {"embedding", "qkv", "attention", "head"} < {operation.name for operation in read.operations[8]}
    assert "e-0" not in json.dumps(read.as_dict())  # as small numbers, such as times, are written


def test_kernels_of_a_better_device_are_refused(boards, tiny_checkpoint, tmp_path):
    with pytest.raises(AgqError, match="kernels for snapdragon-870 do not run on a processor without asimddp"):
        profile(tiny_checkpoint, "snapdragon-870", tmp_path / "p", boards.tracker, "raspberry-pi-4")
    assert list(tmp_path.iterdir()) == []
