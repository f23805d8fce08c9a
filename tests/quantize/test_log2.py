"""Probabilities as powers of two, and the integer sums of values that they weigh."""

import math

import numpy as np
import pytest
import torch

from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.quantize.calibration import cut_windows
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.codebooks import CODE_BOOKS
from agq_tvm.quantize.log2 import (
    Log2Attention,
    log2_codes,
    to_output,
    value_codes,
    value_scales,
    weighted_sums,
)
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.tensor_names import value_scale_names
from tests.quantize.conftest import FEW
from tests.tiny import write_tiny_model
from tests.watch import watch_values

PAPER, OURS = CODE_BOOKS["log2-paper"], CODE_BOOKS["log2"]
BOOKS = pytest.mark.parametrize("book", CODE_BOOKS.values(), ids=CODE_BOOKS.keys())


def exact_exponents(scores: np.ndarray, relative: bool) -> np.ndarray:
    """Return what is rounded to a code, in float64."""
    wide = scores.astype("float64")
    below = wide.max(-1, keepdims=True) - wide
    log_sum = np.log2(np.exp(-below).sum(-1, keepdims=True))
    return below * math.log2(math.e) + (np.floor(log_sum) if relative else log_sum)


def rows_of_scores() -> np.ndarray:
    """Draw rows with masked keys: flat ones, and some that one key dominates."""
    rng = np.random.default_rng(0)
    scores = (rng.standard_normal((60, 70)) * np.linspace(0, 12, 60)[:, None]).astype("float32")
    scores[:, 50:] = -np.inf
    scores[7, 1:] = -np.inf
    return scores


@BOOKS
def test_codes_are_rounded_exponents(book):
    scores = rows_of_scores()
    codes = log2_codes(torch.from_numpy(scores), book).numpy()
    exponents = np.minimum(exact_exponents(scores, book.relative), 1000)
    expected = np.clip(np.round(exponents), 0, book.largest + 1)
    on_tie = abs(exponents - np.floor(exponents) - 0.5) < 1e-5
    assert on_tie.mean() < 0.01
    np.testing.assert_array_equal(codes[~on_tie], expected[~on_tie])
    assert codes.dtype == np.int32 and set(range(book.largest + 2)) == set(np.unique(codes))
    assert (codes[:, 50:] == book.zero).all()


def test_a_nibble_holds_ours_and_the_paper_has_one_power_more():
    assert (OURS.zero, PAPER.zero) == (15, 16)
    last = -math.log(2) * torch.tensor([[0.0, 14.49, 14.51, 15.49, 15.51]])
    scores = torch.cat([last, last.new_full((1, 3), -torch.inf)], 1)
    # The first probability is a little below 1, which moves the others by 0.0002.
    assert log2_codes(scores, OURS).tolist() == [[0, 14, 15, 15, 15, 15, 15, 15]]
    assert log2_codes(scores, PAPER).tolist() == [[0, 14, 15, 15, 16, 16, 16, 16]]


def test_ours_never_rounds_the_largest_probability():
    scores = torch.tensor([[0.0, 0.0, 0.0, -50.0], [0.0, -0.3, -50.0, -50.0]])
    assert log2_codes(scores, OURS)[0].tolist() == [1, 1, 1, 15]
    out = Log2Attention(OURS, torch.ones(1))(torch.zeros(1, 3, 8), torch.zeros(1, 3, 8), torch.ones(1, 3, 8), None)
    np.testing.assert_array_equal(out.numpy(), 1)


@BOOKS
def test_sums_are_shifts_and_adds_of_integers(book):
    rng = np.random.default_rng(1)
    codes = rng.integers(0, book.zero + 1, (5, 40))
    values = rng.integers(-127, 128, (40, 6))
    # At most what a row of probabilities can come to, which is what keeps the sums in range.
    codes = np.where(np.cumsum(np.where(codes == book.zero, 0, 2.0**-codes), axis=1) < 1.4, codes, book.zero)
    sums, totals = weighted_sums(torch.from_numpy(codes), torch.from_numpy(values).float(), book)
    assert (sums.dtype, totals.dtype) == (torch.int32, torch.int32)
    for t in range(5):
        kept = [k for k in range(40) if codes[t, k] != book.zero]
        assert totals[t] == sum(1 << (15 - int(codes[t, k])) for k in kept)
        for d in range(6):
            assert sums[t, d] == sum(int(values[k, d]) << (15 - int(codes[t, k])) for k in kept)


@BOOKS
@pytest.mark.parametrize("keys", [1, 2, 3, 1000, 1448, 2895, 100000])
def test_sums_stay_below_what_float32_counts(book, keys):
    """Rows of equal probabilities, but for one, are the worst: all may round up by nearly a factor of √2."""
    worst = 0
    for one in (*np.linspace(0, 1, 9), 0.3465):  # e^0.3465 is a little below √2
        scores = torch.zeros(1, keys)
        scores[0, 0] = one
        codes = log2_codes(scores, book)
        sums, totals = weighted_sums(codes, torch.full((keys, 1), -128.0), book)
        counts = np.bincount(codes.flatten(), minlength=book.zero)[: book.zero].tolist()
        exact = sum(count << (15 - code) for code, count in enumerate(counts))
        assert (int(totals[0]), int(sums[0, 0])) == (exact, -128 * exact)
        worst = max(worst, exact)
    bound = (2 if book.relative else 1) * 2**0.5 * 2**15
    assert worst <= bound and 128 * bound < (2**24 if book.relative else 2**23)
    if keys == (2895 if book.relative else 1448):
        assert worst > 0.997 * bound


def test_a_row_of_nothing_but_zeros_gives_zeros():
    codes = log2_codes(torch.zeros(1, 1 << 16), OURS)
    assert (codes == OURS.zero).all()
    sums, totals = weighted_sums(codes, torch.ones(1 << 16, 2), OURS)
    assert to_output(sums, totals, torch.tensor(1.0), OURS).tolist() == [[0.0, 0.0]]


def test_values_are_rounded_half_to_even_and_clipped():
    v = torch.tensor([[[0.5, 1.5, -2.5, 126.6, 300.0, -300.0]], [[1.0, 3.0, -5.0, 0.0, 254.0, -400.0]]])
    codes = value_codes(v, torch.tensor([1.0, 2.0]))
    assert codes.tolist() == [[[0, 2, -2, 127, 127, -127]], [[0, 2, -2, 0, 127, -127]]]
    assert value_scales(torch.tensor([254.0, 0.0])).tolist() == [2.0, 1.0]


@BOOKS
@pytest.mark.parametrize("biased", [False, True])
def test_attention_is_close_to_the_float_one(book, biased):
    rng = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(heads, 30, 16, generator=rng) for heads in (6, 2, 2))
    index = torch.arange(30)
    causal = torch.zeros(6, 30, 30).masked_fill(index > index[:, None], -torch.inf)
    bias = causal + 0.1 * (index - index[:, None]).clamp(max=0) if biased else None
    attend = Log2Attention(book, value_scales(v.abs().amax((1, 2))))
    out = attend(q, k, v, bias)
    scores = q @ k.repeat_interleave(3, 0).transpose(1, 2) / 4 + (causal if bias is None else bias)
    expected = scores.softmax(-1) @ v.repeat_interleave(3, 0)
    error = float((out - expected).norm() / expected.norm())
    assert 0.01 < error < (0.15 if book.relative else 0.25)


@pytest.mark.parametrize(("family", "method"), [("llama", "rtn"), ("opt", "gptq"), ("bloom", "rtn")])
def test_scales_of_values_are_calibrated_for_every_method(tmp_path, family, method):
    source = write_tiny_model(tmp_path / "m", family, 1)
    result = quantize(source, tmp_path / "c", method=method, group_size=32, attention="log2", calibration=FEW)
    checkpoint = read_checkpoint(tmp_path / "c")
    assert result["attention"] == checkpoint.scheme.attention == "log2"
    model = ReferenceModel.from_checkpoint(checkpoint)
    values = watch_values(model)
    for window in cut_windows(tmp_path / "c" / "tokenizer.json", FEW.text, FEW.samples, FEW.length):
        model.logits(window)
    for layer in range(checkpoint.config.num_layers):
        scales = checkpoint.value_scale(layer)
        largest = torch.stack(values[layer]).abs().amax((0, 2, 3)).numpy()
        assert len(values[layer]) == FEW.samples and scales.shape == (checkpoint.config.num_kv_heads,)
        # Calibration has the float embedding, the checkpoint an 8-bit one.
        np.testing.assert_allclose(scales, largest / 127, rtol=0.03)


def test_the_attention_of_a_checkpoint_is_used(tmp_path):
    source, tokens = write_tiny_model(tmp_path / "m", "llama", 1), list(range(40, 80))
    logits = {}
    for attention in ("float", *CODE_BOOKS):
        path = tmp_path / attention
        quantize(source, path, method="rtn", group_size=32, attention=attention, calibration=Calibration(samples=2))
        checkpoint = read_checkpoint(path)
        logits[attention] = ReferenceModel.from_checkpoint(checkpoint).logits(tokens)
        names = checkpoint._names & set(value_scale_names(checkpoint.config))
        assert len(names) == (0 if attention == "float" else checkpoint.config.num_layers)
    size = np.linalg.norm(logits["float"])
    errors = {name: np.linalg.norm(logits[name] - logits["float"]) / size for name in CODE_BOOKS}
    assert 0.005 < errors["log2"] < errors["log2-paper"] < 0.5
