"""Fixtures of the quantizer's tests."""

from pathlib import Path

import pytest

from agq_tvm.flow.quantize import quantize
from tests.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory) -> Path:
    """A tiny float model, embeddings tied."""
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", seed=1)


@pytest.fixture
def checkpoint_of(tmp_path):
    """Return ``make(**arguments of quantize) -> path`` for a fresh tiny model; `config` overrides its config."""

    def make(config: dict | None = None, seed: int = 2, **arguments) -> Path:
        source = write_tiny_llama(tmp_path / "source", seed, **(config or {}))
        quantize(source, tmp_path / "checkpoint", **({"method": "rtn", "group_size": 32} | arguments))
        return tmp_path / "checkpoint"

    return make
