import math

import numpy as np
import pytest
import torch

from agq_tvm.errors import AgqError
from agq_tvm.runtime.perplexity import Score, compare, score, score_suffix, score_survivors

VOCABULARY = 300


def model(seed: int, noise: float = 0.0):
    """A fake model whose logits depend on the token alone."""
    table = np.random.default_rng(seed).standard_normal((VOCABULARY, VOCABULARY)) * 4
    table += noise * np.random.default_rng(seed + 1).standard_normal(table.shape)
    return lambda tokens: table[tokens].astype("float32")


TOKENS = np.random.default_rng(9).integers(0, VOCABULARY, 1030)


def test_every_token_but_the_first_of_a_window_is_scored():
    seen = []

    def logits_of(tokens):
        seen.append(tokens)
        return model(0)(tokens)

    result = score(logits_of, TOKENS, 200, show_progress=False)
    assert seen == [TOKENS[i : i + 200].tolist() for i in range(0, 1000, 200)]
    assert (result.tokens, result.losses.shape) == (5 * 199, (5, 199))
    for window, losses in zip(seen, result.losses, strict=True):
        logits = torch.from_numpy(model(0)(window)[:-1]).double()
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="none")
        np.testing.assert_allclose(losses, expected, rtol=1e-12, atol=1e-12)
    assert result.perplexity == pytest.approx(math.exp(result.losses.mean()))
    means = result.losses.mean(axis=1)
    assert result.nll_stderr == pytest.approx(math.sqrt(means.var(ddof=1) / 5))


def test_equal_logits_are_as_good_as_guessing():
    result = score(lambda tokens: np.zeros((len(tokens), 50), "float32"), [1, 2, 3, 4], 2)
    assert result.perplexity == pytest.approx(50)


def test_extreme_logits_do_not_overflow():
    def sure(tokens):
        logits = np.full((len(tokens), 3), -1e30, "float32")
        logits[:, 1] = 3e38
        return logits

    assert score(sure, [1] * 8, 4).nll == 0
    assert np.isfinite(score(sure, [0] * 8, 4).nll)


def test_the_paired_difference_is_sharper_than_the_scores():
    a, b = score(model(0), TOKENS, 100), score(model(0, noise=0.05), TOKENS, 100)
    difference = compare(b, a)
    assert difference.nll == pytest.approx(b.nll - a.nll)
    assert difference.perplexity_change == pytest.approx(b.perplexity / a.perplexity - 1)
    assert 0 < difference.nll_stderr < 0.2 * a.nll_stderr
    assert difference.perplexity_change_stderr == pytest.approx(difference.nll_stderr, rel=0.1)
    same = compare(a, a)
    assert (same.nll, same.nll_stderr, same.perplexity_change) == (0, 0, 0)


def test_one_window_has_no_standard_error():
    result = score(model(0), TOKENS, 1000)
    assert math.isnan(result.nll_stderr) and math.isnan(compare(result, result).nll_stderr)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(AgqError, match="less than one window"):
        score(model(0), TOKENS[:99], 100)
    with pytest.raises(AgqError, match="less than one window"):
        score(model(0), [], 100)
    with pytest.raises(AgqError, match="window of 1"):
        score(model(0), TOKENS, 1)
    with pytest.raises(AgqError, match="not finite"):
        score(lambda tokens: np.full((len(tokens), 5), np.nan), [1, 2], 2)
    with pytest.raises(AgqError, match="shape"):
        score(lambda tokens: np.zeros((1, 5)), [1, 2], 2)
    with pytest.raises(AgqError, match="different tokens"):
        compare(Score(3, np.zeros((2, 2))), Score(3, np.zeros((3, 2))))


@pytest.mark.parametrize(("window", "first"), [(1024, 768), (512, 384), (5, 3), (2, 1)])
def test_the_suffix_is_scored_from_what_predicts_it(window, first):
    def logits_of(prefix, suffix):
        assert len(prefix) == first and len(suffix) == window - first
        return model(0)([*prefix, *suffix])[first - 1 : -1]

    every = score(model(0), TOKENS[: 10 * window], window, show_progress=False)
    suffix = score_suffix(logits_of, TOKENS[: 10 * window], window, show_progress=False)
    np.testing.assert_array_equal(suffix.losses, every.losses[:, first - 1 :])
    assert (suffix.protocol, every.protocol) == ("suffix", "all")
    with pytest.raises(AgqError, match="different tokens"):
        compare(suffix, Score(window, suffix.losses))


def test_survivors_are_scored_on_what_follows_them():
    positions = np.array([0, 3, 4, 9])
    every = score(model(0), TOKENS, 10, show_progress=False)
    left = score_survivors(lambda tokens: (model(0)(tokens)[positions], positions), TOKENS, 10, show_progress=False)
    np.testing.assert_array_equal(left.losses, every.losses[:, [0, 3, 4]])
    assert left.protocol == "paper-protocol" and left.tokens == 3 * 103
