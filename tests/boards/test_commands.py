"""`agq boards`, as it is typed."""

import argparse
import json

import pytest

from agq_tvm.boards import emulate, tracker
from agq_tvm.cli.boards import register
from agq_tvm.errors import AgqError


def agq(*words: str) -> int:
    parser = argparse.ArgumentParser("agq")
    register(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["boards", *words])
    return arguments.run(arguments)


@pytest.mark.emulator
def test_start_list_stop(own_state, capsys):
    assert agq("emulate", "list") == 0
    assert "no emulated board runs" in capsys.readouterr().out
    assert agq("emulate", "start", "raspberry-pi-4") == 0
    first = capsys.readouterr().out
    assert agq("emulate", "start", "raspberry-pi-4", "--key", "second") == 0
    second = capsys.readouterr().out
    assert agq("emulate", "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(entry["name"], entry["registered"]) for entry in listed] == [
        ("tracker", True),
        ("raspberry-pi-4", True),
        ("second", True),
    ]
    address = listed[0]["tracker"]
    assert f"--tracker {address} --key raspberry-pi-4" in first
    assert f"--tracker {address} --key second" in second
    assert sorted(tracker.tracker_summary(*tracker.parse_tracker(address))) == ["raspberry-pi-4", "second"]

    assert agq("emulate", "stop", "second") == 0
    assert capsys.readouterr().out == "stopped second\n"
    assert agq("emulate", "list") == 0
    table = capsys.readouterr().out
    assert "second" not in table
    assert table.splitlines()[2].split()[-1] == "registered"
    with pytest.raises(AgqError, match="no emulated board 'second' runs here; running: tracker, raspberry-pi-4"):
        agq("emulate", "stop", "second")
    assert agq("emulate", "stop", "all") == 0
    assert emulate.list_boards() == []
    assert agq("emulate", "stop", "all") == 0
    assert capsys.readouterr().out.endswith("nothing was running\n")


@pytest.mark.emulator
def test_own_tracker_ends_when_the_board_does_not_come_up(own_state):
    with pytest.raises(AgqError, match="a key is up to 64 letters"):
        agq("emulate", "start", "raspberry-pi-4", "--key", "a b")
    assert emulate.list_boards() == []


@pytest.mark.emulator
def test_server_folder_for_a_real_board(emulator, tmp_path, capsys):
    assert agq("server", "raspberry-pi-4", "-o", str(tmp_path / "server")) == 0
    assert "--key raspberry-pi-4 --tracker HOST:PORT" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "server").iterdir() if not path.name.startswith("."))
    assert names == ["board-server", "libtvm_ffi.so", "libtvm_runtime.so", "libtvm_runtime_extra.so"]


def test_missing_emulator_is_told_with_the_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(emulate.shutil, "which", lambda name: None)
    with pytest.raises(AgqError, match="need qemu-aarch64: install it with: apt-get install qemu-user"):
        emulate.find_emulator()
    monkeypatch.undo()
    monkeypatch.setattr(emulate.shutil, "which", lambda name: "/usr/bin/qemu-aarch64")
    monkeypatch.setattr(emulate, "_SYSROOT", tmp_path)
    with pytest.raises(AgqError, match=r"ld-linux-aarch64\.so\.1: install it with: apt-get install"):
        emulate.find_emulator()


def test_unknown_device_is_told():
    with pytest.raises(AgqError, match="unknown device 'pi'"):
        agq("emulate", "start", "pi")
