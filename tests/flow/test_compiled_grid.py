"""Weights on an integer grid in a compiled model against the reference, with kernels of their own and without."""

import numpy as np
import pytest

from agq_tvm.flow.quantize import quantize
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.runtime.agreement import agreement
from agq_tvm.runtime.engine import Engine
from agq_tvm.targets import load_device
from tests.boards.on_board import check_accumulators
from tests.compiled import CompiledModel
from tests.quantize.conftest import FEW
from tests.tiny import write_tiny_model

HERE = load_device("host").instruction_set
ROUNDED = {"method": "rtn", "group_size": 32, "activation": "per-token"}
LONG = {"method": "rtn", "group_size": 128, "activation": "static"}
CASES = {  # family, more of what `quantize` takes, instruction set
    "llama": ("llama", ROUNDED, HERE),
    "opt, gptq, static": ("opt", {"method": "gptq", "group_size": 64, "activation": "static"}, HERE),
    "llama, static, groups of 128": ("llama", LONG, HERE),
    "bloom, no kernels of its own": ("bloom", ROUNDED, "generic"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_compiled_model_is_the_reference(tmp_path, monkeypatch, case):
    family, settings, isa = CASES[case]
    source = write_tiny_model(tmp_path / "m", family, 3)
    quantize(source, tmp_path / "c", integer_grid=True, calibration=FEW, **settings)
    checkpoint = read_checkpoint(tmp_path / "c")
    model = CompiledModel(checkpoint, isa, 64, monkeypatch)
    names = [gvar.name_hint for gvar, _ in model.lowered.functions_items()]
    products = [name for name in names if name.startswith("linear_w4")]
    assert products and all(("_grid_" in name) == INSTRUCTION_SETS[isa].grids for name in products)
    reference = ReferenceModel.from_checkpoint(checkpoint)
    tokens = np.random.default_rng(5).integers(3, 259, 40).tolist()
    check_accumulators(model, model, model, checkpoint, reference, tokens[:9])
    engine = Engine(model, model)
    rows = [engine.prefill(tokens[:26], all_logits=True), *(engine.decode(token)[None] for token in tokens[26:])]
    same = agreement(reference.logits(tokens), np.concatenate(rows))
    assert same.mean_kl <= 1e-3 and same.top1 >= 0.97
