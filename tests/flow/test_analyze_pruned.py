"""Analysis before and after pruning."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from agq_tvm.cli.main import main
from agq_tvm.flow.analyze import analyze
from agq_tvm.flow.pruning_pictures import draw_map, draw_pair, outlier_channels
from agq_tvm.flow.quantize import quantize
from agq_tvm.quantize.observe import observe
from agq_tvm.quantize.pruning import PruningSchedule
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.source import open_source
from tests.tiny import write_tiny_model

SCHEDULE = PruningSchedule((2, 3), 0.6)
PRUNED = [
    "attention-to-start-pruned.png",
    "channels-down-pruned.png",
    "pruning-activations.png",
    "pruning-attention.png",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model") / "m", "bloom", 3, n_layer=4, seq_length=64)


def test_both_are_written_and_drawn(model, tmp_path):
    summary = analyze(model, tmp_path / "out", "jargon", SCHEDULE)
    written = json.loads((tmp_path / "out" / "analysis.json").read_text())
    pruned = written["pruned"]
    assert pruned["schedule"] == {"layers": [2, 3], "beta": 0.6, "renumber": False}
    for name, layers in written["inputs"].items():
        same = 2 if name in ("qkv", "o") else 1  # the second layer's attention still sees all tokens
        assert pruned["inputs"][name][:same] == layers[:same]
        assert all(few != many for few, many in zip(pruned["inputs"][name][same:], layers[same:], strict=True))
        means = [np.mean([layer["largest"] for layer in each[same:]]) for each in (layers, pruned["inputs"][name])]
        assert summary["pruned"]["inputs"][name]["largest"] == pytest.approx(means, rel=1e-3)
    assert pruned["attention_to_start"]["layers"][:2] == written["attention_to_start"]["layers"][:2]
    # Those that look most at the first token are left.
    assert pruned["attention_to_start"]["layers"][2] > written["attention_to_start"]["layers"][2]
    assert {"attention-maps.png", *PRUNED} <= set(summary["files"])
    for name in PRUNED:
        assert len(np.unique(imread(tmp_path / "out" / name)[::3, ::3, 0])) > 20


def test_a_checkpoint_is_compared_by_its_own_schedule(model, tmp_path, capsys):
    quantize(model, tmp_path / "c", method="rtn", group_size=32, pruning=SCHEDULE)
    assert main(["analyze", str(tmp_path / "c"), "-o", str(tmp_path / "a"), "--data", "jargon"]) == 0
    assert "OUTLIER CHANNELS A LAYER" in capsys.readouterr().out
    options = ["--prune-layers", "4", "--prune-beta", "0.5", "--json"]
    assert main(["analyze", str(tmp_path / "c"), "-o", str(tmp_path / "b"), "--data", "jargon", *options]) == 0
    last = json.loads(capsys.readouterr().out)["pruned"]
    assert last["schedule"]["layers"] == [4] and list(last["inputs"]) == ["up", "down"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prune-layers", "5", "--prune-beta", "0.5"), "layer 5 does not exist: the model has layers 1 to 4"),
        (("--prune-layers", "2", "--prune-beta", "1.5"), "1.5 is not between 0 and 1"),
        (("--prune-layers", "2"), "both --prune-layers and --prune-beta"),
    ],
)
def test_mistakes_are_one_sentence(model, tmp_path, capsys, options, words):
    assert main(["analyze", str(model), "-o", str(tmp_path / "out"), "--data", "jargon", *options]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_tokens_are_at_their_positions(model):
    reference = ReferenceModel.from_source(open_source(model))
    reference.pruning = SCHEDULE
    windows = np.random.default_rng(0).integers(3, 259, (2, 40)).tolist()
    found, dense = observe(reference, windows, [32, 8]), observe(reference, windows)
    for i, window in enumerate(windows):
        kept = reference.prune(window, [32, 8]).kept
        for name, seen in found.inputs.items():
            late = name in ("up", "down")
            for layer, segment in enumerate((0, late, 1 + late, 2)):
                left = np.flatnonzero(seen.token_channel[layer, i] >= 0)
                np.testing.assert_array_equal(left, kept[segment])
                assert (np.flatnonzero(seen.token_largest[layer, i]) == left).all()
        # What is left of the second layer's attention output goes on as it was.
        up = [each.inputs["up"].token_largest[1, i, kept[1]] for each in (found, dense)]
        np.testing.assert_allclose(*up, rtol=1e-4)
    assert [len(each) for each in found.maps] == [40, 40, len(kept[1]), len(kept[2])]
    for attention in found.maps:
        np.testing.assert_allclose(attention.sum(1), 1, atol=1e-5)
        assert (np.triu(attention, 1) == 0).all()


def test_a_map_shows_the_stripe_of_the_first_key():
    attention = np.full((500, 500), 1e-3)
    attention[:, 0] = 0.5
    shown = draw_map(Figure().subplots(), attention).get_array()
    assert shown.shape == (63, 63) and (shown[:, 0] == 0.5).all() and (shown[:, 1:] < 0.1).all()


def test_a_pair_of_lines_and_the_layers_that_drop():
    axes = Figure().subplots()
    draw_pair(axes, np.arange(4.0), np.arange(4.0) / 2, SCHEDULE)
    np.testing.assert_array_equal(axes.lines[1].get_xydata(), [(1, 0), (2, 0.5), (3, 1), (4, 1.5)])
    assert [line.get_xdata()[0] for line in axes.lines[2:]] == [2, 3]


def test_outlier_channels_are_counted_by_layer():
    largest = np.array([[1, 1, 1, 7, 8], [1, 1, 1, 6, 1], [0, 0, 0, 0, 1]], "float32")
    assert outlier_channels(largest, 6).tolist() == [2, 0, 1]
