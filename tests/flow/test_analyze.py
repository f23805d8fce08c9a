import json
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from safetensors.numpy import load_file, save_file

from agq_tvm.cli.main import main
from agq_tvm.errors import AgqError
from agq_tvm.flow.analyze import analyze
from agq_tvm.flow.pictures import draw, draw_channels, draw_ratios, pool_columns
from agq_tvm.quantize.observe import InputStatistics, Observation
from tests.tiny import write_tiny_llama, write_tiny_model

INPUTS = {"qkv": 96, "o": 96, "gate_up": 96, "down": 160}
PICTURES = [
    "attention-maps.png",
    "attention-to-start.png",
    *sorted(f"channels-{name}.png" for name in INPUTS),
    "outlier-ratio.png",
]
OUTLIERS = {7: 80.0, 41: 50.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Channels 7 and 41 at the input of gate_up in layer 1 are far larger than the others."""
    path = write_tiny_llama(tmp_path_factory.mktemp("model") / "with-outliers", 3)
    tensors = load_file(path / "model.safetensors")
    for channel, gain in OUTLIERS.items():
        tensors["model.layers.1.post_attention_layernorm.weight"][channel] = gain
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def analysis(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("analysis") / "made"
    return analyze(model, output, "jargon"), output


def strict(path) -> dict:
    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_files(analysis):
    summary, output = analysis
    assert summary["files"] == ["analysis.json", *PICTURES]
    assert sorted(path.name for path in output.iterdir()) == [".agq-analysis", "analysis.json", *PICTURES]
    for name in PICTURES:
        picture = imread(output / name)
        assert picture.shape[0] >= 400 and picture.shape[1] >= 1000
        assert len(np.unique(picture[::3, ::3, 0])) > 20


def test_json_names_the_outliers(analysis, model):
    written = strict(analysis[1] / "analysis.json")
    assert (written["model"], written["text"], written["windows"]) == (str(model), "jargon", 8)
    assert {name: [len(layer["channel_largest"]) for layer in found] for name, found in written["inputs"].items()} == {
        name: [channels] * 2 for name, channels in INPUTS.items()
    }
    layer = written["inputs"]["gate_up"][1]
    assert [found["channel"] for found in layer["outlier_channels"]][:2] == [7, 41]
    largest = np.array(layer["channel_largest"])
    assert layer["largest_channel"] == 7 and layer["largest"] == largest[7] == largest.max()
    assert layer["ratio"] == pytest.approx(largest.max() / np.median(largest), rel=1e-3)
    threshold = written["outlier_threshold"] * np.median(largest)
    assert {found["channel"] for found in layer["outlier_channels"]} == set(np.flatnonzero(largest > threshold))
    assert layer["ratio_without_first_token"] <= layer["ratio"]


def test_json_names_the_tokens(analysis):
    written = strict(analysis[1] / "analysis.json")
    tokens = written["inputs"]["gate_up"][1]["largest_tokens"]
    magnitudes = [token["largest"] for token in tokens]
    assert (
        magnitudes == sorted(magnitudes, reverse=True) and magnitudes[0] == written["inputs"]["gate_up"][1]["largest"]
    )
    for token in tokens:
        assert token["channel"] in OUTLIERS and 0 <= token["window"] < 8 and 0 <= token["position"] < 256
        assert token["token"] >= 3 and len(token["text"]) == 1
    firsts = [layer["windows_where_first_token_is_largest"] for found in written["inputs"].values() for layer in found]
    assert len(firsts) == 8 and all(0 <= count <= 8 for count in firsts)


def test_summary_is_of_the_layer_with_the_highest_ratio(analysis):
    summary, output = analysis
    written = strict(output / "analysis.json")
    for name, layers in written["inputs"].items():
        most = max(layers, key=lambda layer: layer["ratio"])
        assert summary["inputs"][name]["layer"] == most["layer"]
        assert summary["inputs"][name]["ratio"] == most["ratio"]
    assert summary["inputs"]["gate_up"]["layer"] == 1 and summary["inputs"]["gate_up"]["channel"] == 7
    start = written["attention_to_start"]
    heads = np.array(start["heads"])
    assert heads.shape == (2, 6) and ((heads > 0) & (heads < 1)).all()
    np.testing.assert_allclose(start["layers"], heads.mean(1), rtol=1e-3)
    assert summary["attention_to_start"]["layer"] == np.argmax(start["layers"])
    assert start["uniform"] == pytest.approx(sum(1 / seen for seen in range(2, 257)) / 255, rel=1e-3)


def test_command(tiny_checkpoint, tmp_path, capsys):
    """On a checkpoint; the second run replaces what the first wrote."""
    arguments = ["analyze", str(tiny_checkpoint), "-o", str(tmp_path / "out"), "--data", "persuasion"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["inputs"]) == set(INPUTS) and result["window_tokens"] == 256
    (tmp_path / "out" / "analysis.json").unlink()
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in (*INPUTS, *PICTURES, "attention to the first token"))
    assert strict(tmp_path / "out" / "analysis.json")["text"] == "persuasion"


def test_a_model_without_gate(tmp_path):
    made = analyze(write_tiny_model(tmp_path / "model", "opt"), tmp_path / "out", "jargon")
    assert list(made["inputs"]) == ["qkv", "o", "up", "down"] and "channels-up.png" in made["files"]


def test_missing_matplotlib_names_the_extra(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(AgqError, match=r"agq-tvm\[plot\]"):
        analyze(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_that_is_too_short(model, tmp_path):
    (tmp_path / "text").write_text("short")
    with pytest.raises(AgqError, match="5 tokens, less than one window of 256"):
        analyze(model, tmp_path / "out", tmp_path / "text")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize(("columns", "most"), [(1, 500), (499, 500), (500, 500), (501, 500), (11008, 500), (7, 3)])
def test_pooled_columns_hide_no_outlier(columns, most):
    values = np.random.default_rng(columns).random((3, columns))
    pooled = pool_columns(values, most)
    assert pooled.shape[1] <= most and (columns > most or pooled.shape == values.shape)
    for channel in (0, columns // 2, columns - 1):
        planted = values.copy()
        planted[1, channel] = 2
        assert (pool_columns(planted, most) == 2).sum() == 1
        assert pool_columns(planted, most).argmax() % pooled.shape[1] == channel // -(-columns // most)


def statistics(largest: np.ndarray) -> InputStatistics:
    return InputStatistics(largest, largest / 2, np.ones((len(largest), 1, 2)), np.zeros((len(largest), 1, 2), "int32"))


def test_channel_map_shows_where_the_outlier_is():
    largest = np.ones((4, 1200), "float32")
    largest[2, 900] = 100
    axes = Figure().subplots()
    draw_channels(axes, largest)
    shown, (left, right, bottom, top) = axes.images[0].get_array(), axes.images[0].get_extent()
    row, column = np.unravel_index(shown.argmax(), shown.shape)
    assert (left, right, bottom, top) == (-0.5, 1199.5, 3.5, -0.5) and row == 2
    assert (column + 0.5) / shown.shape[1] * 1200 == pytest.approx(900, abs=3)


def test_line_chart_shows_the_ratios():
    largest = np.array([[1, 2, 30], [1, 1, 5]], "float32")
    axes = Figure().subplots()
    draw_ratios(axes, Observation([[1, 2]], {"qkv": statistics(largest)}, np.ones((2, 1))))
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [15, 5])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["qkv", "without the first token"]


@pytest.mark.parametrize("largest", [np.zeros((1, 1)), np.ones((1, 1)), np.zeros((90, 3)), np.eye(2, 40)])
def test_corner_cases_are_drawn(tmp_path, largest):
    observation = Observation([[1, 2]], {"qkv": statistics(largest)}, np.ones((len(largest), 1)))
    draw(observation, "corner", tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
