"""Four-bit softmax: powers of two against even steps, with float activations elsewhere and 8-bit values."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from agq_tvm.quantize.checkpoint import Checkpoint
from agq_tvm.quantize.codebooks import CODE_BOOKS
from agq_tvm.quantize.forward import Attend
from agq_tvm.quantize.log2 import Log2Attention, value_codes, value_scales
from agq_tvm.quantize.reference import ReferenceModel
from benchmarks.accuracy.scoring import Row, Subject, Workshop

STEPS = 15


@dataclass(frozen=True)
class EvenSteps:
    """Attention whose probabilities are multiples of a step; `step` makes it of probabilities [H, T, keys]."""

    step: Callable[[Tensor], Tensor]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Attend from queries [H, T, D] to keys and values [KV, T, D]; return [H, T, D]."""
        length, shared = q.shape[1], len(q) // len(k)
        scores = (q * q.shape[-1] ** -0.5) @ k.repeat_interleave(shared, 0).mT
        mask = torch.full((length, length), -torch.inf).triu(1) if bias is None else bias
        probabilities = torch.softmax(scores + mask, -1)
        step = self.step(probabilities)
        codes = torch.round(probabilities / step).clamp(max=STEPS)
        return (codes * step) @ _rounded_values(v).repeat_interleave(shared, 0)


def _float_probabilities(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.repeat_interleave(len(q) // len(k), 0).mT
    mask = torch.full((q.shape[1], q.shape[1]), -torch.inf).triu(1) if bias is None else bias
    return torch.softmax(scores + mask, -1) @ _rounded_values(v).repeat_interleave(len(q) // len(k), 0)


def _log2(name: str) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return Log2Attention(CODE_BOOKS[name], _scales(v))(q, k, v, bias)

    return attend


def _scales(v: Tensor) -> Tensor:
    return value_scales(v.abs().amax((1, 2)))


def _rounded_values(v: Tensor) -> Tensor:
    return value_codes(v, _scales(v)) * _scales(v)[:, None, None]


FORMS: dict[str, Attend] = {
    "float probabilities": _float_probabilities,
    "log2, the paper's 16 codes and zero": _log2("log2-paper"),
    "log2, 15 codes and zero, renormalised": _log2("log2"),
    "even steps of 1/15 of a row's largest": EvenSteps(lambda p: p.amax(-1, keepdim=True) / STEPS),
    "even steps of 1/15": EvenSteps(lambda p: torch.tensor(1 / STEPS)),
}


def rows(workshop: Workshop, subject: Subject, text: str, checkpoint: Checkpoint) -> Iterator[Row]:
    """Measure every form of softmax on the weights of a checkpoint, beside float probabilities."""
    exact = None
    for name, attend in FORMS.items():

        def model(attend: Attend = attend) -> ReferenceModel:
            plain = ReferenceModel.from_checkpoint(checkpoint, "none")
            return plain.altered(lambda index, layer: layer._replace(attend=attend))

        score = workshop.score(subject, text, f"softmax {name}", model)
        exact = exact or score
        yield Row(name, score, exact)
