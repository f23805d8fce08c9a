"""The search for a pruning schedule, and the cost that it goes by."""

import json
import shlex
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from agq_tvm.cli.main import build_parser, main
from agq_tvm.errors import AgqError
from agq_tvm.flow import prune_search as search
from agq_tvm.flow.evaluate import evaluate_reference
from agq_tvm.flow.prefill_cost import prefill_macs, speedup
from agq_tvm.flow.prune_search import Candidate, candidates, layer_sets, prune_search, quantize_command, with_schedule
from agq_tvm.flow.quantize import quantize
from agq_tvm.kernels.attention_form import AttentionForm
from agq_tvm.models import relax_decoder
from agq_tvm.models.registry import describe
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.pruning import PruningSchedule
from agq_tvm.runtime.perplexity import compare
from tests.tiny import tiny_config, write_tiny_model

LAYERS = 6
CONFIG = describe(tiny_config("llama", num_hidden_layers=LAYERS))
PROJECTED = describe(tiny_config("opt", word_embed_proj_dim=32, do_layer_norm_before=False))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "m", "llama", 2, num_hidden_layers=LAYERS)


def matmul_macs(config, rows: int, schedule: PruningSchedule | None) -> int:
    """Add up what the compiler's own module multiplies, attention apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relax_decoder, "function_names", lambda: [("prefill", rows, False)])
        module, total = relax_decoder.build_decoder(config, 256, AttentionForm(), schedule), 0

    def visit(node) -> None:
        nonlocal total
        if isinstance(node, relax.Call) and getattr(node.op, "name", "") == "relax.matmul":
            rows, depth = (int(extent) for extent in node.args[0].ty.shape)
            total += rows * depth * int(node.args[1].ty.shape[1])

    relax.analysis.post_order_visit(module["prefill"], visit)
    return total


@pytest.mark.parametrize("schedule", [None, PruningSchedule((2, 3), 0.6), PruningSchedule((1,), 0.97)])
@pytest.mark.parametrize("config", [CONFIG, PROJECTED], ids=["llama", "opt"])
def test_the_cost_is_what_the_compiler_multiplies(config, schedule):
    if schedule and schedule.layers[-1] > config.num_layers:
        schedule = PruningSchedule((1, 2), 0.6)
    for rows in (8, 64, 128):
        attention = 2 * config.num_heads * config.head_dim * _keys(config, rows, schedule)
        assert prefill_macs(config, rows, schedule) == matmul_macs(config, rows, schedule) + attention


def _keys(config, rows, schedule) -> int:
    """Add up the keys, in vectors of 16, that the rows of a first chunk see in every layer."""
    here, total, counts = rows, 0, schedule.counts(rows) if schedule else ()
    for layer in range(1, config.num_layers + 1):
        total += sum(16 * (row // 16 + 1) for row in range(here))
        if schedule and layer in schedule.layers:
            here = 8 * -(-counts[schedule.layers.index(layer) + 1] // 8)
    return total


def test_padding_costs_and_chunks_add_up():
    assert prefill_macs(CONFIG, 9) > prefill_macs(CONFIG, 8) < prefill_macs(CONFIG, 7) + 1
    assert prefill_macs(CONFIG, 256) > 2 * prefill_macs(CONFIG, 128)
    assert speedup(CONFIG, 1, PruningSchedule((1,), 0.9)) == 1


@settings(max_examples=30, deadline=None)
@given(st.floats(1.01, 1.5), st.integers(24, 400))
def test_each_share_is_the_smallest_that_has_the_speedup(wanted, tokens):
    try:
        found = candidates(CONFIG, tokens, wanted)
    except AgqError:
        assert all(speedup(CONFIG, tokens, PruningSchedule(layers, 0.99)) < wanted for layers in layer_sets(LAYERS))
        return
    for each in found:
        assert each.speedup == speedup(CONFIG, tokens, each.schedule) >= wanted
        if each.schedule.beta > 0.001:
            less = PruningSchedule(each.schedule.layers, round(each.schedule.beta - 0.001, 3))
            assert speedup(CONFIG, tokens, less) < wanted


@pytest.mark.parametrize("layers", [2, 3, 6, 12, 30, 80])
def test_layer_sets_are_rising_and_not_shallow(layers):
    sets = layer_sets(layers)
    assert sets and len(set(sets)) == len(sets) and all(1 <= len(each) <= 4 for each in sets)
    for each in sets:
        assert each[0] >= max(2, layers / 6) and each[-1] <= layers and all(a < b for a, b in pairwise(each))
    if layers >= 12:
        assert {len(each) for each in sets} == {1, 2, 3, 4}


def test_the_better_half_goes_on(monkeypatch):
    """Losses are made up: those of a layer, plus noise that is the same for all, as of windows of text."""
    worse = {2: 0.4, 3: 0.2, 4: 0.0, 5: 0.3, 6: 0.1, 7: 0.5, 8: 0.6, 9: 0.7}
    found = [Candidate(PruningSchedule((layer,), 0.5), 1.3) for layer in worse]
    windows = [[i] * 8 for i in range(16)]

    def losses(reference, schedule, window):
        noise = np.random.default_rng(window[0]).standard_normal(2)
        return noise + (worse[schedule.layers[0]] if schedule else 0)

    monkeypatch.setattr(search, "_window_losses", losses)
    dense = search.halve(None, found, windows)
    assert [each.schedule.layers[0] for each in found] == [4, 6, 3, 5, 2, 7, 8, 9]
    assert [len(each.losses) for each in found] == [16, 16, 16, 4, 2, 2, 2, 2] and len(dense) == 16
    assert found[1].change(dense, 8).nll == pytest.approx(0.1) and found[1].change(dense, 8).nll_stderr < 1e-9


def test_a_short_text_ends_the_rounds_early(monkeypatch):
    found = [Candidate(PruningSchedule((layer,), 0.5), 1.3) for layer in (2, 3)]
    monkeypatch.setattr(search, "_window_losses", lambda *_: np.zeros(2))
    assert len(search.halve(None, found, [[1] * 8] * 3)) == 3
    assert [len(each.losses) for each in found] == [3, 3]


def test_finds_a_schedule_whose_score_is_that_of_eval(model, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "ROUNDS", (2, 3))
    text = tmp_path / "text"
    text.write_text("It was a dark and stormy night; the rain fell in torrents. " * 4)
    found = prune_search(model, 1.2, text, window=64)
    assert found["prompt_tokens"] == 48 and found["measured"] is None
    best = found["candidates"][0]
    assert best["speedup_predicted"] >= 1.2 and best["windows"] == 3 and 0 < best["sparsity"] < 1
    schedule = PruningSchedule(tuple(best["layers"]), best["beta"])
    quantize(model, tmp_path / "c", method="rtn", group_size=32, activation="none", pruning=schedule)
    again = prune_search(tmp_path / "c", 1.2, text, window=64)["candidates"]
    scores = [evaluate_reference(tmp_path / "c", text, 64)]
    with_schedule(tmp_path / "c", None, tmp_path / "dense")
    scores.append(evaluate_reference(tmp_path / "dense", text, 64, protocol="suffix"))
    same = next(each for each in again if (each["layers"], each["beta"]) == (best["layers"], best["beta"]))
    if same["windows"] == 3:
        assert same["perplexity_change"] == pytest.approx(compare(*scores).perplexity_change, abs=1e-6)


def test_the_command_makes_that_checkpoint(model, tmp_path):
    schedule = PruningSchedule((2, 5), 0.375)
    settings = {"group_size": 32, "activation": "static", "max_refine": 2, "attention": "log2", "symmetric": True}
    quantize(model, tmp_path / "c", method="rtn", four_bit=("o", "down"), **settings)
    for made_of in (model, tmp_path / "c"):
        words = shlex.split(quantize_command(made_of, schedule))
        args = build_parser().parse_args(words[1:])
        assert (args.prune_layers, args.prune_beta) == ((2, 5), 0.375)
    assert {name: getattr(args, name) for name in settings} == settings
    assert (args.method, args.four_bit, args.model) == ("rtn", ("o", "down"), "MODEL")


def test_command_line_and_measuring(model, tmp_path, capsys, monkeypatch):
    """Compiling is left out; what would be compiled is looked at."""
    monkeypatch.setattr(search, "ROUNDS", (2,))
    quantize(model, tmp_path / "c", method="rtn", group_size=32)
    compiled = []
    monkeypatch.setattr(
        "agq_tvm.flow.compile.compile_checkpoint", lambda made, *_: compiled.append(read_checkpoint(made))
    )
    monkeypatch.setattr(search, "Bundle", lambda path: path)
    monkeypatch.setattr(search, "compare_prefill", lambda dense, pruned, tokens: (100.0, 150.0))
    arguments = ["prune-search", str(tmp_path / "c"), "--speedup", "1.2", "--window", "128", "--measure"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "PREDICTED" in said and "agq quantize MODEL" in said and "150 with the first: 1.50x" in said
    assert compiled[0].scheme.pruning is None and compiled[1].scheme.pruning.layers[0] >= 2
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measured"]["speedup"] == 1.5
    assert tuple(found["candidates"][0]["layers"]) == compiled[1].scheme.pruning.layers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--speedup", "1"), "a speed-up of 1 is none"),
        (("--speedup", "nan"), "ask for more than 1"),
        (("--speedup", "50"), "cannot make prefill 50 times as fast"),
        (("--speedup", "1.1", "--window", "4"), "give a longer --window"),
        (("--speedup", "1.1", "--window", "300"), "300"),
        (("--speedup", "1.1", "--measure"), "not a checkpoint"),
        (("--speedup", "1.1", "--data", "absent.txt"), "no text"),
    ],
)
def test_mistakes_are_one_sentence(model, capsys, arguments, words):
    assert main(["prune-search", str(model), *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("agq: ")]
    assert len(lines) == 1 and words in lines[0]
