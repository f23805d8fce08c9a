"""Every family and variant in float against transformers, and through GPTQ."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from agq_tvm.errors import AgqError
from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.quantize.calibration import encode_text
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.source import open_source
from agq_tvm.quantize.tensor_names import bias_shapes
from agq_tvm.quantize.texts import load_text
from tests.tiny import write_tiny_model

TOKENS = np.random.default_rng(0).integers(3, 259, 70).tolist()
UNTIED = {"tie_word_embeddings": False}
PROJECTED = {"word_embed_proj_dim": 64}
VARIANTS = {
    "llama with attention biases": ("llama", {"attention_bias": True}),
    "llama with all biases": ("llama", {"attention_bias": True, "mlp_bias": True} | UNTIED),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral in its window": ("mistral", {"sliding_window": 70, "num_key_value_heads": 1} | UNTIED),
    "qwen2": ("qwen2", {}),
    "qwen2 untied": ("qwen2", {"num_key_value_heads": 6} | UNTIED),
    "qwen2 in its window": ("qwen2", {"use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1}),
    "opt": ("opt", {}),
    "opt untied": ("opt", UNTIED),
    "opt post-norm": ("opt", {"do_layer_norm_before": False}),
    "opt without final norm": ("opt", {"_remove_final_layer_norm": True}),
    "opt projected": ("opt", PROJECTED),
    "opt like opt-350m": ("opt", PROJECTED | {"do_layer_norm_before": False}),
    "opt projected untied": ("opt", {"word_embed_proj_dim": 128} | UNTIED),
    "opt without biases": ("opt", {"enable_bias": False, "activation_function": "gelu"}),
    "opt with plain norms": ("opt", {"layer_norm_elementwise_affine": False, "activation_function": "gelu_new"}),
    "opt with odd heads": ("opt", {"hidden_size": 75, "word_embed_proj_dim": 75, "num_attention_heads": 5}),
    "bloom": ("bloom", {}),
    "bloom untied": ("bloom", UNTIED),
    "bloom with 8 heads": ("bloom", {"n_head": 8}),
    "bloom with 3 heads": ("bloom", {"n_head": 3}),
    "bloom with 1 head": ("bloom", {"n_head": 1}),
    "bloom with 14 heads": ("bloom", {"n_head": 14, "hidden_size": 70}),
    "bloom with residuals after norms": ("bloom", {"apply_residual_connection_post_layernorm": True}),
}


def transformers_logits(path, tokens: list[int]) -> np.ndarray:
    """Return the logits of transformers' own model, float32 [T, V]."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_float_logits_are_those_of_transformers(tmp_path, variant):
    family, overrides = VARIANTS[variant]
    path = write_tiny_model(tmp_path / "m", family, 5, **overrides)
    expected = transformers_logits(path, TOKENS)
    ours = ReferenceModel.from_source(open_source(path)).logits(TOKENS)
    assert ours.dtype == np.float32 and ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_files_of_the_bare_decoder_are_read(tmp_path, family):
    """As on the hub: BLOOM's tensors have no ``transformer.`` before their names."""
    path = write_tiny_model(tmp_path / "m", family, **UNTIED)
    expected = ReferenceModel.from_source(open_source(path)).logits(TOKENS)
    tensors = load_file(path / "model.safetensors")
    prefix = open_source(path).config.base_prefix
    save_file({name.removeprefix(prefix): value for name, value in tensors.items()}, path / "model.safetensors")
    np.testing.assert_array_equal(ReferenceModel.from_source(open_source(path)).logits(TOKENS), expected)


@pytest.mark.parametrize(
    "variant", ["llama with all biases", "opt like opt-350m", "opt with plain norms", "bloom with 3 heads"]
)
def test_gptq_walks_through_every_family(tmp_path, variant):
    family, overrides = VARIANTS[variant]
    source = open_source(write_tiny_model(tmp_path / "m", family, 7, **overrides))
    tokens = encode_text(tmp_path / "m" / "tokenizer.json", load_text("persuasion")[0])[:200]
    exact, error = ReferenceModel.from_source(source).logits(tokens), {}
    for method in ("gptq", "rtn"):
        calibration = Calibration(samples=16, length=64)
        quantize(tmp_path / "m", tmp_path / method, method, 64, activation="none", calibration=calibration)
        checkpoint = read_checkpoint(tmp_path / method)
        error[method] = np.square(ReferenceModel.from_checkpoint(checkpoint).logits(tokens) - exact).sum()
        for name in bias_shapes(source.config):
            np.testing.assert_array_equal(checkpoint.linear(name.removesuffix(".bias")).bias, source.tensor(name))
    assert error["gptq"] < 0.8 * error["rtn"]


def test_a_bias_that_is_missing_is_refused(tmp_path):
    path = write_tiny_model(tmp_path / "m", "opt")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.decoder.layers.1.fc1.bias"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(AgqError, match=r"no tensor model\.decoder\.layers\.1\.fc1\.bias"):
        open_source(path)


def test_a_bias_that_the_config_does_not_know_is_refused(tmp_path):
    path = write_tiny_model(tmp_path / "m", "qwen2")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.bias"] = np.zeros(96, "float32")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(AgqError, match=r"o_proj\.bias that its config does not account for"):
        open_source(path)
