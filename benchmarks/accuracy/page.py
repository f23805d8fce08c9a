"""The tables of accuracy.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agq_tvm.quantize.texts import load_text
from agq_tvm.runtime.perplexity import compare
from benchmarks.accuracy.scoring import Row, Subject
from benchmarks.tables import aligned, cpu_name


@dataclass(frozen=True)
class Bound:
    """A variant's change from the same weights with float activations, held against a limit."""

    variant: str
    upper: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether mean and two standard errors stay below the limit."""
        return self.upper <= self.limit


@dataclass(frozen=True)
class Section:
    """One table.

    Attributes
    ----------
    subject : Subject
    text : str
    title : str
    rows : tuple of Row
    limits : mapping
        By variant.
    """

    subject: Subject
    text: str
    title: str
    rows: tuple[Row, ...]
    limits: Mapping[str, float] = field(default_factory=dict)

    def bounds(self) -> list[Bound]:
        """Return what is held against limits."""
        return [
            Bound(row.variant, row.upper(), self.limits[row.variant]) for row in self.rows if row.variant in self.limits
        ]

    def as_dict(self) -> dict:
        """Return the table for machines."""
        return {
            "model": self.subject.name,
            "text": self.text,
            "sha256": load_text(self.text)[1],
            "table": self.title,
            "window": self.subject.window,
            "rows": [_as_dict(row) for row in self.rows],
            "bounds": [bound.__dict__ | {"met": bound.met} for bound in self.bounds()],
        }

    def as_markdown(self) -> str:
        """Return the table for people."""
        score = self.rows[0].score
        scored = "the last quarter's every" if score.protocol == "suffix" else "every but the first"
        lines = [
            f"## {self.title}: {self.subject.name}",
            "",
            f"{self.text} (sha256 {load_text(self.text)[1][:12]}), {len(score.losses)} windows of {score.window},",
            f"{scored} token scored: {score.tokens}.",
            "",
            "```text",
            aligned(_without_empty_columns([_HEADER, *map(_cells, self.rows)])),
            *(_verdict(bound) for bound in self.bounds()),
            "```",
            "",
        ]
        return "\n".join(lines)


_HEADER = ("variant", "", "perplexity", "change %", "± SE", "of its weights %", "± SE")


def _without_empty_columns(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [tuple(row[i] for i in kept) for row in rows]


def _cells(row: Row) -> tuple[str, ...]:
    cells = (row.variant, row.note, f"{row.score.perplexity:.3f}", *_change(row.score, row.exact))
    return (*cells, *(_change(row.score, row.baseline) if row.baseline else ("", "")))


def _change(score, exact) -> tuple[str, str]:
    if score is exact:
        return "", ""
    change = compare(score, exact)
    return f"{100 * change.perplexity_change:+.2f}", f"{100 * change.perplexity_change_stderr:.2f}"


def _verdict(bound: Bound) -> str:
    verdict = "met" if bound.met else "NOT MET"
    upper, limit = 100 * bound.upper, 100 * bound.limit
    return f"{verdict}: {bound.variant}: {upper:+.2f} % with two standard errors, limit {limit:g} %"


def _as_dict(row: Row) -> dict:
    found = {"variant": row.variant, "note": row.note, "perplexity": row.score.perplexity}
    for name, other in (("float", row.exact), ("same_weights", row.baseline)):
        if other is not None and other is not row.score:
            change = compare(row.score, other)
            found[f"change_from_{name}"] = change.perplexity_change
            found[f"change_from_{name}_stderr"] = change.perplexity_change_stderr
    return found


def write_page(
    path: Path, sections: Sequence[Section], claims: Sequence[tuple[str, ...]], commits: Sequence[str]
) -> None:
    """Write the page: claims of the paper with their answers, then the tables."""
    parts = [_HEAD.format(machine=cpu_name(), commits=", ".join(commits))]
    if claims:
        table = aligned([("claim", "found", "figure"), *claims])
        parts.append(f"## The paper's claims\n\n```text\n{table}\n```\n")
    path.write_text("\n".join([*parts, *(section.as_markdown() for section in sections)]), encoding="utf-8")


_HEAD = """# Accuracy

Made by `python -m benchmarks.accuracy --models DIR`, on {machine}, scores of commit {commits}.

SmolLM2 comes as 4 bit already (GGUF Q4_1), so "float" is that model unpacked, and "ours" keeps its grid; everything
else makes new weights. The small OPT and BLOOM were given to the command: trained for minutes on public-domain
novels, they are nearly blind to quantization and show that the families work, not which method is better. Outlier
versions have 8 channels scaled up by 2^6 in every norm and down in the weights that read them, which leaves floats as
they are. Differences are paired, token by token, with the float model or with the same weights and float
activations ("of its weights"). Texts ship with the package; calibration uses another one: 24 windows of 512 tokens for
variants, 8 where activations alone are looked at.

Static scales, four-bit softmax and `release` are simulated, since what they are compared with (exponents of channels
under scales of groups, a first token in float, even steps) is in no compiled model; everything else is what a
checkpoint's reference computes, to which compiled models are held bit for bit in the integers.
"""
