"""Loading a bundle checks all of it and refuses in one sentence."""

import json
import shutil

import numpy as np
import pytest

from agq_tvm.errors import AgqError
from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.engine import LocalSession
from agq_tvm.runtime.virtual_machine import ALIGNMENT


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def change_manifest(bundle, change) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def flip_byte(path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def load(bundle):
    loaded = Bundle(bundle)
    return loaded.arrays()


def test_good_bundle(tiny_bundle):
    bundle = Bundle(tiny_bundle)
    arrays = bundle.arrays()
    assert all(p.offset % ALIGNMENT == 0 for p in bundle.parameters)
    assert set(arrays) == {p.name for p in bundle.parameters}
    assert all(array.ctypes.data % ALIGNMENT == 0 for array in arrays.values())
    assert np.isfinite(arrays["final_norm.weight"]).all()


@pytest.mark.parametrize("name", ["model.so", "params.bin", "tokenizer.json", "manifest.json"])
def test_missing_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(AgqError, match=f"{name}.* is missing"):
        load(copy)


@pytest.mark.parametrize("name", ["model.so", "params.bin", "tokenizer.json", "manifest.json"])
def test_truncated_file(copy, name):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AgqError, match=r"bytes instead of|not valid JSON"):
        load(copy)


@pytest.mark.parametrize("name", ["model.so", "params.bin", "tokenizer.json"])
def test_tampered_file(copy, name):
    flip_byte(copy / name, 1000)
    with pytest.raises(AgqError, match="another checksum; compile it again"):
        load(copy)


CHANGES = {
    "format": (lambda m: m.update(format_version=2), "has format 2"),
    "tvm": (lambda m: m["versions"].update(tvm="0.1"), "compiled with tvm 0.1"),
    "no device": (lambda m: m.pop("device"), "manifest lacks or garbles"),
    "shape": (lambda m: m["parameters"][3].update(shape=[1 << 39, 1 << 39]), "manifest lacks or garbles"),
    "negative shape": (lambda m: m["parameters"][3].update(shape=[-1]), "manifest lacks or garbles"),
    "offset": (lambda m: m["parameters"][3].update(offset=0), "the place of"),
    "type": (lambda m: m["parameters"][3].update(dtype="object"), "a type"),
    "context": (lambda m: m.update(context=-5), "a size"),
    "caches": (lambda m: m.update(caches=[["x", [1], "float64"]]), "a type"),
    "file elsewhere": (lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}}), "is missing"),
    "list": (lambda m: m.update(device=[]), "manifest lacks or garbles"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_bad_manifest(copy, name):
    change, message = CHANGES[name]
    change_manifest(copy, change)
    with pytest.raises(AgqError, match=message):
        load(copy)


def test_bundle_for_another_processor(copy):
    change_manifest(copy, lambda m: m["device"]["features"].append("asimddp"))
    with pytest.raises(AgqError, match="needs asimddp, which this processor lacks"):
        LocalSession(Bundle(copy))
    change_manifest(copy, lambda m: m["device"].update(machine="riscv64"))
    with pytest.raises(AgqError, match="is for riscv64"):
        LocalSession(Bundle(copy))


def test_not_a_bundle(tmp_path):
    with pytest.raises(AgqError, match="is not a bundle"):
        Bundle(tmp_path / "nothing")
    with pytest.raises(AgqError, match=r"manifest\.json is missing"):
        Bundle(tmp_path)
