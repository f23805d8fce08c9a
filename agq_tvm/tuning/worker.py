"""The process that measures candidates, so that one that crashes or hangs takes only this process along.

It reads a job in JSON from each line of its input and answers with a line of JSON. See `workers.Worker`, its other end.
"""

import gc
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from agq_tvm.targets import Device
from agq_tvm.tuning.helpers import MAIN
from agq_tvm.tuning.measure import CRASHED, FAILED, HUNG, LOST, UNFIT, Argument, Effort, MeasureError, measure, prepare

_GRACE = 30
"""Seconds after a job's time limit in which the other end should have ended this process."""

_WORDS = (
    ("session has expired", HUNG),
    ("was ended by signal 9", LOST),  # by the board, which ran out of memory, or by somebody
    ("the session on the board", CRASHED),
    ("the board was stopped", LOST),
    ("kShutdown", LOST),
    ("Connection reset", LOST),
    ("Connection refused", LOST),
    ("Broken pipe", LOST),
)


def main() -> None:
    """Serve jobs until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what TVM or a candidate prints is no answer
    jobs = iter(sys.stdin.readline, "")

    def say(value: dict) -> None:
        answers.write(json.dumps(value) + "\n")

    serve = {"here": _Here, "board": _OnBoard, "build": _Build}[sys.argv[1]](say)
    say({"ready": True})
    for line in jobs:
        job = json.loads(line)
        # The kernel ends this process, whatever a candidate does to it, even if the other end has died.
        signal.alarm(int(job["limit"] + job.get("wait", 0)) + _GRACE)
        say(_answer(serve, job))
        signal.alarm(0)


def _answer(serve: Callable[[dict], dict], job: dict) -> dict:
    try:
        return serve(job)
    except MeasureError as error:
        return {"kind": error.kind, "text": error.text}
    except Exception as error:  # a candidate may raise anything
        return {"kind": FAILED, "text": _first_line(error)}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _measured(place, job: dict, board: str = "") -> dict:
    arguments = [Argument(**argument | {"shape": tuple(argument["shape"])}) for argument in job["arguments"]]
    if "save" in job:
        return _saved(place, job, arguments)
    effort = Effort(**job["effort"])
    deadline = time.monotonic() + job["limit"]
    before = job["fixed"].get(board), board not in job["slow"]
    measurement, fixed = measure(place, job["path"], arguments, job["threads"], effort, deadline, *before)
    return {"measurement": asdict(measurement), "fixed": fixed}


def _saved(place, job: dict, arguments: list[Argument]) -> dict:
    """Run a kernel once and write what it wrote to files."""
    with place.threads(job["threads"]):
        function = place.library(job["path"])
        operands = prepare(place, function, arguments)
        function(MAIN)(*operands)
        for number, path in job["save"].items():
            np.save(path, place.array(operands[int(number)]))
    return {"saved": job["save"]}


class _Here:
    """Measures on this machine."""

    def __init__(self, _say) -> None:
        from agq_tvm.tuning.places import Here

        self._place = Here()

    def __call__(self, job: dict) -> dict:
        return _measured(self._place, job)


class _Build:
    """Builds candidates."""

    def __init__(self, _say) -> None:
        sys.modules.setdefault("torch", None)  # TVM would import it, and needs none of it
        from agq_tvm.tuning.builder import build_job

        self._build = build_job

    def __call__(self, job: dict) -> dict:
        return self._build(job)


class _OnBoard:
    """Measures on boards, each job on the one that the tracker gives."""

    def __init__(self, say) -> None:
        sys.modules.setdefault("torch", None)  # TVM would import it, and needs none of it
        import tvm  # noqa: F401

        self._say = say

    def __call__(self, job: dict) -> dict:
        try:
            return self._on_board(job)
        finally:
            gc.collect()  # the session ends with the last object that it has given

    def _on_board(self, job: dict) -> dict:
        from agq_tvm.boards.status import board_status, unfit
        from agq_tvm.boards.tracker import open_session, request_board
        from agq_tvm.errors import AgqError
        from agq_tvm.tuning.places import Board

        try:
            grant = request_board(job["tracker"], job["key"], job["wait"])
            board = grant.board
            self._say({"board": board})  # from now on the time of the candidate runs
            session = open_session(grant, job["limit"])
        except AgqError as error:
            raise MeasureError(LOST, str(error)) from None
        try:
            complaint = unfit(session, Device(**job["device"]))
            if complaint:
                raise MeasureError(UNFIT, f"{board} {complaint}: take the board's own device as --target")
            place = Board(session)
            if place.keeps_time == job["emulated"]:
                kinds = ("real", "emulated") if place.keeps_time else ("emulated", "real")
                raise MeasureError(UNFIT, f"{board} is {kinds[0]} and others are {kinds[1]}: give it a key of its own")
            answer = _measured(place, job, board)
            if "measurement" in answer:
                told = {"board": board, "emulated": not place.keeps_time, "status": board_status(session) or {}}
                answer["measurement"] |= told
        except MeasureError as error:
            return {"kind": error.kind, "text": error.text, "board": board}
        except Exception as error:
            return _verdict(error) | {"board": board}
        return answer | {"board": board}


def _verdict(error: Exception) -> dict:
    """Say whether an error over RPC speaks of the candidate or of the board, by the words of its server."""
    text = re.sub(r"\bcode=1\b", "code=kShutdown", str(error))  # some of TVM's messages have the number
    kinds = [kind for words, kind in _WORDS if words in text]
    kind = kinds[0] if kinds else FAILED
    told = next((line.strip() for line in text.splitlines() if any(words in line for words, _ in _WORDS)), "")
    if "kShutdown" in told:
        told = "the connection to the board was lost"
    return {"kind": kind, "text": told.rpartition("RPCError: ")[2] or _first_line(error)}


if __name__ == "__main__":
    main()
