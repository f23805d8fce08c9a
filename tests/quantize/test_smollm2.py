"""The real model: minutes, and its 93 MB from the package registry."""

import pytest
from tokenizers import Tokenizer

from agq_tvm.flow.evaluate import evaluate_reference
from agq_tvm.flow.quantize import quantize
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.source import open_source
from agq_tvm.quantize.tensor_names import linear_shapes
from agq_tvm.runtime.perplexity import compare

pytestmark = pytest.mark.slow
NAME = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "kept"
    result = quantize(NAME, path)
    assert (result["method"], result["relative_weight_error"]) == ("keep", 0.0)
    assert result["bits_per_weight"] == 5.0
    return path


def test_its_shapes(kept):
    config = read_checkpoint(kept).config
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert len(linear_shapes(config)) == 210


def test_its_tokenizer_splits_digits_and_keeps_every_byte(kept):
    tokenizer = Tokenizer.from_file(str(kept / "tokenizer.json"))
    ids = tokenizer.encode("Photosynthesis is 1234 <|im_start|>user").ids
    assert ids == [33580, 14870, 314, 216, 33, 34, 35, 36, 216, 1, 4093]
    for text in ("naïve café — 日本語 😀", "  two  spaces\n\ttab", "x=3.1415926;", "don't"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("activation", [None, "per-token-group"], ids=["float", "per-token-group"])
def test_greedy_continuation(kept, activation):
    checkpoint = read_checkpoint(kept)
    model = (
        ReferenceModel.from_checkpoint(checkpoint, activation)
        if activation
        else ReferenceModel.from_source(open_source(NAME))
    )
    tokenizer = Tokenizer.from_file(str(kept / "tokenizer.json"))
    prompt = "Photosynthesis is the process by which plants"
    tokens = tokenizer.encode(prompt).ids
    for _ in range(5):
        tokens.append(int(model.logits(tokens)[-1].argmax()))
    assert tokenizer.decode(tokens) == f"{prompt} convert sunlight into energy."


def test_perplexity(kept):
    exact = evaluate_reference(NAME, "persuasion", max_tokens=4096)
    assert exact.perplexity == pytest.approx(38.683, rel=1e-3)
    plain = evaluate_reference(kept, "persuasion", max_tokens=4096, activation="none")
    assert abs(compare(plain, exact).perplexity_change) < 1e-4
    grouped = compare(evaluate_reference(kept, "persuasion", max_tokens=4096), exact)
    assert grouped.perplexity_change < 0.02
