"""Counts of executed instructions: exact, repeatable, and of the kernel alone."""

import os
import warnings
from pathlib import Path

import pytest

from agq_tvm.boards.emulate import find_emulator
from agq_tvm.errors import AgqError
from agq_tvm.targets import load_device
from benchmarks.instructions.__main__ import count
from benchmarks.instructions.counting import count_instructions
from tests.boards import kernels

pytestmark = pytest.mark.emulator

DEVICE = "raspberry-pi-4"


@pytest.fixture(scope="module", autouse=True)
def emulator():
    try:
        return find_emulator()
    except AgqError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must count instructions: {error}")
        warnings.warn(f"INSTRUCTIONS ARE NOT COUNTED: {error}", stacklevel=1)
        pytest.skip(str(error))


def test_counts_are_the_same_every_time_and_made_of_blocks(tmp_path):
    device, tensors = load_device(DEVICE), ["float32:64"] * 3
    library = kernels.library(kernels.Add, DEVICE, tmp_path)
    first, second = (count_instructions(Path(library), "add", tensors, device) for _ in range(2))
    assert first == second
    assert sum(size * runs for size, runs in first.blocks.values()) == first.instructions > 16


def test_a_product_of_more_rows_takes_more_instructions(tmp_path):
    device = load_device(DEVICE)
    one, eight = (count(device, rows, "per-token-group", 8, tmp_path) for rows in (1, 8))
    assert eight.multiply.instructions > 4 * one.multiply.instructions
    assert 0.5 < one.ratio < eight.ratio < 16


def test_what_does_not_run_is_said(tmp_path):
    library = kernels.library(kernels.Add, DEVICE, tmp_path)
    with pytest.raises(AgqError, match="no such function"):
        count_instructions(Path(library), "subtract", [], load_device(DEVICE))
