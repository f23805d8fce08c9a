"""Static scales with TRIP: what the largest exponent, its grain and the first token cost, and where the rest sits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from agq_tvm.flow.quantize import Calibration
from agq_tvm.progress import progress
from agq_tvm.quantize.activations import ActivationQuantizer
from agq_tvm.quantize.calibration import cut_windows
from agq_tvm.quantize.checkpoint import Checkpoint
from agq_tvm.quantize.reference import Layer, ReferenceModel
from agq_tvm.quantize.trip import refine_static
from benchmarks.accuracy.scoring import Row, Subject, Workshop

REFINES = range(7)
CALIBRATION = Calibration(samples=8)
BEST = (2, 1, True)


@dataclass(frozen=True)
class Form:
    """One way to make static scales.

    Attributes
    ----------
    max_refine : int
        The largest exponent.
    grain : int
        Channels that share an exponent: 1 as in the paper, or those of a weight group.
    first_float : bool
        Whether the first token of a window is left out of calibration, and float.
    """

    max_refine: int
    grain: int
    first_float: bool

    @property
    def name(self) -> str:
        """What a table calls it."""
        grain = "channel" if self.grain == 1 else f"group of {self.grain}"
        first = "float" if self.first_float else "quantized"
        return f"static, up to 2^{self.max_refine}, exponent per {grain}, first token {first}"


def forms(group_size: int) -> list[Form]:
    """Return every form of the table."""
    return [Form(refine, grain, first) for first in (False, True) for grain in (group_size, 1) for refine in REFINES]


class StaticInputs:
    """Static quantizers of every linear's input, calibrated on what the float activations of a checkpoint are.

    Parameters
    ----------
    checkpoint : Checkpoint
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.group_size = checkpoint.scheme.group_size
        self._model = ReferenceModel.from_checkpoint(checkpoint, "none")
        tokenizer = checkpoint.path / "tokenizer.json"
        length = min(CALIBRATION.length, checkpoint.config.context_length)
        self._windows = cut_windows(tokenizer, CALIBRATION.text, CALIBRATION.samples, length)
        self._seen: dict[tuple[int, str], list[Tensor]] = {}

    def linear_input(self, layer: int, name: str, x: Tensor) -> None:
        """Keep an input [T, K]."""
        self._seen.setdefault((layer, name), []).append(x)

    def attention(self, *_) -> None:
        """Let attention pass."""

    def model(self, form: Form, where: Callable[[int, str], bool] = lambda layer, name: True) -> ReferenceModel:
        """Return the checkpoint's model with static activations of a form at the linears `where` says."""
        if not self._seen:
            for window in self._windows:
                self._model.logits(window, observer=self)
        first = int(form.first_float)
        quantizers = {}
        for at, inputs in progress(self._seen.items(), "calibrating", unit="linear"):
            if where(*at):
                rest = [x[first:] for x in inputs]
                quantizers[at] = refine_static(rest, form.grain, form.max_refine, 8).quantizer

        def change(index: int, layer: Layer) -> Layer:
            linears = {
                name: _Rounded(operator, quantizers[index, name], first) if (index, name) in quantizers else operator
                for name, operator in layer.linears.items()
            }
            return layer._replace(linears=linears)

        return self._model.altered(change)


class _Rounded:
    """A linear on rounded inputs, the first `exact` rows excepted."""

    def __init__(self, operator: Callable[[Tensor], Tensor], quantizer: ActivationQuantizer, exact: int) -> None:
        self._operator, self._quantizer, self._exact = operator, quantizer, exact

    def __call__(self, x: Tensor) -> Tensor:
        return self._operator(torch.cat((x[: self._exact], self._quantizer.rounded(x[self._exact :]))))


def rows(workshop: Workshop, subject: Subject, text: str, checkpoint: Checkpoint) -> Iterator[Row]:
    """Measure every form on the weights of a checkpoint, beside the same weights with float activations."""
    inputs = StaticInputs(checkpoint)
    exact = workshop.score(
        subject, text, "static, float activations", lambda: ReferenceModel.from_checkpoint(checkpoint, "none")
    )
    for form in forms(inputs.group_size):
        yield Row(form.name, workshop.score(subject, text, form.name, lambda form=form: inputs.model(form)), exact)
    yield from _causes(workshop, subject, text, checkpoint, inputs, exact)


def _causes(workshop, subject, text, checkpoint, inputs, exact) -> Iterator[Row]:
    """Measure the best form at one kind of linear at a time, and what is left without the worst layers."""
    best = Form(BEST[0], BEST[1], BEST[2])
    for linear in checkpoint.config.linears:
        variant = f"only at {linear.name}: {best.name}"
        score = workshop.score(
            subject, text, variant, lambda role=linear.name: inputs.model(best, lambda _, name: name == role)
        )
        yield Row(variant, score, exact)
