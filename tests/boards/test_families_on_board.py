"""OPT and BLOOM with log2 attention on emulated boards, their bundles with few functions."""

import numpy as np
import pytest

from agq_tvm.flow import compile as compile_flow
from agq_tvm.flow import library
from agq_tvm.flow.compile import compile_checkpoint
from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.models import relax_decoder
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.runtime.bundle import Bundle
from tests.boards.on_board import check_bundle
from tests.compiled import FUNCTIONS, ROWS
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.emulator


@pytest.fixture
def few_functions(monkeypatch):
    """Compile in this process, and only what the test calls."""

    def build(request: library.LibraryRequest):
        library._build(request)
        return library.read_tensors(request)

    monkeypatch.setattr(relax_decoder, "function_names", lambda: FUNCTIONS)
    monkeypatch.setattr(compile_flow, "PREFILL_BUCKETS", (ROWS,))
    monkeypatch.setattr(compile_flow, "build_library", build)


@pytest.mark.parametrize(
    ("family", "attention", "device"), [("opt", "log2-paper", "raspberry-pi-4"), ("bloom", "log2", "snapdragon-870")]
)
def test_tiny_model(boards, tmp_path, few_functions, family, attention, device):
    settings = {"group_size": 64, "attention": attention, "calibration": Calibration(samples=2, length=48)}
    quantize(write_tiny_model(tmp_path / "m", family), tmp_path / "c", method="rtn", **settings)
    compile_checkpoint(tmp_path / "c", device, tmp_path / "b", context=64)
    bundle, checkpoint = Bundle(tmp_path / "b"), read_checkpoint(tmp_path / "c")
    tokens = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, 24).tolist()
    with boards.session(device) as session:
        same = check_bundle(session, bundle, checkpoint, tokens, steps=4)
    assert same.mean_kl <= 1e-3 and same.top1 >= 0.95
