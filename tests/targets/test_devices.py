"""Every shipped device, and what a wrong device file is told."""

from pathlib import Path

import pytest

from agq_tvm.errors import AgqError
from agq_tvm.targets import device_names, known, load_device
from agq_tvm.targets.device import DEVICES

EXPECTED = {
    "generic-aarch64": ("generic", 4),
    "generic-x86-64": ("generic", 4),
    "raspberry-pi-4": ("neon", 4),
    "raspberry-pi-5": ("dotprod", 4),
    "snapdragon-8-gen-1": ("i8mm", 4),
    "snapdragon-870": ("dotprod", 4),
    "x86-64-avx2": ("avx2", 4),
    "x86-64-avx512vnni": ("avx512vnni", 4),
    "x86-64-avxvnni": ("avxvnni", 4),
    "x86-64-xeon": ("avx512vnni-xeon", 4),
}


def test_shipped_devices_are_these():
    assert device_names() == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_shipped_device_is_valid(name):
    device = load_device(name)
    assert (device.name, device.instruction_set, device.threads) == (name, *EXPECTED[name])


def test_little_cores_are_not_used():
    device = load_device("snapdragon-870")
    assert sum(cluster.count for cluster in device.clusters) == 8
    assert device.tvm_target()["num-cores"] == 4


def test_target_has_all_that_tvm_needs():
    assert load_device("x86-64-avx512vnni").tvm_target(threads=3) == {
        "kind": "llvm",
        "mtriple": "x86_64-linux-gnu",
        "mcpu": "x86-64-v4",
        "mattr": ["+avx512vnni", "-prefer-256-bit"],
        "num-cores": 3,
    }
    with pytest.raises(AgqError, match="at least 1, not 0"):
        load_device("raspberry-pi-4").tvm_target(threads=0)


def test_host_uses_the_cores_of_this_process(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 3, 5})
    host = load_device("host")
    assert host.threads == 3
    assert host.name in device_names()


def edited(tmp_path: Path, old: str, new: str, name: str = "raspberry-pi-4") -> Path:
    text = (DEVICES / f"{name}.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    return path


def test_own_device_file(tmp_path):
    path = edited(tmp_path, 'name = "raspberry-pi-4"', 'name = "my-board"')
    assert load_device(path).name == "my-board"
    assert load_device(str(path)).emulator == "cortex-a72"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("memory_gib = 4", "memory_gib = 4\ncolour = 'red'", "unknown key 'colour'"),
        ("memory_gib = 4", "", "lacks the key 'memory_gib'"),
        ("memory_gib = 4", 'memory_gib = "4"', "memory_gib must be a size in GiB"),
        ("memory_gib = 4", "memory_gib = true", "memory_gib must be a size in GiB"),
        ("memory_gib = 4", "memory_gib = nan", "memory_gib must be a size in GiB"),
        ("aarch64-linux-gnu", "arm64-linux-gnu", "triple cannot be 'arm64-linux-gnu'"),
        ('cpu = "cortex-a72"', 'cpu = "cortex-a7200"', "cpu cannot be 'cortex-a7200'"),
        ('cpu = "cortex-a72"', 'cpu = "x86-64-v3"', "cpu cannot be 'x86-64-v3'"),
        ("+neon", "+fp16", r"features has an unknown name '\+fp16'"),
        ("+neon", "neon", "features has an unknown name 'neon'"),
        ('"+neon"', "4", "features must be a list of texts"),
        ('"-sha2"', '"-aes"', "features names something twice"),
        ('instruction_set = "neon"', 'instruction_set = "avx2"', "instruction_set cannot be 'avx2'"),
        ('instruction_set = "neon"', 'instruction_set = "dotprod"', "must name asimddp"),
        ('"asimd"', '"avx2"', "required_features has an unknown name 'avx2'"),
        ('glibc = "2.28"', 'glibc = "new"', "glibc must be"),
        ('glibc = "2.28"', "glibc = 2.28", "glibc must be a text"),
        ('emulator = "cortex-a72"', 'emulator = "max"', "emulator cannot be 'max'"),
        ("big = true", "big = false", "at least one with big = true"),
        ("big = true", "big = 1", "clusters.big must be true or false"),
        ("count = 4", "count = 0", "clusters.count must be a number of cores"),
        ("count = 4", "count = true", "clusters.count must be a number of cores"),
        ("count = 4", "", "clusters lacks the key 'count'"),
        ("ghz = 1.5", "ghz = 1500", "clusters.ghz must be a clock from 0.1 to 10 GHz"),
        ("ghz = 1.5", "ghz = true", "clusters.ghz must be a clock"),
        ("[[clusters]]", "[clusters]", r"\[\[clusters\]\]"),
        ('name = "raspberry-pi-4"', 'name = "../x"', "name must be lower-case letters"),
        ("[[clusters]]", "[[clusters", "not valid TOML"),
    ],
)
def test_wrong_file_is_told_where(tmp_path, old, new, told):
    path = edited(tmp_path, old, new)
    with pytest.raises(AgqError, match=told) as error:
        load_device(path)
    assert str(path) in str(error.value)


def test_only_what_no_other_model_runs_is_emulated_by_the_one_that_runs_everything(tmp_path):
    with pytest.raises(AgqError, match="emulator cannot be 'cortex-a76'"):
        load_device(edited(tmp_path, 'emulator = "max"', 'emulator = "cortex-a76"', "snapdragon-8-gen-1"))


def test_unknown_device_and_missing_file(tmp_path):
    with pytest.raises(AgqError, match="unknown device 'raspberry-pi-3': choose host, generic-aarch64"):
        load_device("raspberry-pi-3")
    with pytest.raises(AgqError, match="does not exist"):
        load_device(tmp_path / "none.toml")
    with pytest.raises(AgqError, match=r"unknown device '\.\./devices/raspberry-pi-4'"):
        load_device("../devices/raspberry-pi-4")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_llvm_knows_every_name_that_a_file_may_use(machine):
    from tvm.target import Target, codegen

    triple = next(triple for triple, name in known.TRIPLES.items() if name == machine)
    generic = "generic" if machine == "aarch64" else "x86-64"
    base = {"kind": "llvm", "mtriple": triple, "mcpu": generic}
    assert known.CPUS[machine] <= set(codegen.llvm_get_cpu_archlist(Target(base)))
    for feature in known.FEATURES[machine]:
        with Target(base | {"mattr": [f"+{feature}"]}) as target:
            assert codegen.llvm_cpu_has_features(feature, target), feature


def test_avx512_device_uses_whole_registers():
    """LLVM tunes x86-64-v4 for 256-bit vectors unless the file says otherwise."""
    import tvm
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("scale")
        x = T.arg("x", T.Buffer((1024,), "float32"))
        y = T.arg("y", T.Buffer((1024,), "float32"))
        with T.grid(1024) as i, T.sblock("scale"):
            v = T.axis.spatial(1024, i)
            T.buffer_store(y, x[v] * x[v], [v])
    function = builder.get().with_attr("global_symbol", "scale")
    target = tvm.target.Target(load_device("x86-64-avx512vnni").tvm_target(threads=1))
    assert "zmm" in tvm.compile(tvm.IRModule({"scale": function}), target=target).mod.inspect_source("asm")
