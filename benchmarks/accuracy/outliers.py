"""Outlier channels of growing size, made on purpose, and what each way to quantize activations loses on them.

Weights are rounded to nearest in groups of 32 from the model with outliers, so they suffer as well; each row is held
against the same weights with float activations, which stand beside it.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from agq_tvm.flow.quantize import Calibration
from agq_tvm.quantize.outliers import with_outliers
from agq_tvm.quantize.reference import ReferenceModel
from benchmarks.accuracy.scoring import Row, Subject, Workshop

CHANNELS = 8
SHIFTS = tuple(range(7))
_WEIGHTS = {"method": "rtn", "group_size": 32, "calibration": Calibration(samples=8)}
FORMS = {
    "static, up to 2^6": {"activation": "static", "max_refine": 6},
    "per token": {"activation": "per-token"},
    "per token, up to 2^4": {"activation": "per-token", "max_refine": 4},
    "per token and group": {"activation": "per-token-group"},
    "per token and group, outliers folded back": {"activation": "per-token-group", "fold": True},
}


def with_shift(subject: Subject, shift: int) -> Subject:
    """Return the subject with outlier channels 2^shift times as large."""
    if not shift:
        return subject
    source = with_outliers(subject.source, CHANNELS, shift)
    return replace(subject, name=f"{subject.name}, {CHANNELS} channels x 2^{shift}", source=source)


def rows(workshop: Workshop, subject: Subject, text: str) -> Iterator[Row]:
    """Measure every form at every size of the outliers."""
    exact = workshop.score(subject, text, "float", partial(ReferenceModel.from_source, subject.source))
    for shift in SHIFTS:
        shown = None
        shifted = with_shift(subject, shift)
        for name, settings in FORMS.items():
            checkpoint = workshop.checkpoint(shifted, f"rtn g32, {name}", {**_WEIGHTS, **settings})
            floats = partial(ReferenceModel.from_checkpoint, checkpoint, "none")
            folded = ", outliers folded back" if settings.get("fold") else ""
            baseline = workshop.score(shifted, text, f"rtn g32{folded}, float activations", floats)
            if folded != shown:
                yield Row(f"channels x 2^{shift}: float activations{folded}", baseline, exact)
                shown = folded
            score = workshop.score(
                shifted, text, f"rtn g32, {name}", partial(ReferenceModel.from_checkpoint, checkpoint)
            )
            yield Row(f"channels x 2^{shift}: {name}", score, exact, baseline)
