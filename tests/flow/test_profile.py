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
from agq_tvm.flow.profile_kernels import ONCE, Effort, Place, time_kernels
from agq_tvm.flow.profile_operations import FORMS, BlockOperations, Kernel, Operand
from agq_tvm.flow.profile_report import as_text
from agq_tvm.flow.propose_bits import PerplexityCost, choose, propose, savings, upper_percent
from agq_tvm.flow.quantize import quantize
from agq_tvm.kernels.emit import task_loop
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.models.registry import describe
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.scheme import Scheme
from agq_tvm.runtime.perplexity import Difference, compare
from agq_tvm.targets import load_device
from agq_tvm.targets.processors import cache_bytes
from agq_tvm.tvm_seam import IRBuilder, T
from tests.tiny import tiny_config, write_tiny_llama

PLAIN = Scheme("rtn", 32, False, "per-token-group")
SMALL = Effort(repeats=3, milliseconds=0, cold_bytes=1 << 14)


def operations(family="llama", scheme=PLAIN, isa="neon", rows=8, **config) -> BlockOperations:
    return BlockOperations(
        describe(tiny_config(family, **config)), scheme, "float16", instruction_set(isa), rows, 64, 16
    )


@pytest.mark.parametrize(
    ("family", "scheme", "config"),
    [
        ("llama", replace(PLAIN, activation="static", attention="log2", max_refine=2), {}),
        ("opt", replace(PLAIN, activation="per-token", group_size=64), {"do_layer_norm_before": False}),
        ("bloom", replace(PLAIN, attention="log2-paper"), {}),
    ],
)
def test_every_kernel_of_a_block_runs(family, scheme, config):
    device = load_device("host")
    block = operations(family, scheme, device.instruction_set, 3, **config)
    timings = time_kernels(block.kernels.values(), Place(device), ONCE)
    assert timings.keys() == block.kernels.keys()
    assert all(timing.seconds > 0 for timing in timings.values())
    used = {name for operation in block.operations for parts in operation.kernels.values() for name, _ in parts}
    assert used == block.kernels.keys()
    kinds = [operation.kind for operation in block.operations]
    assert (kinds.count("linear"), kinds.count("attention"), kinds.count("quantization")) == (4, 1, 1)


def test_forms_share_a_kernel_only_where_there_is_no_better_one():
    def kernels(isa: str, rows: int) -> list[str]:
        found = next(op.kernels for op in operations(isa=isa, rows=rows).operations if op.name == "qkv")
        assert tuple(found) == FORMS and found["w8a8"] != found["w4a8"] != found["float32"]
        return [found[form][0][0] for form in ("w4a8", "w4a4")]

    for isa, rows, shared in (("neon", 8, False), ("neon", 1, True), ("dotprod", 8, True), ("neon-paper", 1, False)):
        eight, four = kernels(isa, rows)
        assert (eight == four) == shared, (isa, rows)


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


def test_profile_of_this_machine(tiny_checkpoint, tmp_path):
    made = profile(tiny_checkpoint, "host", tmp_path / "p", rows=(1, 4), effort=SMALL)
    assert read_profile(tmp_path / "p") == read_profile(tmp_path / "p" / PROFILE) == made
    assert (tmp_path / "p" / PICTURE).stat().st_size > 10_000
    assert set(made.blocks) == {1, 4} and not made.emulated and made.positions == 256
    for block in made.blocks.values():
        for operation in block:
            assert operation.kind == "quantization" or all(operation.seconds[form] > 0 for form in FORMS)
        assert "float32" not in block[-1].seconds
    text = as_text(made)
    assert "1 row, 256 positions" in text and f"{1e6 * total(made.blocks[4], 'w4a8'):.1f}" in text
    assert made.proposal.reason in text
    stream = 100 * total(made.blocks[1], "w4a8", "linear") / total(made.blocks[1], "w4a8")
    assert text.count("weight stream: ") == 1 and f", {stream:.0f} % (w4a8), " in text
    assert cache_bytes() % 1024 == 0


def test_refusals(tiny_checkpoint, tmp_path):
    def refused(match: str, **options):
        with pytest.raises(AgqError, match=match):
            profile(tiny_checkpoint, **{"target": "host", "output": tmp_path / "p"} | options)
        assert list(tmp_path.iterdir()) == []

    for rows in ((), (0,), (1, 1), (257,)):
        refused(r"--rows takes different numbers in 1\.\.256", rows=rows)
    for budget in (-1, float("nan")):
        refused("--budget is a part", budget=budget)
    refused("give --tracker", key="board")
    foreign = "raspberry-pi-4" if load_device("host").machine == "x86_64" else "x86-64-avx2"
    refused("do not run on a processor without", target=foreign)


def block(**roles: tuple[float, float]) -> tuple[OperationTimes, ...]:
    """Make operations of linears with (w4a8, w4a4) seconds, and something else that takes 10."""
    spread = {"w4a8": 0.05, "w4a4": 0.05}
    linears = [OperationTimes(n, "linear", {"w4a8": a, "w4a4": b}, spread) for n, (a, b) in roles.items()]
    return (*linears, OperationTimes("norms", "nonlinear", {"w4a8": 10.0, "w4a4": 10.0}, spread))


def test_savings_are_means_of_shares_without_noise():
    blocks = {1: block(o=(10, 9.95), down=(20, 20)), 8: block(o=(10, 8), down=(20, 22))}
    assert savings(blocks) == {"o": pytest.approx(100 * 2 / 40 / 2), "down": 0}


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


@pytest.fixture
def made(tmp_path) -> Profile:
    """A profile with made-up times that proposes something, written to ``p``."""
    seconds = dict.fromkeys(FORMS, 1e-5)
    times = [OperationTimes(name, "linear", seconds, seconds) for name in ("qkv", "o", "gate_up", "down")]
    times.append(OperationTimes("quantization", "quantization", {"w8a8": 1e-6}, {"w8a8": 0.0}))
    roles = {"o": RoleProposal(3.0, 0.2, True), "down": RoleProposal(0.0, None, False)}
    proposal = Proposal(1.0, ("o",), 0.2, "because", roles)
    shape = ("llama", "per-token-group", 32, 512, FORMS, {1: tuple(times)}, proposal)
    value = Profile("raspberry-pi-4", "neon", 4, "pi", False, None, *shape)
    (tmp_path / "p").write_text(json.dumps(value.as_dict()))
    assert read_profile(tmp_path / "p") == value
    return value


DAMAGES = {
    "not a profile of format 1": lambda v: v.update(format_version=2),
    "lacks 'device'": lambda v: v.pop("device"),
    "unknown key 'more'": lambda v: v.update(more=1),
    "emulated is not true or false": lambda v: v.update(emulated=0),
    "threads is not an integer": lambda v: v.update(threads=True),
    "no number of rows": lambda v: v.update(blocks={"-1": v["blocks"]["1"]}),
    "blocks is empty": lambda v: v.update(blocks={}),
    "blocks.1 is not a list": lambda v: v["blocks"].update({"1": {}}),
    "kind cannot be 'magic'": lambda v: v["blocks"]["1"][0].update(kind="magic"),
    "has not a time for each": lambda v: v["blocks"]["1"][0]["seconds"].pop("w4a8"),
    "seconds.w8a8 is not a number of 0 or more": lambda v: v["blocks"]["1"][1]["seconds"].update(w8a8=-1),
    "spread.w8a8 is not a number": lambda v: v["blocks"]["1"][1]["spread"].update(w8a8=float("nan")),
    "list of different texts": lambda v: v["proposal"].update(four_bit=["o", "o"]),
    "is not what its roles say": lambda v: v["proposal"].update(four_bit=["down"]),
    "names 'mlp', which is no linear": lambda v: v["proposal"]["roles"].update(
        mlp={"saved_percent": 1, "cost_percent": None, "chosen": False}
    ),
    "proposal.four_bit is not empty": lambda v: (
        v.update(emulated=True),
        [operation.update(seconds={}, spread={}) for operation in v["blocks"]["1"]],
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
    blocks = {1: tuple(OperationTimes(op.name, op.kind) for op in made.blocks[1])}
    (tmp_path / "p").write_text(json.dumps(replace(made, emulated=True, proposal=none, blocks=blocks).as_dict()))
    with pytest.raises(AgqError, match="emulated board, whose time means nothing"):
        bits_from(tmp_path / "p")
