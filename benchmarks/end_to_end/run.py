"""Engines asked in turn for a prompt and for tokens after one; logits of each beside those of the float model.

Engines are loaded in batches, by the bits of their heads: what is compared is in memory together, and no more.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agq_tvm.errors import AgqError
from benchmarks.end_to_end.models import Subject, text_tokens
from benchmarks.end_to_end.verdict import OURS
from benchmarks.peers import base, fleet

PREFILL_TOKENS, DECODE_TOKENS, TEXT_TOKENS = 512, 64, 128
CONTEXT = PREFILL_TOKENS + DECODE_TOKENS
FEWEST_ROUNDS = 2
REFERENCE = "torch float32"


@dataclass(frozen=True)
class Run:
    """What is measured.

    Attributes
    ----------
    work : Path
    only : list of str
        See `benchmarks.peers.fleet.named`.
    rounds : int
        At most.
    seconds : float
        That the rounds of a model and a number of threads may take, about.
    engines : dict of str to module
    """

    work: Path
    only: list[str]
    rounds: int
    seconds: float
    engines: dict


def prompt_of(vocab_size: int) -> list[int]:
    """Return the tokens that every engine gets."""
    return [(7 * i + 1) % vocab_size for i in range(PREFILL_TOKENS)]


def measure_subject(run: Run, subject: Subject, threads: int) -> tuple[list[dict], fleet.Fleet]:
    """Measure one model with a number of threads.

    Returns
    -------
    rows : list of dict
        One for each engine's form.
    fleet : Fleet
        Stopped; it says what was missing.
    """
    found = fleet.Fleet(run.work, threads)
    forms = [form for engine in run.engines.values() for form in getattr(engine, "MODELS", ())]
    forms = [form for form in forms if _meant(form, subject, run.only)]
    batches = sorted({form.head_bits for form in forms}, reverse=True)  # the float reference first
    rows, reference = [], None
    for bits in batches:
        batch = [form for form in forms if form.head_bits == bits]
        try:
            made, logits = _batch(run, found, subject, batch, run.seconds * len(batch) / len(forms))
        finally:
            found.stop()
        reference = logits.get(REFERENCE, reference)
        for row in made:
            own = logits.get(row["engine"])
            row["kl"] = None if own is None or reference is None else divergence(reference, own)
        rows += made
    return rows, found


def _meant(form: base.ModelForm, subject: Subject, only: list[str]) -> bool:
    """Say whether a form is measured: float ones only where they are what logits are compared with."""
    if (form.kept or form.bits > 8) and not subject.kept:
        return False
    return fleet.named(form, [*only, REFERENCE] if only else [])


def _batch(run: Run, found: fleet.Fleet, subject: Subject, batch: list, seconds: float) -> tuple[list, dict]:
    """Load forms, time them in turn, and take their logits."""
    forms = found.start(run.engines, "MODELS", lambda form: form in batch)
    for name in forms:
        print(f"{subject.name}: loading {name}", file=sys.stderr)
        _ask(found, name, "load", source=str(subject.path.absolute()), context=CONTEXT)
    prompt = prompt_of(subject.vocab_size)
    steps = {name: _step(found, name, prompt) for name in found.workers}
    times = fleet.rounds_of(steps, found.threads, run.rounds, seconds, FEWEST_ROUNDS)
    rows = [row_of(forms[name], subject, found.threads, found_times) for name, found_times in times.items()]
    logits = {}
    if subject.kept:
        text = text_tokens(subject, TEXT_TOKENS)
        for name in list(found.workers):
            path = run.work / "logits" / f"{name.replace(' ', '-').replace(',', '')}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            if _ask(found, name, "logits", tokens=text, path=str(path.absolute())) is not None:
                logits[name] = np.load(path)
    return [row for row in rows if row["rounds"]], logits


def _ask(found: fleet.Fleet, name: str, do: str, **arguments):
    """Ask an engine; None if it fails, which leaves it out."""
    with found.guarded(name):
        return found.workers[name].ask(do, **arguments)
    return None


def _step(found: fleet.Fleet, name: str, prompt: list[int]):
    def step() -> dict | None:
        if (prefill := _ask(found, name, "prefill", tokens=prompt)) is None:
            return None
        decode = _ask(found, name, "decode", tokens=prompt[:DECODE_TOKENS])
        return None if decode is None else {"prefill": prefill, "decode": decode}

    return step


def row_of(form: base.ModelForm, subject: Subject, threads: int, times: list[dict]) -> dict:
    """Describe the measurements of one form: tokens per second."""
    row = {
        "model": subject.name,
        "engine": form.name,
        "threads": threads,
        "bits": form.bits,
        "head": form.head,
        "head_bits": form.head_bits,
        "pruned": form.pruned,
        "rounds": len(times),
    }
    for work, tokens in (("prefill", PREFILL_TOKENS), ("decode", DECODE_TOKENS)):
        rates = [tokens / fleet.lower(each[work], threads) for each in times]
        row[work] = statistics.median(rates) if rates else None
        row[f"{work}_std"] = statistics.pstdev(rates) if rates else None
    return row


def divergence(reference: np.ndarray, logits: np.ndarray) -> float:
    """Return the mean over tokens of KL(reference ‖ logits), in nats; both [T, V]."""

    def log_probabilities(values: np.ndarray) -> np.ndarray:
        shifted = values.astype("float64") - values.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    if reference.shape != logits.shape:
        raise AgqError(f"logits of shape {logits.shape} cannot be compared with {reference.shape}")
    p, q = log_probabilities(reference), log_probabilities(logits)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def sparsity_note() -> str:
    """Say what pruned rows do."""
    from benchmarks.peers.engines import ours

    depths = ", ".join(f"{depth:.0%}" for depth in ours.PRUNED_DEPTHS)
    return (
        f"pruned: {ours.PRUNED_SHARE:.0%} of the prompt's tokens are gone after {depths} of the layers, in {OURS} alone"
    )
