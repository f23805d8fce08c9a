"""Profiles: what is timed, how bits are proposed from times, and files that are not trusted."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agq_tvm.cli.main import main
from agq_tvm.errors import AgqError
from agq_tvm.flow.profile import PICTURE, bits_from, profile
from agq_tvm.flow.profile_file import PROFILE, OperationTimes, Profile, Proposal, RoleProposal, read_profile, total
from agq_tvm.flow.profile_kernels import Effort, Place, time_kernels
from agq_tvm.flow.profile_operands import Kernel, Operand
from agq_tvm.flow.profile_report import as_text, choices
from agq_tvm.flow.propose_bits import PerplexityCost, choose, propose, savings, upper_percent
from agq_tvm.flow.quantize import quantize
from agq_tvm.flow.schedules import Chooser
from agq_tvm.kernels.emit import task_loop
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.runtime.perplexity import Difference, compare
from agq_tvm.targets import load_device
from agq_tvm.targets.processors import cache_bytes
from agq_tvm.tvm_seam import IRBuilder, T
from tests.tiny import write_tiny_llama, write_tiny_model

SMALL = Effort(repeats=3, milliseconds=0, cold_bytes=1 << 14)


def test_each_call_takes_the_next_copy():
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("count")
            T.func_attr({"global_symbol": "count", "tirx.noalias": True})
            cold, out = T.arg("cold", T.buffer((4,), "float32")), T.arg("out", T.buffer((4,), "float32"))
            with task_loop("all", 1, [], [cold, out]), T.serial(4) as i:
                T.buffer_store(cold, cold[i] + T.float32(1), [i])
                T.buffer_store(out, cold[i], [i])
    operand = Operand((4,), values=(0, 0, 0, 0), cold=True, updated=True)
    kernel, place = Kernel(builder.get(), (operand,), (((4,), "float32"),)), Place(load_device("host"))
    time_kernels([kernel], place, Effort(repeats=1, milliseconds=0, cold_bytes=16 * 40))
    get = place.function("vm.builtin.tensor_cache.get")
    for group, calls in enumerate((32, 8)):
        counts = [get(f"cold{group}_{i}").numpy() for i in range(calls)]
        np.testing.assert_array_equal(counts, np.full((calls, 4), 2))  # one pass to warm up, one that is timed
    place.forget()
    assert get("cold0_0") is None


def test_profile_of_this_machine(tiny_checkpoint, tmp_path, capsys):
    made = profile(tiny_checkpoint, "host", tmp_path / "p", rows=(1, 8), effort=SMALL, cache="int8")
    assert read_profile(tmp_path / "p") == read_profile(tmp_path / "p" / PROFILE) == made
    assert (tmp_path / "p" / PICTURE).stat().st_size > 10_000
    assert set(made.operations) == {1, 8} and not made.emulated and made.positions == 256
    assert (made.layers, made.own, made.head_bits, made.cache) == (2, "w4a8", 8, "int8")
    for operations in made.operations.values():
        for operation in operations:
            assert operation.kind != "linear" or all(operation.seconds[form] > 0 for form in FORMS)
            assert operation.kind != "quantization" or "float32" not in operation.seconds
    text = as_text(made)
    assert "decode, 256 positions" in text and f"{1e6 * total(made.operations[8], 'w4a8'):.1f}" in text
    assert "a bundle runs w4a8: per-token-group activations, int8 caches, 8-bit head" in text
    assert made.proposal.reason in text and text.count("weight stream: ") == 1
    assert cache_bytes() % 1024 == 0


@pytest.mark.parametrize(
    ("settings", "own", "words"),
    [
        ({"activation": "none", "head_bits": 16}, "own", "runs own: float activations, float16 caches, float16 head"),
        ({"weight_bits": 8}, "w8a8", "runs w8a8: per-token-group activations, float16 caches, 8-bit head"),
    ],
)
def test_checkpoints_without_room_for_4_bits_are_profiled(settings, own, words, tmp_path, monkeypatch):
    def timed(*_):
        return False, {8: times(o=(10, 8))}

    monkeypatch.setattr("agq_tvm.flow.profile._timed", timed)
    monkeypatch.setattr("agq_tvm.flow.profile_picture.draw", lambda *_: None)
    write_tiny_model(tmp_path / "m", "llama", max_position_embeddings=300)
    quantize(tmp_path / "m", tmp_path / "c", method="rtn", group_size=32, **settings)
    made = profile(tmp_path / "c", "host", tmp_path / "p", rows=(8,))
    assert made.positions == 288  # as many as compiled caches hold, which is whole vectors of them
    assert made.own == own and choices(made) == f"a bundle {words}"
    assert made.proposal.four_bit == () and "4-bit weights and 8-bit activations" in made.proposal.reason
    assert made.proposal.roles["o"].saved_percent == 20


def test_schedules_come_from_the_library_as_for_a_bundle(tiny_checkpoint, tmp_path, monkeypatch):
    asked = []

    def timed(decoders, device, *_):
        decoders()
        assert {name for name, _ in asked} == {device.name} and asked[0][1] == device.threads
        return False, {8: times(o=(10, 10))}

    class Asked(Chooser):
        def __init__(self, library, isa, threads):
            super().__init__(library, isa, threads)
            asked.append((library.device, threads))

    monkeypatch.setattr("agq_tvm.flow.profile._timed", timed)
    monkeypatch.setattr("agq_tvm.flow.profile_picture.draw", lambda *_: None)
    monkeypatch.setattr("agq_tvm.flow.schedules.Chooser", Asked)
    profile(tiny_checkpoint, "host", tmp_path / "p", rows=(8,))
    assert len(asked) == len(FORMS)


def test_refusals(tiny_checkpoint, tmp_path):
    def refused(match: str, **options):
        with pytest.raises(AgqError, match=match):
            profile(tiny_checkpoint, **{"target": "host", "output": tmp_path / "p"} | options)
        assert list(tmp_path.iterdir()) == []

    for rows in ((), (0,), (1, 1), (4,), (256,)):
        refused("--rows takes different ones of 1, 8, 16, 32, 64, 128", rows=rows)
    for budget in (-1, float("nan")):
        refused("--budget is a part", budget=budget)
    refused("give --tracker", key="board")
    refused("unknown cache 'int4'", cache="int4")
    foreign = "raspberry-pi-4" if load_device("host").machine == "x86_64" else "x86-64-avx2"
    refused("do not run on a processor without", target=foreign)


def times(section: str = "block", kind: str = "linear", **roles: tuple[float, float]) -> tuple[OperationTimes, ...]:
    """Make operations with (w4a8, w4a4) seconds."""
    spread = {"w4a8": 0.05, "w4a4": 0.05}
    return tuple(OperationTimes(n, section, kind, {"w4a8": a, "w4a4": b}, spread) for n, (a, b) in roles.items())


def test_savings_are_means_of_shares_without_noise():
    outside = (*times("block", "nonlinear", norms=(10, 10)), *times("head", head=(30, 20)))
    decode, prefill = times(o=(10, 9.95), down=(20, 20)), times(o=(10, 8), down=(20, 22))
    assert savings({1: decode + outside, 8: prefill + outside}) == {"o": pytest.approx(100 * 2 / 70 / 2), "down": 0}


def test_greedy_choice():
    saved = {"qkv": 10.0, "o": 4.0, "gate_up": 9.0, "down": 1.0}
    costs = {"qkv": 5.0, "o": 0.5, "gate_up": 0.6, "down": 0.0}
    assert choose(saved, costs, 1.0) == ("down", "gate_up")  # o, at 8 for one, no longer fits
    assert choose(saved, costs, 1.1) == ("down", "gate_up", "o")
    assert choose(saved, costs, 0.0) == ("down",)
    assert choose({"o": 0.0}, {"o": 0.0}, 1.0) == ()


@given(st.dictionaries(st.text(max_size=3), st.tuples(st.floats(0, 50), st.floats(0, 9)), max_size=6), st.floats(0, 9))
def test_choice_stays_within_the_budget(roles, budget):
    saved = {role: pair[0] for role, pair in roles.items()}
    costs = {role: pair[1] for role, pair in roles.items()}
    chosen = choose(saved, costs, budget)
    assert sum(costs[role] for role in chosen) <= budget and all(saved[role] > 0 for role in chosen)
    left = [role for role in roles if role not in chosen and saved[role] > 0]
    assert all(sum(costs[other] for other in (*chosen, role)) > budget for role in left)


def test_chosen_roles_are_measured_together_and_given_up_until_they_hold():
    asked = []

    def measure(roles):
        asked.append(roles)
        return {1: 0.2, 2: 0.9, 3: 1.4}[len(roles)]

    found = propose({"qkv": 0.0, "o": 3.0, "gate_up": 8.0, "down": 5.0}, measure, 1.0)
    assert asked == [("o",), ("gate_up",), ("down",), ("gate_up", "down", "o"), ("gate_up", "down")]
    assert found.four_bit == ("gate_up", "down") and found.cost_percent == 0.9
    assert "save 13.0 %" in found.reason and "0.90 %" in found.reason
    assert found.roles["o"] == RoleProposal(3.0, 0.2, False)
    assert found.roles["qkv"] == RoleProposal(0.0, None, False)
    alone = propose({"o": 3.0, "down": 2.0}, lambda roles: 0.7 * len(roles) ** 2, 1.5)
    assert alone.four_bit == ("o",) and alone.cost_percent == pytest.approx(0.7)


def test_nothing_is_proposed_where_nothing_is_gained_or_everything_costs_too_much():
    def never(_):
        raise AssertionError("nothing is to be measured")

    found = propose({"o": 0.0, "down": 0.0}, never, 1.0)
    assert found.four_bit == () and "no input is faster" in found.reason
    dear = propose({"o": 3.0}, lambda roles: 1.5, 1.0)
    assert dear.four_bit == () and dear.cost_percent is None and "1 %" in dear.reason


def test_cost_is_that_of_a_checkpoint_with_4_bit_inputs(tiny_checkpoint, tmp_path):
    checkpoint = read_checkpoint(tiny_checkpoint)
    quantize(str(write_tiny_llama(tmp_path / "m")), tmp_path / "c", method="rtn", group_size=64, four_bit=("down",))
    tokens = list(range(3, 40))
    real = ReferenceModel.from_checkpoint(read_checkpoint(tmp_path / "c")).logits(tokens)
    np.testing.assert_array_equal(
        ReferenceModel.from_checkpoint(checkpoint.with_four_bit(("down",))).logits(tokens), real
    )
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night; the rain fell in torrents. " * 20)
    cost = PerplexityCost(checkpoint, str(text))
    assert cost(()) == 0 and cost.baseline.losses.shape == (4, 255)
    expected = upper_percent(compare(cost.score(("o", "down")), cost.baseline))
    assert cost(("o", "down")) == expected
    assert not np.array_equal(cost.score(("o", "down")).losses, cost.baseline.losses)


def test_cost_is_mean_and_two_standard_errors():
    assert upper_percent(Difference(0.02, 0.01)) == pytest.approx(100 * (math.expm1(0.02) + 2 * math.exp(0.02) * 0.01))
    assert upper_percent(Difference(0.02, math.nan)) == pytest.approx(100 * math.expm1(0.02))
    assert upper_percent(Difference(-0.5, 0.01)) == 0


FORMS = ("float32", "float16-weights", "w8a8", "w4a8", "w4a4")


@pytest.fixture
def made(tmp_path) -> Profile:
    """A profile with made-up times that proposes something, written to ``p``."""
    seconds = dict.fromkeys(FORMS, 1e-5)
    names = ("qkv", "o", "gate_up", "down")
    times = [OperationTimes(name, "block", "linear", seconds, seconds) for name in names]
    times.append(OperationTimes("quantization", "block", "quantization", {"w8a8": 1e-5}, {"w8a8": 0.0}))
    times.append(OperationTimes("head", "head", "linear", dict.fromkeys(FORMS, 5e-5), seconds))
    roles = {"o": RoleProposal(3.0, 0.2, True), "down": RoleProposal(0.0, None, False)}
    proposal = Proposal(1.0, ("o",), 0.2, "because", roles)
    shape = ("llama", 2, "per-token-group", 32, 4, "int8", 512, FORMS, "w8a8", {1: tuple(times)}, proposal)
    value = Profile("raspberry-pi-4", "neon", 4, "pi", False, None, *shape)
    (tmp_path / "p").write_text(json.dumps(value.as_dict()))
    assert read_profile(tmp_path / "p") == value
    return value


def test_the_weight_stream_is_that_of_the_whole_model_and_of_a_block(made):
    stream = made.weight_stream()
    assert stream["w8a8"] == {"model": pytest.approx(9 / 10), "block": pytest.approx(4 / 5)}
    assert stream["w4a8"] == {"model": pytest.approx(1), "block": pytest.approx(1)}
    assert made.as_dict()["weight_stream"] == stream
    (line,) = (line for line in as_text(made).splitlines() if "weight stream" in line)
    assert "weight stream: 90.0 % of a decode step in w8a8, as a bundle runs" in line
    assert "qkv, o, gate_up, down of 2 blocks, and head (in a block alone 80.0 %)" in line
    assert replace(made, operations={8: made.operations[1]}).weight_stream() == {}


def test_the_table_has_the_time_of_one_block_and_of_all(made):
    lines = {line.split("  ")[0]: line.split() for line in as_text(made).splitlines()}
    float32 = {name: lines[name][-2 * len(FORMS)] for name in ("qkv", "one block", "all 2 blocks", "decoder")}
    assert float32 == {"qkv": "5.0", "one block": "20.0", "all 2 blocks": "40.0", "decoder": "90.0"}


def test_a_busy_machine_is_named(made):
    assert "busy" not in as_text(made) and "busy" not in as_text(replace(made, load=1.0))
    assert "The machine was busy, its load was 3.0" in as_text(replace(made, load=3.0))


DAMAGES = {
    "not a profile of format 2": lambda v: v.update(format_version=1),
    "lacks 'device'": lambda v: v.pop("device"),
    "unknown key 'more'": lambda v: v.update(more=1),
    "emulated is not true or false": lambda v: v.update(emulated=0),
    "threads is not an integer": lambda v: v.update(threads=True),
    "no number of rows": lambda v: v.update(operations={"-1": v["operations"]["1"]}),
    "operations is empty": lambda v: v.update(operations={}),
    "operations.1 is not a list": lambda v: v["operations"].update({"1": {}}),
    "kind cannot be 'magic'": lambda v: v["operations"]["1"][0].update(kind="magic"),
    "section cannot be 'tail'": lambda v: v["operations"]["1"][0].update(section="tail"),
    "own is not one of its forms": lambda v: v.update(own="w2a2"),
    "group_size is not an integer": lambda v: v.update(group_size="row"),
    "weight_stream is not what its times say": lambda v: v["weight_stream"]["w4a8"].update(model=0.5),
    "has no time for the linears of a block": lambda v: [each.update(section="head") for each in v["operations"]["1"]],
    "has not a time for each": lambda v: v["operations"]["1"][0]["seconds"].pop("w4a8"),
    "seconds.w8a8 is not a number of 0 or more": lambda v: v["operations"]["1"][1]["seconds"].update(w8a8=-1),
    "spread.w8a8 is not a number": lambda v: v["operations"]["1"][1]["spread"].update(w8a8=float("nan")),
    "list of different texts": lambda v: v["proposal"].update(four_bit=["o", "o"]),
    "is not what its roles say": lambda v: v["proposal"].update(four_bit=["down"]),
    "names 'mlp', which is no linear": lambda v: v["proposal"]["roles"].update(
        mlp={"saved_percent": 1, "cost_percent": None, "chosen": False}
    ),
    "proposal.four_bit is not empty": lambda v: (
        v.update(emulated=True),
        v.update(weight_stream={}),
        [operation.update(seconds={}, spread={}) for operation in v["operations"]["1"]],
    ),
    "proposal lacks 'reason'": lambda v: v["proposal"].pop("reason"),
    "is not a table": lambda v: v.update(proposal=[]),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_profile_is_refused(made, tmp_path, message):
    values = copy.deepcopy(json.loads(json.dumps(made.as_dict())))
    DAMAGES[message](values)
    (tmp_path / "damaged.json").write_text(json.dumps(values))
    with pytest.raises(AgqError, match=message):
        read_profile(tmp_path / "damaged.json")


def test_quantize_takes_bits_from_a_profile(made, tmp_path, capsys):
    model = str(write_tiny_llama(tmp_path / "model"))
    command = ["quantize", model, "-o", str(tmp_path / "c"), "--method", "rtn", "--bits-from", str(tmp_path / "p")]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["four_bit"] == ["o"]
    assert read_checkpoint(tmp_path / "c").scheme.four_bit == ("o",)
    assert main([*command, "--four-bit", "down"]) == 2
    assert "--bits-from and --four-bit" in capsys.readouterr().err
    values = json.loads(json.dumps(made.as_dict()).replace('"o"', '"fc9"'))
    (tmp_path / "p").write_text(json.dumps(values))
    assert main(command) == 2
    assert "no linear 'fc9'" in capsys.readouterr().err


def test_a_profile_that_is_not_there_is_named(tmp_path):
    with pytest.raises(AgqError, match="there is no profile"):
        bits_from(tmp_path / "nowhere")


def test_bits_from_an_emulated_board_are_refused(made, tmp_path):
    none = replace(made.proposal, four_bit=(), roles={})
    operations = {1: tuple(OperationTimes(op.name, op.section, op.kind) for op in made.operations[1])}
    (tmp_path / "p").write_text(
        json.dumps(replace(made, emulated=True, proposal=none, operations=operations).as_dict())
    )
    with pytest.raises(AgqError, match="emulated board, whose time means nothing"):
        bits_from(tmp_path / "p")
