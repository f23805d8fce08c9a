"""Fixtures of the quantizer's tests."""

import shutil
from pathlib import Path

import pytest
import torch

from agq_tvm.flow.quantize import Calibration, quantize
from tests.tiny import write_tiny_llama

FEW = Calibration(samples=3, length=48)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny matrices are slower on several threads, most of all beside other test processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A tiny float model, embeddings tied; not to be changed."""
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", seed=1)


@pytest.fixture(scope="session")
def quantized(tmp_path_factory):
    """Return ``make(config, **arguments of quantize) -> path``, each made once and not to be changed."""
    made = {}

    def make(config: dict | None = None, **arguments) -> Path:
        key = repr((sorted((config or {}).items()), sorted(arguments.items())))
        if key not in made:
            root = tmp_path_factory.mktemp("quantized")
            source = write_tiny_llama(root / "source", 2, **(config or {}))
            settings = {"method": "rtn", "group_size": 32, "calibration": FEW} | arguments
            quantize(source, root / "checkpoint", **settings)
            made[key] = root / "checkpoint"
        return made[key]

    return make


@pytest.fixture
def static(quantized, tmp_path) -> Path:
    """A checkpoint to damage, with static activations and an untied head."""
    made = quantized({"tie_word_embeddings": False}, activation="static", max_refine=2)
    return Path(shutil.copytree(made, tmp_path / "static"))
