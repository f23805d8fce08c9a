"""Attention with probabilities rounded to powers of two and 8-bit values (Agile-Quant, "log2 quantizer"), in torch."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from agq_tvm.quantize.activations import SMALLEST
from agq_tvm.quantize.codebooks import FRACTION_BITS, VALUE_LIMIT, CodeBook


def log2_codes(scores: Tensor, book: CodeBook) -> Tensor:
    """Quantize the softmax of the last axis to codes c that stand for 2^-c.

    Maximum and sum come first, then c = round((maximum - score) · log2 e + log2 sum), so that small probabilities
    keep all digits. For a relative book log2 sum is rounded down.

    Parameters
    ----------
    scores : float32 tensor [..., keys]
        -inf where masked; at least one of a row is not.
    book : CodeBook

    Returns
    -------
    int32 tensor [..., keys]
        0..``book.zero``; masked keys have ``book.zero``.
    """
    below = scores.amax(-1, keepdim=True) - scores
    log_sum = torch.log2(torch.exp(-below).sum(-1, keepdim=True))
    if book.relative:
        log_sum = torch.floor(log_sum)
    return torch.round(below * math.log2(math.e) + log_sum).clamp(0, book.zero).to(torch.int32)


def value_scales(largest: Tensor) -> Tensor:
    """Return the static scale of every KV head from the largest magnitude of its values, float32 [KV] both."""
    return torch.where(largest < SMALLEST, 1.0, largest / VALUE_LIMIT)


def value_codes(v: Tensor, scales: Tensor) -> Tensor:
    """Quantize values float32 [KV, T, D] with scales [KV] to integers -127..127, in float32."""
    return torch.round(v * (1 / scales)[:, None, None]).clamp(-VALUE_LIMIT, VALUE_LIMIT)


def weighted_sums(codes: Tensor, values: Tensor, book: CodeBook) -> tuple[Tensor, Tensor]:
    """Add up the values of all keys, each shifted by the code of its probability: ``Σ_k v_k << (15 - code_k)``.

    No sum, whole or partial, leaves 24 bits, however many keys there are. A code is at least round(-log2 p), so
    that 2^-code <= √2 · p, and probabilities add up to 1, which the rounding of float32 moves by less than 0.00006:
    Σ 2^-code < 1.4143 and |Σ v 2^(15 - code)| < 128 · 2^15 · 1.4143 < 2^23. Codes of a relative book are for at
    most 2p: twice that, below 2^24 still. float32 holds every integer up to 2^24, so products by powers of two and
    their sums are exact in it, in any order.

    Parameters
    ----------
    codes : int32 tensor [..., T, keys]
        Of `log2_codes`.
    values : float32 tensor [..., keys, D]
        Integers -127..127.
    book : CodeBook

    Returns
    -------
    sums : int32 tensor [..., T, D]
    totals : int32 tensor [..., T]
        ``Σ_k 1 << (15 - code_k)``.
    """
    powers = torch.where(codes == book.zero, 0.0, torch.exp2((FRACTION_BITS - codes).float()))
    return (powers @ values).to(torch.int32), powers.sum(-1).to(torch.int32)


def to_output(sums: Tensor, totals: Tensor, scale: Tensor, book: CodeBook) -> Tensor:
    """Turn `weighted_sums` into the output of attention, float32 [..., T, D].

    Parameters
    ----------
    sums, totals : int32 tensors [..., T, D], [..., T]
    scale : float32 tensor
        Of the values; broadcast.
    book : CodeBook
    """
    one = 2.0**-FRACTION_BITS
    if book.relative:  # a row whose every probability is rounded to zero stays zero
        scale = scale / (totals.clamp_min(1).float() * one)[..., None]
    return (sums.float() * one) * scale


@dataclass
class Log2Attention:
    """Causal attention with log2 probabilities, one KV head at a time.

    Attributes
    ----------
    book : CodeBook
    value_scales : float32 tensor [KV], optional
        To be set before the first call.
    """

    book: CodeBook
    value_scales: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Attend from queries [H, T, D] to keys and values [KV, T, D]; return [H, T, D].

        `bias` [H, T, T] is added to the scores and masks what a row must not see; None masks and nothing else.
        """
        length, shared = q.shape[1], len(q) // len(k)
        if bias is None:
            bias = torch.zeros(length, length).masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf)
            bias = bias.expand(len(q), -1, -1)
        values = value_codes(v, self.value_scales)
        out = []
        for head, keys in enumerate(k):
            rows = slice(head * shared, (head + 1) * shared)
            codes = log2_codes((q[rows] * q.shape[-1] ** -0.5) @ keys.T + bias[rows], self.book)
            sums, totals = weighted_sums(codes, values[head], self.book)
            out.append(to_output(sums, totals, self.value_scales[head], self.book))
        return torch.cat(out)
