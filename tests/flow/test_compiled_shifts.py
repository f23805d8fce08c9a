"""The integer-only form in a compiled model, with outlier channels that make it shift, against the reference."""

import numpy as np
import pytest

from agq_tvm.errors import AgqError
from agq_tvm.flow.compile import compile_checkpoint
from agq_tvm.flow.packing import check_overflow
from agq_tvm.flow.quantize import quantize
from agq_tvm.quantize import shifts
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.outliers import with_outliers
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.source import open_source
from agq_tvm.runtime.agreement import agreement
from agq_tvm.runtime.engine import Engine
from agq_tvm.targets import load_device
from tests.boards.on_board import check_accumulators
from tests.compiled import CompiledModel
from tests.quantize.conftest import FEW
from tests.quantize.test_shifts import SHIFTED
from tests.tiny import write_tiny_model

HERE = load_device("host").instruction_set
CASES = {  # family, more of what `quantize` takes, instruction set
    "llama": ("llama", {}, HERE),
    "opt, 4 bit, symmetric": ("opt", {"symmetric": True, "four_bit": ("qkv", "down")}, "generic"),
}


def shifted_checkpoint(folder, family: str, **more):
    """Return a checkpoint whose exponents fall by more than 1 in some linear."""
    short = {"intermediate_size": 150} if family == "llama" else {}  # its last block has 22 channels
    source = open_source(write_tiny_model(folder / "m", family, 3, **short))
    settings = SHIFTED | {"method": "rtn", "calibration": FEW} | more
    quantize(with_outliers(source, 10, 4), folder / "c", **settings)
    checkpoint = read_checkpoint(folder / "c")
    config = checkpoint.config
    parts = [checkpoint.fused(0, linear.parts)[0] for linear in config.linears]
    assert max(shifts.block_shifts(part.alpha).max() for part in parts) >= 2
    return checkpoint


@pytest.mark.parametrize("case", CASES)
def test_the_compiled_model_is_the_reference(tmp_path, monkeypatch, case):
    family, more, isa = CASES[case]
    checkpoint = shifted_checkpoint(tmp_path, family, **more)
    model = CompiledModel(checkpoint, isa, 64, monkeypatch)
    names = [gvar.name_hint for gvar, _ in model.lowered.functions_items()]
    products = [name for name in names if name.startswith("linear_w4")]
    assert len(products) >= 2 * 4 and all("column_shift" in name for name in products)
    reference = ReferenceModel.from_checkpoint(checkpoint)
    tokens = np.random.default_rng(5).integers(3, 259, 40).tolist()
    check_accumulators(model, model, model, checkpoint, reference, tokens[:9])
    engine = Engine(model, model)
    rows = [engine.prefill(tokens[:26], all_logits=True), *(engine.decode(token)[None] for token in tokens[26:])]
    same = agreement(reference.logits(tokens), np.concatenate(rows))
    assert same.mean_kl <= 1e-3 and same.top1 >= 0.97


def test_what_may_overflow_is_not_compiled(tmp_path, monkeypatch):
    """As from another program, or from a checkpoint that was changed."""
    checkpoint = shifted_checkpoint(tmp_path, "llama")
    check_overflow(checkpoint)
    monkeypatch.setattr(shifts, "INT32_LARGEST", 300_000)
    with pytest.raises(AgqError, match=r"layers\.0\..*int32: lower max_refine"):
        compile_checkpoint(tmp_path / "c", "host", tmp_path / "b")
    assert not (tmp_path / "b").exists()
