"""Linking for this machine and for another one."""

import ctypes
import pickle

import pytest

from agq_tvm.errors import AgqError
from agq_tvm.targets import detect, link, load_device

SOURCE = "int answer(int x) { return x + 40; }\n"
FOREIGN = "snapdragon-870" if detect.machine() == "x86_64" else "x86-64-avx2"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.c"
    path.write_text(SOURCE)
    return path


def compiled(source, device):
    path = source.with_suffix(".o")
    link.zig_cc(device, ["-c", "-fPIC", "-O2", "-o", str(path), str(source)], "compile the test")
    return path


@pytest.mark.parametrize("system_compiler", [True, False])
def test_host_library_runs(tmp_path, source, monkeypatch, system_compiler):
    device = load_device("host")
    if not system_compiler:
        monkeypatch.setattr(link, "system_compiler", lambda: None)
    link.link_shared(tmp_path / "host.so", [compiled(source, device)], device)
    assert ctypes.CDLL(str(tmp_path / "host.so")).answer(2) == 42


def test_foreign_library_is_for_its_machine(tmp_path, source):
    device = load_device(FOREIGN)
    output = tmp_path / "foreign.so"
    link.exporter(device)(str(output), [str(compiled(source, device))])
    link.check_elf(output, device)
    assert b"libc++" not in output.read_bytes()
    with pytest.raises(AgqError, match=f"is not for {detect.machine()}"):
        link.check_elf(output, load_device("host"))


def test_object_of_another_machine_is_refused(tmp_path, source):
    with pytest.raises(AgqError, match=f"cannot link model.so for {FOREIGN}: "):
        link.link_shared(tmp_path / "model.so", [compiled(source, load_device("host"))], load_device(FOREIGN))


def test_compiler_error_is_told(tmp_path, source):
    source.write_text("int answer(")
    with pytest.raises(AgqError, match=r"cannot link model.so for .*error:.*parameter"):
        link.link_shared(tmp_path / "model.so", [source], load_device(FOREIGN))


def test_nothing_to_link(tmp_path):
    with pytest.raises(AgqError, match="there are no objects"):
        link.link_shared(tmp_path / "model.so", [], load_device("host"))


def test_compiler_that_never_ends_is_stopped(tmp_path, source, monkeypatch):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexec sleep 60\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(link, "system_compiler", lambda: str(compiler))
    monkeypatch.setattr(link, "_TIME_LIMIT", 0.2)
    with pytest.raises(AgqError, match="did not end within"):
        link.link_shared(tmp_path / "model.so", [source], load_device("host"))


@pytest.mark.parametrize("content", [b"", b"\x7fELF\x01\x01" + bytes(20), b"MZ" + bytes(40)])
def test_other_files_are_no_libraries(tmp_path, content):
    path = tmp_path / "model.so"
    path.write_bytes(content)
    with pytest.raises(AgqError, match="not a 64-bit little-endian ELF file"):
        link.check_elf(path, load_device("host"))


def test_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert link.cache_directory("zig") == tmp_path / "cache" / "agq_tvm" / "zig"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(AgqError, match="set XDG_CACHE_HOME"):
        link.cache_directory("zig")


def test_exporter_goes_to_worker_processes():
    export = link.exporter(load_device(FOREIGN))
    assert pickle.loads(pickle.dumps(export)) == export
    assert export.output_format == "so"
    assert not hasattr(export, "object_format")
