"""Bundles on emulated boards, through the tracker: integers bit for bit, logits, decode; for the real model too."""

import re
import subprocess

import numpy as np
import pytest

from agq_tvm.errors import AgqError
from agq_tvm.flow.compile import compile_checkpoint
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.runtime.board_session import BoardSession
from agq_tvm.runtime.bundle import Bundle
from agq_tvm.targets import load_device
from tests.boards.conftest import DEVICES
from tests.boards.on_board import check_bundle
from tests.conftest import once

pytestmark = pytest.mark.emulator

MATRIX = "snapdragon-8-gen-1"
"""A device with the matrix multiply."""


@pytest.fixture(scope="session", params=[*DEVICES, pytest.param(MATRIX, marks=pytest.mark.slow)])
def device_bundle(request, tmp_path_factory, tiny_checkpoint):
    """A device's name and the tiny checkpoint compiled for it."""

    def make(path) -> None:
        compile_checkpoint(tiny_checkpoint, request.param, path)

    return request.param, once(tmp_path_factory, f"tiny-{request.param}", make)


def check_tiny_model(boards, name: str, bundle: Bundle, path) -> None:
    """Run a bundle of the checkpoint at `path` on an emulated board."""
    checkpoint = read_checkpoint(path)
    tokens = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, 40).tolist()
    with boards.session(name) as session:
        same = check_bundle(session, bundle, checkpoint, tokens, steps=6)
    assert same.mean_kl <= 1e-3 and same.top1 >= 0.99


def test_tiny_model(boards, device_bundle, tiny_checkpoint):
    name, path = device_bundle
    check_tiny_model(boards, name, Bundle(path), tiny_checkpoint)


def test_matrix_multiply(boards, tmp_path, few_functions, disassembler, tiny_checkpoint):
    """Chunks of a prompt by `smmla`, single tokens by `sdot`."""
    compile_checkpoint(tiny_checkpoint, MATRIX, tmp_path / "b", context=64)
    check_tiny_model(boards, MATRIX, Bundle(tmp_path / "b"), tiny_checkpoint)
    check_multiplies(MATRIX, tmp_path / "b", disassembler)


def test_bundle_for_a_better_processor_is_refused_before_it_runs(boards, tmp_path_factory, tiny_checkpoint):
    path = once(
        tmp_path_factory,
        "tiny-snapdragon-870",
        lambda path: compile_checkpoint(tiny_checkpoint, "snapdragon-870", path),
    )
    with boards.session("raspberry-pi-4") as session:
        with pytest.raises(AgqError, match=r"snapdragon-870 and needs .*asimddp") as refusal:
            BoardSession(Bundle(path), session)
        assert session.listdir("") == ""  # nothing was even uploaded
        del refusal


def test_disassembly(device_bundle, disassembler):
    check_multiplies(*device_bundle, disassembler)


def check_multiplies(name: str, path, disassembler: str) -> None:
    """Check that a bundle's library holds the multiplies that its device has, and no others."""
    result = subprocess.run([disassembler, "-d", path / "model.so"], capture_output=True, text=True, check=True)
    found = set(re.findall(r"\t(sdot|smlal2?|smull2?|smmla)\b", result.stdout))
    if name == "raspberry-pi-4":
        assert {"smlal", "smull"} <= found and "sdot" not in found and "smmla" not in found
    else:
        assert "sdot" in found and ("smmla" in found) == (name == MATRIX)
    # What emulates a board with the matrix multiply would run scalable vectors, too.
    assert not re.search(r"\t[zp]\d+[./]", result.stdout)
    assert load_device(name).machine == "aarch64"
