"""The variant agileq-4 on an emulated Raspberry Pi 4 whose device file asks for the paper's multiplier."""

import re
import subprocess

import numpy as np
import pytest

from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.variants import variant_settings
from tests.boards.on_board import check_bundle, compile_with
from tests.tiny import write_tiny_model

pytestmark = pytest.mark.emulator

_INSTRUCTION = re.compile(r"\t(\w+)\t(v\d+)\.(\w+)(?:, (v\d+)\.\w+)?(?:, (v\d+)\.\w+)?(?:, #(\w+))?")
_APART = 40
"""Instructions in which a chain of four may lie, those of its neighbours in between."""


def algorithm_1(listing: str) -> dict[str, int]:
    """Count, by function, chains of the paper's Algorithm 1: MUL, SHL by 8, ORR of both, AND with 0x00FF00FF.

    `bic` with the complement is that AND, where LLVM finds it shorter.
    """
    counts = {}
    for name, body in re.findall(r"<(\w+)>:\n((?:.+\n)*)", listing + "\n"):
        found = [_INSTRUCTION.search(line) for line in body.splitlines()]
        counts[name] = sum(_is_chain(found, i) for i, each in enumerate(found) if each and each[1] == "mul")
    return counts


def _is_chain(found: list, i: int) -> bool:
    """Follow the product that instruction i makes."""
    product, shifted, joined = found[i][2], None, None
    for each in filter(None, found[i + 1 : i + _APART]):
        name, target, _, first, second, shift = each.groups()
        if name == "shl" and first == product and shift == "8":
            shifted = target
        elif name == "orr" and shifted and {first, second} == {product, shifted}:
            joined = target
        elif joined and joined in {"and": (first, second), "bic": (target, first)}.get(name, ()):
            return True
        elif target in (shifted, joined) or (target == product and not joined):
            return False
    return False


def test_the_chain_must_be_whole():
    lines = [
        "   0:\t1\tmul\tv3.4s, v1.4s, v2.4s",
        "   4:\t1\tshl\tv4.4s, v3.4s, #8",
        "   8:\t1\torr\tv5.16b, v4.16b, v3.16b",
        "   c:\t1\tand\tv6.16b, v5.16b, v9.16b",
    ]
    assert algorithm_1("\n".join(["0 <f>:", *lines])) == {"f": 1}
    for missing in range(4):
        assert algorithm_1("\n".join(["0 <f>:", *lines[:missing], *lines[missing + 1 :]])) == {"f": 0}


def test_bundle(boards, tmp_path, few_functions, disassembler):
    calibration = Calibration(samples=3, length=48)
    settings = variant_settings("agileq-4")
    quantize(write_tiny_model(tmp_path / "m", "llama"), tmp_path / "c", calibration=calibration, **settings)
    bundle, checkpoint = compile_with("neon-paper", tmp_path / "c", tmp_path), read_checkpoint(tmp_path / "c")
    tokens = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, 24).tolist()
    with boards.session("raspberry-pi-4") as session:
        same = check_bundle(session, bundle, checkpoint, tokens, steps=4)
    assert same.mean_kl <= 1e-3 and same.top1 >= 0.95
    listing = subprocess.run([disassembler, "-d", bundle.path / "model.so"], capture_output=True, text=True, check=True)
    chains = algorithm_1(listing.stdout)
    loops = {name: count for name, count in chains.items() if name.startswith("linear_") and "_compute_" in name}
    narrow = {name: count for name, count in loops.items() if name.startswith("linear_w4a4")}
    # o, gate_up and down, for one row and for eight; what reads 8-bit activations multiplies otherwise.
    assert len(narrow) == 6 and min(narrow.values()) >= 8
    assert max(loops[name] for name in loops.keys() - narrow.keys()) == 0
