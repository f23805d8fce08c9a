"""The compiled model against the torch reference, and prefill against decode."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agq_tvm.errors import AgqError
from agq_tvm.models.decoder import PREFILL_BUCKETS
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.runtime.agreement import agreement
from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.engine import CALL_ROWS, Engine, LocalSession, chunks


@pytest.fixture(scope="module")
def engine(tiny_bundle) -> Engine:
    bundle = Bundle(tiny_bundle)
    return Engine(bundle, LocalSession(bundle, threads=2))


@pytest.fixture
def tokens(engine) -> list[int]:
    return np.random.default_rng(5).integers(0, engine.vocab_size, 150).tolist()


def test_logits_agree_with_the_reference(engine, tokens, tiny_checkpoint):
    reference = ReferenceModel.from_checkpoint(read_checkpoint(tiny_checkpoint)).logits(tokens)
    engine.reset()
    same = agreement(reference, engine.prefill(tokens, all_logits=True))
    assert same.mean_kl <= 1e-3 and same.top1 >= 0.99


def test_every_cut_of_a_prompt_gives_the_same_logits(engine, tokens):
    prompt = tokens[:26]
    engine.reset()
    one_by_one = np.stack([engine.decode(token) for token in prompt])
    for cut in range(1, len(prompt) + 1):
        engine.reset()
        first = engine.prefill(prompt[:cut], all_logits=True)
        rest = engine.prefill(prompt[cut:], all_logits=True) if cut < len(prompt) else first[:0]
        differences = np.linalg.norm(np.concatenate([first, rest]) - one_by_one, axis=1)
        differences /= np.linalg.norm(one_by_one, axis=1)
        # Attention of one row adds up in another order than that of many, which may move an activation across a tie.
        assert differences.max() < 1e-4 and np.median(differences) < 1e-6


def test_last_logits_are_the_last_of_all_logits(engine, tokens):
    for count in (1, 7, 8, 9, 31, 140):
        engine.reset()
        every = engine.prefill(tokens[:count], all_logits=True)
        engine.reset()
        np.testing.assert_array_equal(engine.prefill(tokens[:count]), every[-1])


def test_a_new_sequence_forgets_the_old_one(engine, tokens):
    engine.reset()
    fresh = engine.prefill(tokens[:20])
    engine.reset()
    engine.prefill(tokens[30:150])
    engine.reset()
    np.testing.assert_array_equal(engine.prefill(tokens[:20]), fresh)


def test_the_context_can_be_filled_to_the_brim(engine):
    engine.reset()
    prompt = [3] * (engine.context - 3)
    engine.prefill(prompt)
    for _ in range(3):
        assert np.isfinite(engine.decode(5)).all()
    with pytest.raises(AgqError, match="do not fit the context of 256"):
        engine.decode(5)


def test_a_padded_call_may_reach_past_the_context(engine):
    tokens = np.random.default_rng(6).integers(0, engine.vocab_size, engine.context).tolist()
    engine.reset()
    expected = engine.prefill(tokens)
    engine.reset()
    engine.prefill(tokens[:-115])
    assert chunks(115, engine.buckets) == [(128, 115)]
    found = engine.prefill(tokens[-115:])
    assert engine.length == engine.context
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_generation_is_greedy_and_stops(engine, tokens):
    words = list(engine.generate(tokens[:10], 12))
    assert len(words) == 12
    engine.reset()
    logits = engine.prefill(tokens[:10])
    for word in words:
        assert word == int(logits.argmax())
        logits = engine.decode(word)
    stop = words[4]
    assert list(engine.generate(tokens[:10], 12, frozenset([stop]))) == words[: words.index(stop)]


@pytest.mark.parametrize("prompt,message", [([], "no tokens"), ([-1], "not in the voc"), ([260], "not in the voc")])
def test_bad_prompts(engine, prompt, message):
    engine.reset()
    with pytest.raises(AgqError, match=message):
        engine.prefill(prompt)


def test_one_thread_and_two_give_the_same(tiny_bundle, engine, tokens):
    engine.reset()
    two = engine.prefill(tokens)
    bundle = Bundle(tiny_bundle)
    np.testing.assert_array_equal(Engine(bundle, LocalSession(bundle, threads=1)).prefill(tokens), two)


@pytest.mark.parametrize("count", range(1, 300))
def test_chunks_cover_the_prompt(count):
    cut = chunks(count, PREFILL_BUCKETS)
    assert sum(valid for _, valid in cut) == count
    assert all(rows in (1, *PREFILL_BUCKETS) and 0 < valid <= rows for rows, valid in cut)
    assert all(rows == valid for rows, valid in cut[:-1])
    assert [rows for rows, _ in cut] == sorted((rows for rows, _ in cut), reverse=True)


@given(st.integers(1, 400))
def test_filling_buckets_first_is_not_cheaper(count):
    def cost(rows):
        return sum(each + CALL_ROWS for each in rows)

    greedy, rest = [], count
    for bucket in sorted(PREFILL_BUCKETS, reverse=True):
        greedy += [bucket] * (rest // bucket)
        rest %= bucket
    greedy += [1 if rest == 1 else min(PREFILL_BUCKETS)] * (rest > 0)
    assert cost(rows for rows, _ in chunks(count, PREFILL_BUCKETS)) <= cost(greedy)


def test_chunks_are_padded_where_that_is_cheaper():
    cuts = {
        7: [8],
        9: [8, 1],
        15: [16],
        17: [16, 1],
        18: [16, 8],
        24: [16, 8],
        31: [32],
        40: [32, 8],
        300: [128, 128, 32, 16],
    }
    for count, rows in cuts.items():
        assert [each for each, _ in chunks(count, PREFILL_BUCKETS)] == rows
    assert chunks(20, [128]) == [(128, 20)]
