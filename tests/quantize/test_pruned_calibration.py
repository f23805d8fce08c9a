"""Calibration of a scheme that prunes: it sees what is left, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from agq_tvm.quantize import streaming
from agq_tvm.quantize.activations import ActivationQuantizer
from agq_tvm.quantize.pruning import PruningSchedule
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.scheme import Scheme
from agq_tvm.quantize.source import Source, open_source
from agq_tvm.quantize.tensor_names import linear_shapes
from agq_tvm.quantize.weights import dequantize, rtn
from tests.tiny import write_tiny_model

WINDOWS = [np.random.default_rng(i).integers(3, 259, 64).tolist() for i in range(6)]
SCHEDULE = PruningSchedule((1,), 0.5)
FLOAT = Scheme("rtn", 64, False, "none", pruning=SCHEDULE)


class OnGrid(Source):
    """A model whose matrices are rounded to 4 bits already: quantizing it changes nothing."""

    def __init__(self, source: Source):
        super().__init__(source.label, source.raw_config)
        rounded = {f"{name}.weight": source.tensor(f"{name}.weight") for name in linear_shapes(source.config)}
        rounded = {name: dequantize(rtn(value, 64, False)) for name, value in rounded.items()}
        self._tensor = lambda name: rounded[name] if name in rounded else source.tensor(name)


class Inputs:
    """An observer that keeps what reaches every linear, by layer and name."""

    def __init__(self):
        self.inputs = {}

    def linear_input(self, layer, name, x):
        self.inputs.setdefault((layer, name), []).append(x)

    def attention(self, layer, q, k, bias):
        pass


@pytest.fixture(scope="module", params=["llama", "bloom"])
def source(request, tmp_path_factory):
    return OnGrid(open_source(write_tiny_model(tmp_path_factory.mktemp("model") / "m", request.param, 7)))


@pytest.mark.parametrize("renumber", [False, True])
@pytest.mark.parametrize("chunks", [[64], [32, 32]])
def test_the_inputs_are_those_of_the_pruned_model(source, chunks, renumber, monkeypatch):
    scheme, found = replace(FLOAT, pruning=replace(SCHEDULE, renumber=renumber)), []

    def see(inputs, weight, role, scheme, show):
        found.append((role, list(inputs)))
        return ActivationQuantizer("none", 64)

    monkeypatch.setattr(streaming, "_quantizer", see)
    dict(streaming.quantize_layers(source, scheme, WINDOWS, chunks))
    model, seen = ReferenceModel.from_source(source), Inputs()
    model.pruning = scheme.pruning
    for window in WINDOWS:
        model.prune(window, chunks, observer=seen)
    assert [len(inputs[0]) for _, inputs in found] == [64, 64, 32, 32, 32, 32, 32, 32]
    for (role, inputs), ((_, name), expected) in zip(found, seen.inputs.items(), strict=True):
        assert role == name
        for x, y in zip(inputs, expected, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-3 * float(y.abs().max()))


def test_the_float_model_loses_the_same_tokens(source, monkeypatch):
    """The inputs of both are those of the same tokens, so that there is no drift where rounding changes nothing."""
    drifts = []

    def no_change(weight, hessian, group_size, symmetric, drift, integer):
        drifts.append(np.abs(drift).max() / np.abs(hessian).max())
        return rtn(weight, group_size, symmetric)

    monkeypatch.setattr(streaming, "gptq", no_change)
    dict(streaming.quantize_layers(source, replace(FLOAT, method="gptq"), WINDOWS, [32, 32]))
    assert len(drifts) == 8 and max(drifts) < 1e-4


def test_static_scales_are_those_of_what_is_left(source):
    """Up to the first drop nothing changes; after it the largest value may be gone, and no larger one is new."""
    dense = dict(streaming.quantize_layers(source, Scheme("rtn", 64, False, "static"), WINDOWS))
    pruned = dict(streaming.quantize_layers(source, Scheme("rtn", 64, False, "static", pruning=SCHEDULE), WINDOWS))
    attention, after, mlp, down = ([], [], [], [])
    for scales, linear in zip((attention, after, mlp, down), source.config.linears, strict=True):
        name = source.config.layer_prefix.format(layer=0) + linear.parts[0]
        scales += [float(linears[name].act_scale[0]) for linears in (dense, pruned)]
    assert attention[0] == attention[1] and after[0] == after[1]
    assert mlp[1] <= mlp[0] and (mlp[1], down[1]) != (mlp[0], down[0])
