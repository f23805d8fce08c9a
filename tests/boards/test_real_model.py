"""SmolLM2 on emulated boards: every integer of every layer, and logits as close as 8-bit rounding lets them be."""

import numpy as np
import pytest

from agq_tvm.flow.compile import compile_checkpoint
from agq_tvm.flow.quantize import quantize
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.runtime.agreement import agreement
from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.engine import Engine
from agq_tvm.runtime.text import load_tokenizer
from tests.boards.conftest import DEVICES
from tests.boards.on_board import check_bundle
from tests.conftest import once

pytestmark = [pytest.mark.emulator, pytest.mark.slow]

TEXT = (
    "Photosynthesis is the process by which plants convert sunlight into energy. This process is essential for "
    "life on Earth, as it provides the energy needed to sustain life."
)


@pytest.fixture(scope="session")
def real_checkpoint(tmp_path_factory):
    return once(tmp_path_factory, "smollm2-checkpoint", lambda path: quantize("smollm2-135m-instruct", path))


@pytest.fixture(scope="session")
def tokens(real_checkpoint) -> list[int]:
    return load_tokenizer(real_checkpoint).encode(TEXT).ids


@pytest.fixture(scope="session")
def floor(real_checkpoint, tokens):
    """How the reference agrees with itself when it sums in another order.

    A difference in the last place moves an activation across a tie, by a whole code; thirty layers later nothing
    is left of the agreement but what 8-bit rounding has in common. No engine can come closer than this by more
    than chance.
    """
    reference = ReferenceModel.from_checkpoint(read_checkpoint(real_checkpoint))
    exact = reference.logits(tokens, trace=lambda *values: None)
    return agreement(reference.logits(tokens), exact)


def check_against_floor(same, floor) -> None:
    print(f"\nmean KL {same.mean_kl:.5f} (floor {floor.mean_kl:.5f}), top-1 {same.top1:.3f} ({floor.top1:.3f})")
    assert same.mean_kl <= max(1e-3, 3 * floor.mean_kl)
    assert same.top1 >= min(0.99, floor.top1 - 0.1)


@pytest.mark.parametrize("name", DEVICES)
def test_board(boards, tmp_path_factory, real_checkpoint, tokens, floor, name):
    path = once(tmp_path_factory, f"smollm2-{name}", lambda path: compile_checkpoint(real_checkpoint, name, path))
    with boards.session(name, timeout=1800) as session:
        same = check_bundle(session, Bundle(path), read_checkpoint(real_checkpoint), tokens, steps=4)
    check_against_floor(same, floor)


def test_here(tmp_path_factory, real_checkpoint, tokens, floor):
    path = once(tmp_path_factory, "smollm2-host", lambda path: compile_checkpoint(real_checkpoint, "host", path))
    reference = ReferenceModel.from_checkpoint(read_checkpoint(real_checkpoint)).logits(tokens)
    engine = Engine(Bundle(path))
    check_against_floor(agreement(reference, engine.prefill(tokens, all_logits=True)), floor)
    engine.reset()
    one_by_one = np.stack([engine.decode(token) for token in tokens])
    engine.reset()
    # Attention of one row adds up in another order than that of many.
    check_against_floor(agreement(one_by_one, engine.prefill(tokens, all_logits=True)), floor)
