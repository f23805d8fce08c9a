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


@pytest.fixture(scope="session", params=DEVICES)
def device_bundle(request, tmp_path_factory, tiny_checkpoint):
    """A device's name and the tiny checkpoint compiled for it."""

    def make(path) -> None:
        compile_checkpoint(tiny_checkpoint, request.param, path)

    return request.param, once(tmp_path_factory, f"tiny-{request.param}", make)


def test_tiny_model(boards, device_bundle, tiny_checkpoint):
    name, path = device_bundle
    bundle, checkpoint = Bundle(path), read_checkpoint(tiny_checkpoint)
    tokens = np.random.default_rng(1).integers(0, checkpoint.config.vocab_size, 40).tolist()
    with boards.session(name) as session:
        same = check_bundle(session, bundle, checkpoint, tokens, steps=6)
    assert same.mean_kl <= 1e-3 and same.top1 >= 0.99


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
    """The binaries hold the multiply that their device has, and no other."""
    name, path = device_bundle
    result = subprocess.run([disassembler, "-d", path / "model.so"], capture_output=True, text=True, check=True)
    found = set(re.findall(r"\t(sdot|smlal2?|smull2?|smmla)\b", result.stdout))
    if name == "raspberry-pi-4":
        assert {"smlal", "smull"} <= found and "sdot" not in found and "smmla" not in found
    else:
        assert "sdot" in found and "smmla" not in found
    assert load_device(name).machine == "aarch64"
