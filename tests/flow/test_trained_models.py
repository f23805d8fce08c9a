"""Trained models of any family, the whole way: ``pytest -m slow --models=DIR``, a Hugging Face model in each folder."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agq_tvm.flow.evaluate import evaluate_reference
from agq_tvm.quantize.calibration import encode_text
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.source import open_source
from agq_tvm.quantize.texts import load_text

pytestmark = pytest.mark.slow
WINDOW, TOKENS = 256, 16 * 256


def test_float_logits_are_those_of_transformers(trained):
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32).eval()
    tokens = encode_text(trained / "tokenizer.json", load_text("persuasion")[0])[:WINDOW]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    ours = ReferenceModel.from_source(open_source(trained)).logits(tokens)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_compiled_perplexity_is_that_of_the_reference(agq, trained, tmp_path):
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    for command in (("quantize", trained, "-o", checkpoint), ("compile", checkpoint, "--target", "host", "-o", bundle)):
        process = agq(*command)
        assert process.returncode == 0, process.stderr
    exact, rounded = (
        evaluate_reference(model, "persuasion", WINDOW, TOKENS).perplexity for model in (trained, checkpoint)
    )
    process = agq("eval", bundle, "--data", "persuasion", "--window", WINDOW, "--max-tokens", TOKENS, "--json")
    assert process.returncode == 0, process.stderr
    compiled = json.loads(process.stdout)["perplexity"]
    print(f"{trained.name}: float {exact:.2f}, W4A8 {rounded:.2f}, compiled {compiled:.2f}")
    assert compiled == pytest.approx(rounded, rel=0.005)
    assert rounded == pytest.approx(exact, rel=0.05)
