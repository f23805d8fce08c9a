"""Scores of many variants of a model on a text, kept in a directory so that an interrupted run goes on."""

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agq_tvm.files import read_json, write_json
from agq_tvm.flow.quantize import quantize
from agq_tvm.progress import say
from agq_tvm.quantize.calibration import encode_text
from agq_tvm.quantize.checkpoint import Checkpoint, read_checkpoint
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.source import Source
from agq_tvm.quantize.texts import load_text
from agq_tvm.runtime.perplexity import Score, compare, score
from benchmarks.tables import commit


@dataclass(frozen=True)
class Subject:
    """A model under test.

    Attributes
    ----------
    name : str
    source : Source
    texts : tuple of str
        What it is scored on.
    window, windows : int
        Tokens of a window, and windows of each text.
    """

    name: str
    source: Source
    texts: tuple[str, ...]
    window: int
    windows: int


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes
    ----------
    variant : str
    score : Score
    exact : Score
        Of the float model.
    baseline : Score or None
        Of the same weights with float activations.
    note : str
    """

    variant: str
    score: Score
    exact: Score
    baseline: Score | None = None
    note: str = ""

    def upper(self) -> float:
        """Return the change from the baseline, mean and two standard errors."""
        change = compare(self.score, self.baseline or self.exact)
        return change.perplexity_change + 2 * change.perplexity_change_stderr


class Workshop:
    """Makes checkpoints and scores, and keeps both below a directory.

    Parameters
    ----------
    directory : Path
        What is there already is used.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.commits: set[str] = set()

    def checkpoint(self, subject: Subject, name: str, settings: dict) -> Checkpoint:
        """Return the subject quantized with `settings`, arguments of `agq_tvm.flow.quantize.quantize`."""
        path = self._path(subject, name)
        if not path.exists():
            say(f"{subject.name}: making {name}")
            quantize(subject.source, path, **settings)
        return read_checkpoint(path)

    def score(self, subject: Subject, text: str, name: str, model: Callable[[], ReferenceModel]) -> Score:
        """Score all tokens but the first of each window of a text; `model` is called only if there is no score yet."""
        return self.keep(subject, text, name, "all", lambda tokens: score(model().logits, tokens, subject.window))

    def keep(
        self, subject: Subject, text: str, name: str, protocol: str, measure: Callable[[list[int]], Score]
    ) -> Score:
        """Return the score of that name, measured now or earlier."""
        path = self._path(subject, f"{name} {text} {protocol} {subject.windows} of {subject.window}")
        losses, note = path.with_suffix(".npy"), path.with_suffix(".json")
        if not note.exists():
            started = time.perf_counter()
            measured = measure(self._tokens(subject, text))
            losses.parent.mkdir(parents=True, exist_ok=True)
            np.save(losses, measured.losses)
            write_json(note, {"commit": commit()})
            seconds = time.perf_counter() - started
            say(f"{subject.name}, {text}: {name}: perplexity {measured.perplexity:.3f} ({seconds:.0f} s)")
        self.commits.add(read_json(note, "score")["commit"])
        return Score(subject.window, np.load(losses, allow_pickle=False), protocol)

    def _tokens(self, subject: Subject, text: str) -> list[int]:
        with tempfile.TemporaryDirectory() as scratch:
            subject.source.copy_tokenizer(Path(scratch))
            tokens = encode_text(Path(scratch) / "tokenizer.json", load_text(text)[0])
        return tokens[: subject.windows * subject.window]

    def _path(self, subject: Subject, name: str) -> Path:
        return self.directory / _slug(subject.name) / _slug(name)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
