import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agq_tvm.errors import AgqError
from agq_tvm.quantize.source import HuggingFaceSource, open_source
from tests.tiny import write_tiny_llama

Q = "model.layers.0.self_attn.q_proj.weight"


def change_tensors(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_reads_every_float_type_as_float32(tmp_path, dtype):
    path = write_tiny_llama(tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    save_file({name: value.astype(stored) for name, value in tensors.items()}, path / "model.safetensors")
    value = open_source(path).tensor(Q)
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, tensors[Q].astype(stored).astype("float32"))


def shard(path) -> dict:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for i, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        file = f"model-{i}.safetensors"
        save_file({name: tensors[name] for name in names}, path / file)
        weight_map |= dict.fromkeys(names, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_reads_sharded_models(tmp_path):
    path = write_tiny_llama(tmp_path / "m")
    tensors = shard(path)
    source = open_source(path)
    for name, value in tensors.items():
        np.testing.assert_array_equal(source.tensor(name), value)


@pytest.mark.parametrize("name", ["../model-0.safetensors", "/etc/passwd", 3, "absent.safetensors"])
def test_an_index_cannot_name_other_files(tmp_path, name):
    path = write_tiny_llama(tmp_path / "m")
    shard(path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: name}}))
    with pytest.raises(AgqError):
        open_source(path)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(Q), f"no tensor {Q}"),
        (put("model.layers.0.self_attn.q_proj.bias", np.zeros(96, "float32")), "does not account for"),
        (put(Q, np.zeros((96, 97), "float32")), "has shape"),
        (put(Q, np.zeros((96, 96), "int8")), "is I8"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path, change, words):
    path = write_tiny_llama(tmp_path / "m")
    change_tensors(path, change)
    with pytest.raises(AgqError, match=words):
        open_source(path)


def test_tensors_without_meaning_are_ignored(tmp_path):
    path = write_tiny_llama(tmp_path / "m")
    change_tensors(path, put("lm_head.weight", np.zeros((260, 96), "float32")))
    change_tensors(path, put("model.layers.0.self_attn.rotary_emb.inv_freq", np.zeros(8, "float32")))
    assert open_source(path).config.tied_embeddings


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    path = write_tiny_llama(tmp_path / "m")
    change_tensors(path, lambda tensors: tensors[Q].__setitem__((3, 4), bad))
    with pytest.raises(AgqError, match=Q):
        open_source(path).tensor(Q)


def test_truncated_weights_are_refused(tmp_path):
    path = write_tiny_llama(tmp_path / "m")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-5])
    with pytest.raises(AgqError, match="cannot read"):
        open_source(path)


def test_the_end_tokens_of_generation_are_taken(tmp_path):
    path = write_tiny_llama(tmp_path / "m")
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert open_source(path).config.eos_token_ids == (2, 0)


def test_a_separate_chat_template_is_folded_in(tmp_path):
    path = write_tiny_llama(tmp_path / "m")
    (path / "chat_template.jinja").write_text("hello {{ messages }}")
    open_source(path).copy_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "hello {{ messages }}"
    assert settings["eos_token"] == "<|im_end|>"


def test_a_tokenizer_must_be_there_and_fit(tmp_path):
    path = write_tiny_llama(tmp_path / "m", vocab_size=100)
    with pytest.raises(AgqError, match="has tokens up to 258"):
        open_source(path).copy_tokenizer(tmp_path)
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(AgqError, match="cannot be read as a tokenizer"):
        open_source(path).copy_tokenizer(tmp_path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(AgqError, match=r"no tokenizer\.json"):
        open_source(path).copy_tokenizer(tmp_path)


@pytest.mark.parametrize("settings", [{"quant_method": "agq"}, {"quant_method": "gptq"}, "int4"])
def test_a_quantized_model_is_refused(tmp_path, settings):
    path = write_tiny_llama(tmp_path / "m", quantization_config=settings)
    with pytest.raises(AgqError, match="quantized"):
        open_source(path)


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "m.bin").write_bytes(b"x")
    with pytest.raises(AgqError, match="not a model"):
        open_source(tmp_path / "m.bin")
    with pytest.raises(AgqError, match="there is no model"):
        open_source(str(tmp_path / "absent"))
    with pytest.raises(AgqError, match=r"config\.json is missing"):
        open_source(tmp_path)
    write_tiny_llama(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(AgqError, match="only models in safetensors"):
        open_source(tmp_path / "m")


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
    path = write_tiny_llama(tmp_path / "m")
    asked = []

    def snapshot_download(hub_id, **patterns):
        asked.append((hub_id, patterns))
        return str(path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    source = open_source("someone/some-model")
    assert isinstance(source, HuggingFaceSource) and source.label == "someone/some-model"
    assert asked[0][0] == "someone/some-model"
    assert not any("bin" in pattern for pattern in asked[0][1]["allow_patterns"])


def test_a_hub_without_network_is_one_sentence(tmp_path):
    program = (
        "from agq_tvm.errors import AgqError\nfrom agq_tvm.quantize.source import open_source\n"
        "try: open_source('someone/some-model')\nexcept AgqError as error: print(error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.startswith("cannot fetch someone/some-model from the Hugging Face hub")
    assert result.stdout.count("\n") == 1
