"""What the paper claims, held against the tables: yes or no, with the figures."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from agq_tvm.runtime.perplexity import Score, compare
from benchmarks.accuracy.page import Section
from benchmarks.accuracy.scoring import Row


@dataclass(frozen=True)
class Claim:
    """A claim and what was found."""

    text: str
    answer: str
    figure: str

    def cells(self) -> tuple[str, ...]:
        """Return a row of the table."""
        return (self.text, self.answer, self.figure)


def claims(sections: Iterable[Section]) -> list[Claim]:
    """Test what the given tables can tell."""
    found = []
    for section in sections:
        rows = {(row.variant, row.note): row for row in section.rows}
        where = f"{section.subject.name}, {section.text}"
        if ("agileq-8", "") in rows and ("agileq-8 without TRIP", "") in rows:
            found.append(_less("TRIP helps", where, rows["agileq-8", ""], rows["agileq-8 without TRIP", ""]))
        if section.title == "Four-bit softmax":
            paper, even = (rows[name, ""] for name in (_PAPER_SOFTMAX, _EVEN_SOFTMAX))
            found.append(_less("log2 beats even steps in four bits", where, paper, even))
        if section.title.startswith("Pruning"):
            found += _pruning(section)
    return found


_PAPER_SOFTMAX = "log2, the paper's 16 codes and zero"
_EVEN_SOFTMAX = "even steps of 1/15 of a row's largest"


def _less(text: str, where: str, better: Row, worse: Row) -> Claim:
    change = compare(better.score, worse.score)
    mean, error = 100 * change.perplexity_change, 100 * change.perplexity_change_stderr
    return Claim(f"{text} ({where})", _verdict(-mean, error), f"{mean:+.2f} ± {error:.2f} % perplexity")


def _verdict(gain: float, error: float) -> str:
    """Say yes or no where the gain is more than two standard errors from 0."""
    if math.isnan(error) or abs(gain) <= 2 * error:
        return "cannot be told"
    return "yes" if gain > 0 else "no"


def _pruning(section: Section) -> Iterator[Claim]:
    """Compare what quantizing costs with and without pruning."""
    by_name = {(row.variant, row.note): row.score for row in section.rows}
    dense, *pruned = sorted({note for _, note in by_name}, key=lambda note: float(note.split()[0]))
    for note in pruned:
        cost = {each: _difference(by_name["agileq-8", each], by_name["float", each]) for each in (dense, note)}
        gain = cost[dense] - cost[note]
        means = gain.mean(axis=1)
        error = means.std(ddof=1) / math.sqrt(len(means))
        text = f"pruning {note} lowers the cost of quantizing, inputs of {section.subject.window} tokens"
        figure = f"{gain.mean():+.4f} ± {error:.4f} nat saved"
        yield Claim(f"{text} ({section.subject.name})", _verdict(gain.mean(), error), figure)


def _difference(score: Score, exact: Score) -> np.ndarray:
    return score.losses - exact.losses
