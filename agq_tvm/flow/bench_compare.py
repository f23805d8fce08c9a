"""Two results of `agq bench` side by side."""

import math
import statistics
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.files import read_json
from agq_tvm.flow.bench_report import place, speed_of, title
from agq_tvm.runtime.bench import FORMAT_VERSION
from agq_tvm.tables import as_markdown_table
from agq_tvm.tables import as_table as as_text_table


def read_result(path: Path) -> dict:
    """Read what ``agq bench -o`` wrote.

    Raises
    ------
    AgqError
        If it is missing or damaged, of another version, or of an emulated board.
    """
    if not path.is_file():
        raise AgqError(f"{path} is missing: make it with `agq bench BUNDLE -o {path}`")
    result = read_json(path, "bench result")
    damaged = AgqError(f"{path} is not a result of `agq bench -o`: make it again")
    if result.get("format_version") != FORMAT_VERSION:
        raise damaged
    try:
        if result["emulated"]:
            raise AgqError(f"{path} is of an emulated board, whose time means nothing: compare results of real ones")
        tests = list(result["tests"].values())
        samples = [value for test in tests for value in (*test["samples"], test["mean"])]
        texts = [result["device"], result["model"]["name"], result["model"]["checkpoint_sha256"]]
        positive = all(isinstance(value, float | int) and 0 < value < math.inf for value in samples)
        whole = tests and all(test["samples"] for test in tests)
        if not (whole and positive and all(isinstance(text, str) for text in texts)):
            raise damaged
        title(result), place(result), [speed_of(test) for test in tests]
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise damaged from error
    return result | {"file": str(path)}


def compare(first: dict, second: dict) -> dict:
    """Compare the tests that two results share, round by round.

    Returns
    -------
    dict
        ``first`` and ``second`` (files), and for each test in ``tests`` both speeds as text, ``ratio`` (geometric mean
        of second over first), its standard error ``ratio_stderr`` (None for a single pair) and ``pairs``: a round
        with the one at the same place of the other run, so that a board that warms up counts the same for both.

    Raises
    ------
    AgqError
        If they are of different models or devices, or share no test.
    """
    files = f"{first['file']} and {second['file']}"
    models = [result["model"] for result in (first, second)]
    if models[0]["checkpoint_sha256"] != models[1]["checkpoint_sha256"]:
        names = " and ".join(f"{model['name']} ({model['checkpoint_sha256'][:12]})" for model in models)
        raise AgqError(f"{files} are of different models, {names}: compare results of one checkpoint")
    for what in ("device", "processor"):
        if first.get(what) != second.get(what):
            raise AgqError(
                f"{files} are of different {what}s, {first.get(what)} and {second.get(what)}: their ratio says nothing "
                "about the bundles"
            )
    shared = [name for name in first["tests"] if name in second["tests"]]
    if not shared:
        raise AgqError(f"{files} have no test in common: time both with the same --prefill and --decode")
    tests = {name: _ratio(first["tests"][name], second["tests"][name]) for name in shared}
    return {"first": first["file"], "second": second["file"], "device": first["device"]} | {
        "threads": [first["threads"], second["threads"]],
        "tests": tests,
    }


def _ratio(first: dict, second: dict) -> dict:
    logs = [math.log(b / a) for a, b in zip(first["samples"], second["samples"], strict=False)]
    ratio = math.exp(statistics.mean(logs))
    stderr = ratio * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else None
    return {
        "first": speed_of(first),
        "second": speed_of(second),
        "ratio": ratio,
        "ratio_stderr": stderr,
        "pairs": len(logs),
    }


def as_table(found: dict, markdown: bool = False) -> str:
    """Write a comparison as a table."""
    names = [f"{Path(found[name]).name} TOKENS/S" for name in ("first", "second")]
    rows = [("TEST", *names, "RATIO", "PAIRS")]
    for name, test in found["tests"].items():
        error = "" if test["ratio_stderr"] is None else f" ± {test['ratio_stderr']:.3f}"
        rows.append((name, test["first"], test["second"], f"{test['ratio']:.3f}{error}", str(test["pairs"])))
    note = "RATIO: second over first, ± its standard error; rounds are paired by their place in the run."
    if found["threads"][0] != found["threads"][1]:
        note += f" The first had {found['threads'][0]} threads, the second {found['threads'][1]}."
    return f"{as_markdown_table(rows) if markdown else as_text_table(rows)}\n\n{note}"
