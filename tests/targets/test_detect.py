"""What is read out of /proc/cpuinfo, and what follows from it."""

import pytest

from agq_tvm.errors import AgqError
from agq_tvm.targets import detect, load_device

V3 = """sse sse2 pni ssse3 sse4_1 sse4_2 popcnt cx16 lahf_lm
    avx avx2 bmi1 bmi2 f16c fma abm movbe xsave""".split()
VNNI = [*V3, *"avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni".split()]
PI4 = """\
processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU part\t: 0xd08

processor\t: 1
Features\t: fp asimd evtstrm crc32 cpuid

Hardware\t: BCM2835
"""
PI5 = "Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\n"


def test_features_of_an_arm_machine():
    assert detect.parse_cpuinfo(PI4) == {"fp", "asimd", "evtstrm", "crc32", "cpuid"}


def test_only_features_of_every_core_count():
    text = "processor : 0\nflags\t\t: sse avx2 avx512f\nvmx flags : vnmi\n\nprocessor : 1\nflags\t\t: sse avx2\n"
    assert detect.parse_cpuinfo(text) == {"sse", "avx2"}


@pytest.mark.parametrize("text", ["", "flags\n", "Features\t:\n", "no colon here"])
def test_no_features(text):
    assert detect.parse_cpuinfo(text) == frozenset()


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        ("x86_64", VNNI, "x86-64-avx512vnni"),
        ("x86_64", V3, "x86-64-avx2"),
        ("x86_64", [*V3, "avx_vnni"], "x86-64-avxvnni"),
        ("x86_64", [*VNNI, "avx_vnni"], "x86-64-avx512vnni"),
        ("x86_64", [name for name in VNNI if name != "avx512dq"], "x86-64-avx2"),
        ("x86_64", ["sse2"], "generic-x86-64"),
        ("aarch64", detect.parse_cpuinfo(PI4), "raspberry-pi-4"),
        ("aarch64", detect.parse_cpuinfo(PI5), "raspberry-pi-5"),
        ("aarch64", detect.parse_cpuinfo(PI5.replace("\n", " sve i8mm\n")), "snapdragon-8-gen-1"),
        ("aarch64", [], "generic-aarch64"),
    ],
)
def test_best_device(machine, features, expected):
    assert detect.best_device(machine, features) == expected


@pytest.mark.parametrize(
    ("features", "vendor", "expected"),
    [
        (VNNI, "GenuineIntel", "x86-64-xeon"),
        (VNNI, "AuthenticAMD", "x86-64-avx512vnni"),
        (V3, "GenuineIntel", "x86-64-avx2"),
    ],
)
def test_processors_that_run_the_same_code_may_want_other_tiles(features, vendor, expected):
    assert detect.best_device("x86_64", features, vendor) == expected
    assert detect.missing_features(load_device("x86-64-xeon"), VNNI, "x86_64") == []


def test_other_architectures_are_refused():
    with pytest.raises(AgqError, match="'riscv64' is not supported"):
        detect.best_device("riscv64", [])


def test_missing_features():
    device = load_device("snapdragon-870")
    pi4 = detect.parse_cpuinfo(PI4)
    assert detect.missing_features(device, detect.parse_cpuinfo(PI5), "aarch64") == []
    assert "asimddp" in detect.missing_features(device, pi4, "aarch64")
    assert detect.missing_features(device, VNNI, "x86_64") == ["aarch64"]


@pytest.mark.parametrize(("system", "name"), [("AMD64", "x86_64"), ("arm64", "aarch64"), ("riscv64", "riscv64")])
def test_machine_has_linux_names(monkeypatch, system, name):
    monkeypatch.setattr("platform.machine", lambda: system)
    assert detect.machine() == name
