"""Prefill of 512 tokens and decoding of 64 beside other engines, and each engine's logits beside the float model's.

    python -m benchmarks.end_to_end --work DIR [--threads 1,2] [--only TEXT,TEXT] [--models NAME,NAME]
                                    [--rounds N] [--seconds S]

Engines are installed by `python -m benchmarks.peers --work DIR`; what they convert stays in DIR, so that only the
first run takes the time for it. Models: TinyLlama-1.1B's shape with random weights, and SmolLM2-135M.
"""

import argparse
import sys
from pathlib import Path

from agq_tvm.errors import AgqError
from benchmarks import tables
from benchmarks.end_to_end import models, run
from benchmarks.end_to_end.verdict import verdicts
from benchmarks.peers import base

SUBJECTS = {"random": models.random_subject, "smollm2": models.real_subject}


def main() -> None:
    """Read the command line, measure, print, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="environments, models, conversions")
    parser.add_argument("--models", default=",".join(SUBJECTS), metavar="NAME,…", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="at most; default: %(default)s")
    parser.add_argument("--json", type=Path, default=tables.RESULTS / "end_to_end.json", metavar="FILE")
    tables.add_run_options(parser)
    args = parser.parse_args()
    names = args.models.split(",")
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if unknown := set(names) - set(SUBJECTS):
        parser.error(f"there is no {', '.join(sorted(unknown))}: give some of {', '.join(SUBJECTS)}")
    seconds = args.seconds / len(names) / len(args.threads)
    asked = run.Run(args.work, args.only, args.rounds, seconds, base.engines())
    try:
        measure(asked, [SUBJECTS[name](args.work) for name in names], args.threads, args.json)
    except AgqError as error:
        sys.exit(f"error: {error}")


def measure(asked: run.Run, subjects: list[models.Subject], threads: list[int], path: Path) -> None:
    """Measure every model with each number of threads; what there is is written after each, and printed at the end."""
    rows, versions, missing = [], {}, {}
    bounds = {subject.name: {"prefill": subject.prefill, "decode": subject.decode} for subject in subjects}
    contents = {"threads": threads, "rounds": asked.rounds, "engines": versions, "missing": missing}
    contents |= {"pruning": run.sparsity_note(), "results": rows}
    for subject in subjects:
        for count in threads:
            made, found = run.measure_subject(asked, subject, count)
            rows += made
            versions |= found.versions
            missing |= {f"{subject.name}, {name}, threads: {count}": text for name, text in found.missing.items()}
            judged = verdicts(rows, bounds)
            packages = ("apache-tvm", "numpy")
            tables.write_report(path, tables.report("benchmarks.end_to_end", packages, **contents, verdicts=judged))
    print(as_lines(rows))
    print(f"\n{run.sparsity_note()}\n")
    print(judged_lines(judged))
    for name, reason in missing.items():
        print(f"NOT MEASURED: {name}: {reason}")


def as_lines(rows: list[dict]) -> str:
    """Write rows as a table, those of a model by how fast they decode."""
    head = ("model", "threads", "engine", "bits", "head", f"pp{run.PREFILL_TOKENS} tok/s", "±")
    lines = [(*head, f"tg{run.DECODE_TOKENS} tok/s", "±", "KL", "rounds")]
    for row in sorted(rows, key=lambda row: (row["model"], row["threads"], -row["head_bits"], -row["decode"])):
        rates = [f"{row[key]:.1f}" for key in ("prefill", "prefill_std", "decode", "decode_std")]
        kl = "-" if row["kl"] is None else f"{row['kl']:.5f}"
        cells = (row["model"], str(row["threads"]), row["engine"], str(row["bits"]), row["head"])
        lines.append((*cells, *rates, kl, str(row["rounds"])))
    return tables.aligned(lines)


def judged_lines(judged: list[dict]) -> str:
    """Write verdicts as a table."""
    lines = [("model", "threads", "ours", "work", "beside", "times", "bound", "met")]
    for each in judged:
        bound = "-" if each["bound"] is None else f"{each['bound']:.2f}"
        met = {None: "-", True: "yes", False: "no"}[each["met"]]
        cells = (each["model"], str(each["threads"]), each["engine"], each["work"], each["beside"])
        lines.append((*cells, f"{each['value']:.2f}", bound, met))
    return tables.aligned(lines)


if __name__ == "__main__":
    main()
