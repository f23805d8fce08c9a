"""OPT and BLOOM with log2 attention, and activations of 4 bits, on emulated boards; bundles with few functions."""

import gc
import re
import subprocess

import numpy as np
import pytest

from agq_tvm.flow.compile import compile_checkpoint
from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.pruning import PruningSchedule
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.runtime.agreement import agreement
from agq_tvm.runtime.board_session import BoardSession
from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.engine import Engine
from tests.boards.on_board import check_bundle, compile_with
from tests.compiled import ROWS
from tests.flow.test_compiled_shifts import shifted_checkpoint
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.emulator


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


def test_weights_on_an_integer_grid(boards, tmp_path, few_functions, disassembler):
    """Chunks of a prompt by bytes in assembly, single tokens by integers that groups scale."""
    settings = {"group_size": 32, "activation": "per-token", "integer_grid": True}
    quantize(write_tiny_model(tmp_path / "m", "llama"), tmp_path / "c", method="rtn", **settings)
    compile_checkpoint(tmp_path / "c", "snapdragon-870", tmp_path / "b", context=64)
    bundle, checkpoint = Bundle(tmp_path / "b"), read_checkpoint(tmp_path / "c")
    tokens = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, 24).tolist()
    with boards.session("snapdragon-870") as session:
        same = check_bundle(session, bundle, checkpoint, tokens, steps=4)
    assert same.mean_kl <= 1e-3 and same.top1 >= 0.95
    listing = subprocess.run([disassembler, "-d", bundle.path / "model.so"], capture_output=True, text=True, check=True)
    assert re.search(r"\tmul\tv\d+\.16b", listing.stdout) and re.search(r"\tmla\tv\d+\.4s", listing.stdout)


def test_shifted_accumulators(boards, tmp_path, few_functions, disassembler):
    checkpoint = shifted_checkpoint(tmp_path, "llama")
    compile_checkpoint(checkpoint.path, "raspberry-pi-4", tmp_path / "b", context=64)
    bundle = Bundle(tmp_path / "b")
    tokens = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, 24).tolist()
    with boards.session("raspberry-pi-4") as session:
        same = check_bundle(session, bundle, checkpoint, tokens, steps=4)
    assert same.mean_kl <= 1e-3 and same.top1 >= 0.95
    listing = subprocess.run([disassembler, "-d", bundle.path / "model.so"], capture_output=True, text=True, check=True)
    assert re.search(r"\tushl\tv\d+\.4s", listing.stdout)


@pytest.mark.parametrize(
    ("family", "renumber", "device"), [("llama", True, "raspberry-pi-4"), ("bloom", False, "snapdragon-870")]
)
def test_a_model_that_prunes(boards, tmp_path, few_functions, family, renumber, device):
    """A prompt loses tokens in every chunk, then decoding goes on, over caches of different lengths."""
    schedule = PruningSchedule((1,), 0.5, renumber)
    quantize(write_tiny_model(tmp_path / "m", family), tmp_path / "c", method="rtn", group_size=64, pruning=schedule)
    compile_checkpoint(tmp_path / "c", device, tmp_path / "b", context=64)
    bundle, reference = Bundle(tmp_path / "b"), ReferenceModel.from_checkpoint(read_checkpoint(tmp_path / "c"))
    tokens = np.random.default_rng(1).integers(0, reference.config.vocab_size, 31).tolist()
    left = reference.prune(tokens, [ROWS, ROWS, ROWS, 3])
    assert len(left.kept[1]) == 3 * ROWS // 2 + 2 + 4
    with boards.session(device) as session:
        engine = Engine(bundle, BoardSession(bundle, session))
        rows = [engine.prefill(tokens[:-4]), *(engine.decode(token) for token in tokens[-4:])]
        del engine
        gc.collect()
    same = agreement(left.logits[-5:], np.stack(rows))
    assert same.mean_kl <= 1e-3 and same.top1 == 1
    dense = agreement(reference.logits(tokens)[-5:], np.stack(rows))
    assert dense.mean_kl > 10 * same.mean_kl


@pytest.mark.parametrize(
    ("instruction_set", "instructions"),
    [("neon", {"mul.16b", "mla.16b"}), ("neon-paper", {"mul.4s", "shl.4s", "orr.16b"})],
)
def test_activations_of_4_bits(boards, tmp_path, few_functions, disassembler, instruction_set, instructions):
    """Byte lanes where the board chooses; the paper's Algorithm 1 where its device file asks for it."""
    settings = {"activation": "per-token", "four_bit": ("o", "gate_up", "down")}
    quantize(write_tiny_model(tmp_path / "m", "llama"), tmp_path / "c", method="rtn", group_size=64, **settings)
    bundle, checkpoint = compile_with(instruction_set, tmp_path / "c", tmp_path), read_checkpoint(tmp_path / "c")
    tokens = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, 24).tolist()
    with boards.session("raspberry-pi-4") as session:
        same = check_bundle(session, bundle, checkpoint, tokens, steps=4)
    assert same.mean_kl <= 1e-3 and same.top1 >= 0.95
    listing = subprocess.run([disassembler, "-d", bundle.path / "model.so"], capture_output=True, text=True, check=True)
    found = {".".join(pair) for pair in re.findall(r"\t(mla|mul|shl|orr)\tv\d+\.(16b|4s)", listing.stdout)}
    assert instructions <= found
    assert ("mla.16b" in found) == (instruction_set == "neon")
