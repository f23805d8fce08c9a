"""An engine for tests of the harness: numpy, with forms that misbehave."""

import os
import time
from pathlib import Path

import numpy as np

from benchmarks.peers import base
from benchmarks.peers.base import Form, ModelForm, Operands

ENVIRONMENT = ""
PACKAGE = "numpy"
PRODUCTS = (
    Form("agq_tvm g32", "g32"),
    Form("fake exact", "g32"),
    Form("fake int8", "int8"),
    Form("fake failing", "g32"),
    Form("fake dying", "g32"),
)
MODELS = (
    ModelForm("torch float32", 32, "float32", 32),
    ModelForm("agq_tvm g32", 4, "int8", 8),
    ModelForm("agq_tvm g32, pruned", 4, "int8", 8, pruned=True),
    ModelForm("fake g32", 4, "int8", 8),
    ModelForm("fake failing", 4, "int8", 8),
    ModelForm("fake int4 head", 4, "int4", 4),
)


class Product(base.Product):
    """The float product; one form ends its process at the third run."""

    def prepare(self, operands: Operands) -> None:
        print("libraries print to standard output")
        if "failing" in self.form.name:
            raise ValueError("no such kernel")
        self._x, self._w, self._runs = operands.x, operands.w, 0
        self.stored_bytes = self._w.nbytes

    def run(self) -> None:
        self._runs += 1
        if "dying" in self.form.name and self._runs == 3:
            os._exit(3)
        self._y = self._x @ self._w.T

    def result(self) -> np.ndarray:
        return self._y


class Model(base.Model):
    """Logits are a function of the token; forms but the float one add noise."""

    def __init__(self, form, threads: int, work: Path, source: Path, context: int):
        if "failing" in form.name:
            raise ValueError("cannot convert")
        self._noise = 0.0 if form.bits == 32 else 0.1
        self._delay = 0.002 if form.name.startswith("agq") else 0.004

    def prefill(self, tokens: list[int]) -> None:
        self.decode(tokens[-1])

    def decode(self, token: int) -> None:
        time.sleep(self._delay)
        self._last = np.sin(np.arange(256) * (token + 1)) + self._noise * np.cos(np.arange(256))

    def last(self) -> np.ndarray:
        return self._last


def limits_here(threads: int) -> dict[str, float]:
    return {"GB/s": 1e3, "GOP/s": 1e6}
