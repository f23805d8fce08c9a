"""What `agq bench` prints, draws and compares; its figures on this machine."""

import copy
import json
import math

import pytest

from agq_tvm.errors import AgqError
from agq_tvm.flow.bench_compare import as_table, compare, read_result
from agq_tvm.flow.bench_picture import draw
from agq_tvm.flow.bench_report import REST, as_markdown, as_text, shares, title
from agq_tvm.runtime.bench import bench
from tests.cli.test_cli import refused


@pytest.fixture(scope="module")
def timed(tiny_bundle) -> dict:
    return bench(tiny_bundle, threads=1, prefill_tokens=20, decode_tokens=4, rounds=3)


@pytest.fixture
def made(timed) -> dict:
    """A result with figures of our own: pp20 takes 2 s, of which kernels take 1.5."""
    made = copy.deepcopy(timed) | {"threads": 2, "load": 0.0}
    made["tests"]["pp20"] |= {
        "mean": 10.0,
        "std": 1.0,
        "samples": [9.0, 10.0, 11.0],
        "operations": [
            {"name": "linear_a", "calls": 3, "seconds": 1.2},
            {"name": "attention_b", "calls": 2, "seconds": 0.296},
            {"name": "small_c", "calls": 1, "seconds": 0.003},
            {"name": "small_d", "calls": 1, "seconds": 0.001},
        ],
    }
    return made


def test_figures_of_this_machine(timed, tiny_bundle):
    assert json.loads(json.dumps(timed)) == timed
    assert list(timed["tests"]) == ["pp20", "tg4"]
    for name, test in timed["tests"].items():
        samples = test["samples"]
        assert len(samples) == 3 and min(samples) > 0 and test["tokens"] == int(name[2:])
        assert test["mean"] == pytest.approx(math.fsum(samples) / 3)
        spread = sum((value - test["mean"]) ** 2 for value in samples) / 2
        assert test["std"] == pytest.approx(math.sqrt(spread))
        assert all(each["seconds"] > 0 for each in test["operations"])
    calls = {each["name"]: each["calls"] for each in timed["tests"]["tg4"]["operations"]}
    layers, tokens = 2, 4
    assert calls["linear_w4a8g64_group_asym_m1_n320_k96"] == layers * tokens  # none of the token before them
    assert (
        timed["memory"]["peak"]
        > timed["memory"]["weights"]
        == sum(entry["bytes"] for name, entry in _manifest(tiny_bundle)["files"].items() if name == "params.bin")
    )
    assert timed["uploaded_bytes"] is None and not timed["emulated"]


def _manifest(bundle) -> dict:
    return json.loads((bundle / "manifest.json").read_text())


def test_one_round_has_no_deviation(tiny_bundle):
    result = bench(tiny_bundle, threads=1, prefill_tokens=9, decode_tokens=1, rounds=1)
    assert [test["std"] for test in result["tests"].values()] == [None, None]
    assert "±" not in as_text(result)


def test_shares_add_up(made):
    listed = shares(made["tests"]["pp20"])
    assert [name for name, *_ in listed] == ["linear_a", "attention_b", "small_c", "small_d", REST]
    assert [share for *_, share in listed] == pytest.approx([0.6, 0.148, 0.0015, 0.0005, 0.25])
    made["tests"]["pp20"]["mean"] = 20.0  # a whole of 1 s, less than the kernels took: the machine was busy then
    listed = shares(made["tests"]["pp20"])
    assert sum(share for *_, share in listed) == pytest.approx(1) and listed[-1][2:] == (0, 0)


def test_text_and_markdown(made):
    text = as_text(made)
    assert title(made).endswith("2 threads (" + made["instruction_set"] + ")") and title(made) in text
    lines = {line.split("  ")[0]: line.split() for line in text.split("tg4: ")[0].splitlines()}
    assert lines["pp20"] == ["pp20", "10.00", "±", "1.00"]
    assert lines["linear_a"] == ["linear_a", "3", "400000.0", "60.0%"]
    assert lines["smaller kernels (2)"][3:] == ["2", "2000.0", "0.2%"]
    assert lines["the rest"][2:] == ["25.0%"]
    assert "busy" not in text and "busy" in as_text(made | {"load": 5.0})
    markdown = as_markdown(made)
    assert "| model | size | device | threads | test | t/s |\n|---|---|---|---|---|---|\n" in markdown
    assert "| 2 | pp20 | 10.00 ± 1.00 |" in markdown
    told = {"temperature_celsius": 61.3, "clock_hertz": 1.5e9}
    status = {"before": {"temperature_celsius": 40.0}, "after": told}
    assert "40.0 °C before, 61.3 °C after" in as_text(made | {"status": status}) and "GHz" not in text


def test_picture(made, tmp_path):
    draw(made, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(AgqError, match=r"cannot draw .*\.zip"):
        draw(made, tmp_path / "bench.zip")


def test_ratio_and_its_error(made):
    faster = copy.deepcopy(made) | {"file": "b.json", "threads": 1}
    faster["tests"]["pp20"]["samples"] = [18.0, 20.0, 22.0]
    faster["tests"]["tg4"] = dict(made["tests"]["tg4"], samples=made["tests"]["tg4"]["samples"][:1])
    faster["tests"]["tg9"] = faster["tests"]["tg4"]
    found = compare(made | {"file": "a.json"}, faster)
    assert list(found["tests"]) == ["pp20", "tg4"]
    assert found["tests"]["pp20"]["ratio"] == pytest.approx(2) and found["tests"]["pp20"]["pairs"] == 3
    assert found["tests"]["pp20"]["ratio_stderr"] == pytest.approx(0, abs=1e-9)
    assert found["tests"]["tg4"] | {"ratio": 1.0, "ratio_stderr": None, "pairs": 1} == found["tests"]["tg4"]
    faster["tests"]["pp20"]["samples"] = [9.0 * 2, 10.0 / 2, 11.0]  # ratios of 2, 1/2 and 1
    again = compare(made | {"file": "a.json"}, faster)["tests"]["pp20"]
    assert (again["ratio"], again["ratio_stderr"]) == pytest.approx((1, math.log(2) / math.sqrt(3)))
    table = as_table(found)
    assert "2.000 ± 0.000" in table and "a.json TOKENS/S" in table and "2 threads, the second 1" in table
    assert as_table(found, markdown=True).startswith(
        "| TEST | a.json TOKENS/S | b.json TOKENS/S | RATIO | PAIRS |\n|---|"
    )


def test_results_that_do_not_compare(made):
    first, second = made | {"file": "a.json"}, copy.deepcopy(made) | {"file": "b.json"}
    for change, words in (
        ({"model": made["model"] | {"checkpoint_sha256": "0" * 64}}, "of different models"),
        ({"device": "raspberry-pi-4"}, "of different devices"),
        ({"processor": "another"}, "of different processors"),
        ({"tests": {}}, "no test in common"),
    ):
        with pytest.raises(AgqError, match=f"a.json and b.json .*{words}|{words}"):
            compare(first, second | change)


@pytest.mark.parametrize(
    "damage",
    [
        lambda result: result.pop("tests"),
        lambda result: result["tests"]["pp20"].pop("samples"),
        lambda result: result["tests"]["pp20"].update(samples=[1.0, "fast"]),
        lambda result: result["tests"]["pp20"].update(samples=[1.0, -1.0]),
        lambda result: result["tests"]["pp20"].update(samples=[]),
        lambda result: result["tests"]["pp20"].update(mean=10**400),
        lambda result: result.update(tests=[]),
        lambda result: result["model"].pop("checkpoint_sha256"),
        lambda result: result.update(format_version=99),
        lambda result: result.update(threads="two"),
    ],
)
def test_damaged_results(made, tmp_path, damage):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(made))
    assert read_result(path)["tests"] == made["tests"]
    damage(made)
    path.write_text(json.dumps(made))
    with pytest.raises(AgqError, match="is not a result of `agq bench -o`"):
        read_result(path)


def test_command(agq, tiny_bundle, tmp_path):
    arguments = ("bench", tiny_bundle, "--threads", "1", "--prefill", "9", "--decode", "2", "--rounds", "2")
    made = agq(*arguments, "-o", tmp_path / "a.json", "--picture")
    assert made.returncode == 0 and "pp9" in made.stdout, made.stderr
    assert (tmp_path / "a.png").is_file()
    compared = agq("bench", "--compare", tmp_path / "a.json", tmp_path / "a.json")
    assert compared.returncode == 0 and "1.000 ± 0.000" in compared.stdout
    refused(agq("bench", tiny_bundle, "--picture"), "-o FILE")
    refused(agq("bench"), "BUNDLE", "--compare")
    refused(agq("bench", "--compare", tmp_path / "a.json", tmp_path / "none.json"), "none.json is missing")
    refused(agq("bench", "--compare", tmp_path / "a.json", tmp_path / "a.json", "--threads", "1"), "--threads")
    refused(agq(*arguments, "-o", tmp_path), "cannot write")
