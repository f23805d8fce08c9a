"""The process of one engine: a JSON object a line on standard input, one on standard output.

    python -m benchmarks.peers.worker ENGINE FORM THREADS WORK

A request is {"do": name of a method below, …its arguments}; an answer is {"value": …} or {"error": text}.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.peers.base import Operands


def timed(run) -> dict[str, float]:
    """Run something once: seconds of wall-clock time and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    cpu = time.process_time() - cpu
    return {"wall": time.perf_counter() - wall, "cpu": cpu}


class Server:
    """What a parent may ask for.

    Parameters
    ----------
    module : module
        Of the engine.
    form : str
        Name of one of its forms of products, of models, or of both.
    threads : int
    work : Path
    """

    def __init__(self, module, form: str, threads: int, work: Path):
        self._module, self._threads, self._work = module, threads, work
        self._product = self._model = None
        self._name = form
        work.mkdir(parents=True, exist_ok=True)

    def _form(self, attribute: str):
        """Return the form of this process, which may name a product as well as a model."""
        return next(form for form in getattr(self._module, attribute) if form.name == self._name)

    def prepare(self, operands: str, rows: int, copies: int) -> dict:
        """Make a product ready: its stored bytes, and its error against the float product."""
        self._product = None  # its memory goes before the next one's comes
        product = self._module.Product(self._form("PRODUCTS"), self._threads, self._work)
        given = Operands(operands, rows, copies)
        product.prepare(given)
        product.run()
        self._product, self._copies = product, copies
        return {"bytes": product.stored_bytes, "error": given.error(product.result())}

    def run(self) -> dict[str, float]:
        """Time the product: the mean over all copies."""
        return {clock: value / self._copies for clock, value in timed(self._product.run).items()}

    def load(self, source: str, context: int) -> dict:
        """Convert and load a model."""
        self._model = self._module.Model(self._form("MODELS"), self._threads, self._work, Path(source), context)
        return {}

    def prefill(self, tokens: list[int]) -> dict[str, float]:
        """Time a prompt."""
        return timed(lambda: self._model.prefill(tokens))

    def decode(self, tokens: list[int]) -> dict[str, float]:
        """Time tokens, one by one, after a prompt of one."""
        self._model.prefill(tokens[:1])
        return timed(lambda: self._model.decode_all(tokens))

    def logits(self, tokens: list[int], path: str) -> dict:
        """Write the logits of every token to a file, float32 [T, V]."""
        np.save(path, self._model.logits(tokens))
        return {}

    def call(self, method: str, **arguments):
        """Call what only this engine has: a function of its module."""
        return getattr(self._module, method)(self._threads, **arguments)


def main() -> None:
    """Answer until standard input ends."""
    # Libraries print what they like: it goes where errors go, and answers to a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine, form, threads, work = sys.argv[1:]
    try:
        server = Server(importlib.import_module(engine), form, int(threads), Path(work))
        _answer(answers, {"value": "ready"})
        for line in sys.stdin:
            request = json.loads(line)
            _answer(answers, {"value": getattr(server, request.pop("do"))(**request)})
    except Exception as error:  # its words go to the process that asked
        _answer(answers, {"error": f"{type(error).__name__}: {error}"})
        raise


def _answer(stream, value: dict) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
