"""Every variant on one model, paired with the float model and with the same weights at float activations."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from agq_tvm.flow.compile import compile_checkpoint
from agq_tvm.flow.evaluate import RELEASE_CALIBRATION, score_reference
from agq_tvm.flow.evaluate_bundle import evaluate_bundle
from agq_tvm.flow.quantize import Calibration
from agq_tvm.quantize.calibration import cut_windows
from agq_tvm.quantize.checkpoint import Checkpoint
from agq_tvm.quantize.pruning import PruningSchedule
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.release import release_model
from agq_tvm.quantize.variants import VARIANTS
from agq_tvm.runtime.perplexity import Score
from benchmarks.accuracy.scoring import Row, Subject, Workshop

OURS_LIMIT, OURS_4_LIMIT, TRIP_LIMIT = 0.005, 0.06, 0.03
COMPILED, COMPILED_LIMIT = "ours, W4A8, compiled", 0.002
# Layers of 30 after which tokens go, and shares gone in the end; other depths take the same parts of theirs.
PRUNED_AFTER = (15, 20, 25)
BETAS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Variant:
    """How a checkpoint is made and read.

    Attributes
    ----------
    name : str
        What the table calls it.
    settings : dict
        Arguments of `quantize`.
    paired : bool
        Whether to score the same weights with float activations too.
    limit : float or None
        How much the perplexity may grow from there, mean and two standard errors.
    """

    name: str
    settings: dict
    paired: bool = False
    limit: float | None = None


CALIBRATION = Calibration(samples=24)
_PAPER = VARIANTS["agileq-8"]
W4A16 = Variant("W4A16, GPTQ", VARIANTS["w4a16"])
AGILEQ_8 = Variant("agileq-8", _PAPER)
FIXED = (
    Variant("W4A16, round to nearest", {"method": "rtn", "activation": "none"}),
    W4A16,
    Variant("W8A8", VARIANTS["w8a8"]),
    Variant("agileq-8 without TRIP", {**_PAPER, "max_refine": 0}),
    AGILEQ_8,
    Variant("agileq-8, integers only", {**_PAPER, "group_size": "column", "shifts": True}),
    Variant("agileq-4", VARIANTS["agileq-4"]),
)


WITH_OUTLIERS = (FIXED[0], W4A16, AGILEQ_8)
"""What is measured of versions with outlier channels, beside ours."""


def ours(subject: Subject) -> tuple[Variant, Variant]:
    """Return what is best at W4A8 and at W4A4: a model that is 4 bit already keeps its grid, others are folded."""
    kept = subject.source.is_four_bit
    name, fold = ("", {}) if kept else (", folded", {"fold": True})
    return (
        Variant(f"ours, W4A8{name}", VARIANTS["ours"] | fold, True, OURS_LIMIT),
        Variant(f"ours, W4A4{name}", VARIANTS["ours-4"] | fold, True, OURS_4_LIMIT if kept else None),
    )


TRIP_PER_TOKEN = Variant(
    "kept grid, per token, TRIP up to 2^4",
    {"method": "keep", "activation": "per-token", "max_refine": 4},
    limit=TRIP_LIMIT,
)
KEPT = (Variant("kept grid, per token", {"method": "keep", "activation": "per-token"}), TRIP_PER_TOKEN)
"""What a model that is 4 bit already can show without new weights."""


def every(subject: Subject) -> tuple[Variant, ...]:
    """Return all variants."""
    return (*FIXED, *(KEPT if subject.source.is_four_bit else ()), *ours(subject))


def compiled_row(workshop: Workshop, subject: Subject, text: str, exact: Score) -> Row:
    """Measure ours at W4A8 compiled for this machine, held against its reference."""
    variant = ours(subject)[0]
    checkpoint = _checkpoint(workshop, subject, variant)
    bundle = checkpoint.path.with_name("bundle")
    if not bundle.exists():
        compile_checkpoint(checkpoint.path, "host", bundle)
    tokens = subject.windows * subject.window
    score = workshop.keep(
        subject, text, COMPILED, "all", lambda _: evaluate_bundle(bundle, text, subject.window, tokens)
    )
    reference = workshop.score(subject, text, variant.name, partial(ReferenceModel.from_checkpoint, checkpoint))
    return Row(COMPILED, score, exact, reference)


def with_outliers(subject: Subject) -> tuple[Variant, ...]:
    """Return those for a version with outlier channels."""
    return (*WITH_OUTLIERS, ours(subject)[0])


def rows(workshop: Workshop, subject: Subject, text: str, variants: Iterable[Variant]) -> Iterator[Row]:
    """Measure variants of a model on one text."""
    exact = workshop.score(subject, text, "float", partial(ReferenceModel.from_source, subject.source))
    yield Row("float", exact, exact)
    for variant in variants:
        if variant is W4A16:
            release = workshop.score(subject, text, "release", partial(_release, workshop, subject))
            yield Row("release, simulated", release, exact)
        checkpoint = _checkpoint(workshop, subject, variant)
        score = workshop.score(subject, text, variant.name, partial(ReferenceModel.from_checkpoint, checkpoint))
        baseline = None
        if variant.paired:
            name = f"{variant.name}, float activations"
            floats = partial(ReferenceModel.from_checkpoint, checkpoint, "none")
            baseline = workshop.score(subject, text, name, floats)
            yield Row(name, baseline, exact)
        yield Row(variant.name, score, exact, baseline)


def pruned_rows(workshop: Workshop, subject: Subject, text: str) -> Iterator[Row]:
    """Measure pruning at three sparsities, all on the last quarter of each window."""
    layers = subject.source.config.num_layers
    after = tuple(layers * part // 30 for part in PRUNED_AFTER)
    schedules = [None, *(PruningSchedule(after, beta) for beta in BETAS)]
    exact = None
    for variant in (None, AGILEQ_8, ours(subject)[0]):
        for schedule in schedules:
            name = variant.name if variant else "float"
            score = workshop.keep(
                subject,
                text,
                f"{name} {'dense' if schedule is None else schedule.beta}",
                "suffix",
                lambda tokens, variant=variant, schedule=schedule: score_reference(
                    _prunes(workshop, subject, variant, schedule), tokens, subject.window, "suffix"
                ),
            )
            exact = exact or score
            rows = subject.window * 3 // 4
            sparsity = 0.0 if schedule is None else schedule.sparsity(rows, layers)
            yield Row(name, score, exact, note=f"{100 * sparsity:.0f} %")


def _release(workshop: Workshop, subject: Subject) -> ReferenceModel:
    """Simulate the published code on the weights of W4A16."""
    checkpoint = _checkpoint(workshop, subject, W4A16)
    length = min(RELEASE_CALIBRATION.length, subject.source.config.context_length)
    tokenizer = checkpoint.path / "tokenizer.json"
    windows = cut_windows(tokenizer, RELEASE_CALIBRATION.text, RELEASE_CALIBRATION.samples, length)
    return release_model(subject.source, checkpoint, windows)


def _prunes(
    workshop: Workshop, subject: Subject, variant: Variant | None, schedule: PruningSchedule | None
) -> ReferenceModel:
    if variant is None:
        model = ReferenceModel.from_source(subject.source)
    else:
        model = ReferenceModel.from_checkpoint(_checkpoint(workshop, subject, variant))
    model.pruning = schedule
    return model


def _checkpoint(workshop: Workshop, subject: Subject, variant: Variant) -> Checkpoint:
    return workshop.checkpoint(subject, variant.name, variant.settings | {"calibration": CALIBRATION})
