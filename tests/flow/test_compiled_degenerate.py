"""A model with dead, constant and huge channels, by GPTQ and static TRIP, compiled: integers and logits."""

import numpy as np

from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.runtime.agreement import agreement
from agq_tvm.runtime.engine import Engine
from agq_tvm.targets import load_device
from tests.boards.on_board import check_accumulators
from tests.compiled import CompiledModel
from tests.degenerate import spoil
from tests.tiny import write_tiny_model


def test_the_compiled_model_is_the_reference(tmp_path, monkeypatch):
    spoil(write_tiny_model(tmp_path / "m", "opt", 5))
    settings = {"method": "gptq", "activation": "static", "max_refine": 6, "group_size": 32}
    quantize(tmp_path / "m", tmp_path / "c", calibration=Calibration(samples=3, length=48), **settings)
    checkpoint = read_checkpoint(tmp_path / "c")
    model = CompiledModel(checkpoint, load_device("host").instruction_set, 64, monkeypatch)
    reference = ReferenceModel.from_checkpoint(checkpoint)
    tokens = np.random.default_rng(5).integers(3, 259, 30).tolist()
    check_accumulators(model, model, model, checkpoint, reference, tokens[:9])
    same = agreement(reference.logits(tokens), Engine(model, model).prefill(tokens, all_logits=True))
    assert same.mean_kl <= 1e-3 and same.top1 >= 0.97
