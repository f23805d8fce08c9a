"""The parent's side of a worker process."""

import json
import os
import selectors
import subprocess
import time
from pathlib import Path

from agq_tvm.errors import AgqError
from benchmarks.tables import ROOT

STARTING_LIMIT, ANSWER_LIMIT = 300, 1800
"""Seconds that a process may take to start, and for an answer: converting a model is one."""


class Worker:
    """A process that answers requests.

    Parameters
    ----------
    name : str
        For messages.
    command : list of str
    cores : list of int
        Processors that it may use.
    log : Path
        Where its standard error goes.
    """

    def __init__(self, name: str, command: list[str], cores: list[int], log: Path):
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(len(cores))
        environment = os.environ | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TVM_NUM_THREADS": threads,
            "PYTHONPATH": str(ROOT),
        }
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=environment,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._rest = b""
        self._answer(STARTING_LIMIT)

    def ask(self, do: str, **arguments):
        """Send a request and return the answer's value.

        Raises
        ------
        AgqError
            If the process fails, dies or takes too long; it is stopped then.
        """
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        except OSError:
            raise AgqError(f"{self.name} is not running any more: see {self.log}") from None
        return self._answer(ANSWER_LIMIT)

    def _answer(self, limit: float):
        end = time.monotonic() + limit
        while b"\n" not in self._rest:
            if not self._selector.select(max(0, end - time.monotonic())):
                self.stop()
                raise AgqError(f"{self.name} gave no answer in {limit} s: see {self.log}")
            if not (found := self._process.stdout.read(1 << 16)):
                status = self._process.wait()
                raise AgqError(f"{self.name} died (exit status {status}): see {self.log}")
            self._rest += found
        line, self._rest = self._rest.split(b"\n", 1)
        answer = json.loads(line)
        if "error" in answer:
            self.stop()
            raise AgqError(f"{self.name} failed: {answer['error']}: see {self.log}")
        return answer["value"]

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._selector.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.stop()
