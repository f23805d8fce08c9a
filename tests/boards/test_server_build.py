"""The board's runtime out of wheels, and the server's folder."""

import subprocess
import zipfile

import pytest

from agq_tvm.boards import runtime_files, server_build
from agq_tvm.errors import AgqError
from agq_tvm.targets import link, load_device

DEVICE = load_device("raspberry-pi-4")
ELF = b"\x7fELF\x02\x01" + bytes(12) + (183).to_bytes(2, "little") + bytes(44)


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path, monkeypatch):
    if "emulator" not in request.fixturenames:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fake_pip(monkeypatch, content: bytes = ELF, drop: str = "", rename: tuple[str, str] = ("", "")):
    """Replace pip by something that writes wheels; return the list of its commands."""
    commands = []

    def run(command, **_):
        commands.append(command)
        folder = command[command.index("--dest") + 1]
        for name, version in runtime_files.runtime_versions().items():
            wheel = f"{name.replace('-', '_')}-{version}-py3-none-manylinux_2_28_aarch64.whl".replace(*rename)
            with zipfile.ZipFile(f"{folder}/{wheel}", "w") as archive:
                for member in runtime_files._MEMBERS[name]:
                    if not drop or drop not in member:
                        archive.writestr(member, content)
        return subprocess.CompletedProcess(command, 0, b"")

    monkeypatch.setattr(link.subprocess, "run", run)
    return commands


def test_runtime_is_downloaded_once_with_exact_versions(monkeypatch):
    commands = fake_pip(monkeypatch)
    folder = runtime_files.runtime_folder(DEVICE)
    assert {name: (folder / name).read_bytes() for name in runtime_files.LIBRARIES} == dict.fromkeys(
        ("libtvm_runtime.so", "libtvm_runtime_extra.so", "libtvm_ffi.so"), ELF
    )
    assert runtime_files.runtime_folder(DEVICE) == folder
    (command,) = commands
    assert command[-2:] == [f"{name}=={version}" for name, version in runtime_files.runtime_versions().items()]
    assert "manylinux_2_28_aarch64" in command
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, "board-runtime.lock"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"drop": "_extra"}, "is not the wheel that was expected: .*libtvm_runtime_extra.so"),
        ({"content": b"no library"}, "not a 64-bit little-endian ELF file"),
        ({"content": ELF.replace(b"\xb7", b"\x3e")}, "is not for aarch64"),
        ({"rename": ("aarch64", "x86_64")}, "pip did not bring one apache-tvm "),
        ({"rename": ("-py3", ".1-py3")}, "pip did not bring one apache-tvm "),
    ],
)
def test_other_wheels_are_refused(monkeypatch, changes, told):
    fake_pip(monkeypatch, **changes)
    with pytest.raises(AgqError, match=told):
        runtime_files.runtime_folder(DEVICE)
    fake_pip(monkeypatch)
    assert runtime_files.runtime_folder(DEVICE).is_dir()


def test_words_of_pip_are_passed_on(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, b"Looking\nERROR: No matching distribution found\n")
    monkeypatch.setattr(link.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(AgqError, match="with pip: ERROR: No matching distribution found"):
        runtime_files.runtime_folder(DEVICE)


def test_server_is_built_again_when_anything_changes(monkeypatch, tmp_path):
    before = server_build._fingerprint(DEVICE)
    assert server_build._fingerprint(load_device("snapdragon-870")) == before
    monkeypatch.setattr(server_build, "runtime_versions", lambda: {"apache-tvm": "9"})
    assert server_build._fingerprint(DEVICE) != before
    monkeypatch.undo()
    for source in server_build._SOURCES.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(server_build, "_SOURCES", tmp_path)
    assert server_build._fingerprint(DEVICE) == before
    (tmp_path / "main.c").write_bytes((tmp_path / "main.c").read_bytes() + b"\n")
    assert server_build._fingerprint(DEVICE) != before


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--key is missing"),
        (["--key"], "a value is missing after --key"),
        (["--key", 'a"b'], 'not a"b'),
        (["--key", "k" * 65], "at most 64"),
        (["--key", "k", "--tracker", "host"], "--tracker must be HOST:PORT"),
        (["--key", "k", "--port", "70000"], "not a port: 70000"),
        (["--key", "k", "--colour", "red"], "unknown argument --colour"),
        (["--key", "k", "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
    ],
)
def test_wrong_arguments_of_the_server(emulator, tmp_path_factory, arguments, told):
    server = server_build.server_folder(DEVICE) / server_build.SERVER
    command = [emulator, "-cpu", "cortex-a72", "-L", "/usr/aarch64-linux-gnu", str(server), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode in (1, 2)
    assert told in result.stderr
