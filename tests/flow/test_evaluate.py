import numpy as np
import pytest

from agq_tvm.errors import AgqError
from agq_tvm.flow.evaluate import evaluate_reference, is_checkpoint
from agq_tvm.flow.quantize import quantize
from tests.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_tiny_llama(root / "float")
    quantize(root / "float", root / "quantized", method="rtn", group_size=32)
    return root


def test_scores_models_and_checkpoints_on_the_same_tokens(models):
    exact = evaluate_reference(models / "float", "persuasion", window=64, max_tokens=200)
    rounded = evaluate_reference(models / "quantized", "persuasion", window=64, max_tokens=200)
    plain = evaluate_reference(models / "quantized", "persuasion", window=64, max_tokens=200, activation="none")
    assert exact.losses.shape == rounded.losses.shape == (3, 63)
    assert 0 < np.abs(plain.losses - exact.losses).mean() < 2
    assert 0 < np.abs(rounded.losses - plain.losses).mean() < 2


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
        ({"model": "quantized", "data": "absent.txt"}, "no text"),
    ],
)
def test_mistakes_are_one_sentence(models, arguments, words):
    arguments = {"data": "persuasion", "window": 64} | arguments
    with pytest.raises(AgqError, match=words):
        evaluate_reference(**(arguments | {"model": str(models / arguments["model"])}))
