import numpy as np
import pytest

from agq_tvm.errors import AgqError
from agq_tvm.flow.evaluate import evaluate_reference, is_checkpoint
from agq_tvm.flow.quantize import quantize
from agq_tvm.quantize.pruning import PruningSchedule
from tests.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_tiny_llama(root / "float")
    quantize(root / "float", root / "quantized", method="rtn", group_size=32)
    pruning = PruningSchedule((1, 2), 0.5)
    quantize(root / "float", root / "pruned", method="rtn", group_size=32, pruning=pruning)
    return root


def test_scores_models_and_checkpoints_on_the_same_tokens(models):
    exact = evaluate_reference(models / "float", "persuasion", window=64, max_tokens=200)
    rounded = evaluate_reference(models / "quantized", "persuasion", window=64, max_tokens=200)
    plain = evaluate_reference(models / "quantized", "persuasion", window=64, max_tokens=200, activation="none")
    assert exact.losses.shape == rounded.losses.shape == (3, 63)
    assert 0 < np.abs(plain.losses - exact.losses).mean() < 2
    assert 0 < np.abs(rounded.losses - plain.losses).mean() < 2


def test_models_that_prune_and_others_are_scored_on_the_same_tokens(models):
    def scored(model, **options):
        return evaluate_reference(models / model, "persuasion", window=64, max_tokens=200, **options)

    pruned = scored("pruned")
    assert (pruned.protocol, pruned.losses.shape) == ("suffix", (3, 16))
    for model in ("quantized", "float"):
        every, suffix = scored(model), scored(model, protocol="suffix")
        np.testing.assert_array_equal(suffix.losses, every.losses[:, -16:])
    quantized = scored("quantized", protocol="suffix")
    assert 1e-3 < np.abs(pruned.losses - quantized.losses).mean() < 2
    assert np.corrcoef(pruned.losses.ravel(), quantized.losses.ravel())[0, 1] > 0.5


def test_the_papers_protocol_scores_survivors_and_says_so(models, capsys):
    left = evaluate_reference(models / "pruned", "persuasion", window=64, max_tokens=200, protocol="paper-protocol")
    assert (left.protocol, left.losses.shape) == (
        "paper-protocol",
        (3, PruningSchedule((1, 2), 0.5).counts(64)[-1] - 1),
    )
    assert "does not compare" in capsys.readouterr().err


def test_tokens_are_chosen_by_chunk_or_in_the_whole_prompt(models):
    """Of 48 tokens in chunks of 32 and 16; a prompt of one chunk leaves no choice."""

    def scored(window, selection):
        options = {"window": window, "max_tokens": 200, "selection": selection}
        return evaluate_reference(models / "pruned", "persuasion", **options).losses

    chunk, prompt = scored(64, "chunk"), scored(64, "prompt")
    np.testing.assert_array_equal(scored(64, None), chunk)
    assert chunk.shape == prompt.shape and np.abs(chunk - prompt).mean() > 1e-3
    np.testing.assert_array_equal(scored(10, "chunk"), scored(10, "prompt"))


def test_tells_checkpoints_from_models(models):
    assert is_checkpoint(models / "quantized") and is_checkpoint(str(models / "quantized"))
    assert not is_checkpoint(models / "float")
    assert not is_checkpoint(models / "absent")
    assert not is_checkpoint("smollm2-135m-instruct")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "float", "activation": "per-token"}, "not quantized"),
        ({"model": "float", "window": 300}, "more than the model's 256"),
        ({"model": "float", "max_tokens": 10}, "less than one window"),
        ({"model": "absent"}, "no model"),
        ({"model": "pruned", "protocol": "all"}, "choose the protocol suffix"),
        ({"model": "pruned", "protocol": "prefix"}, "unknown protocol"),
        ({"model": "quantized", "protocol": "paper-protocol"}, "models that prune"),
        ({"model": "quantized", "data": "absent.txt"}, "no text"),
        ({"model": "pruned", "selection": "half"}, "unknown selection"),
        ({"model": "quantized", "selection": "prompt"}, "drops no tokens"),
        ({"model": "pruned", "protocol": "paper-protocol", "selection": "chunk"}, "choose the protocol suffix"),
    ],
)
def test_mistakes_are_one_sentence(models, arguments, words):
    arguments = {"data": "persuasion", "window": 64} | arguments
    with pytest.raises(AgqError, match=words):
        evaluate_reference(**(arguments | {"model": str(models / arguments["model"])}))
