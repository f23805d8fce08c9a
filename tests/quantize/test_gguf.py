import json
import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Types
from tokenizers import Tokenizer

from agq_tvm.errors import AgqError
from agq_tvm.flow.quantize import quantize
from agq_tvm.models.registry import describe
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.gguf_file import read_gguf
from agq_tvm.quantize.source import open_source
from agq_tvm.quantize.tables import dequantize_table
from agq_tvm.quantize.tensor_names import linear_shapes, table_shapes
from agq_tvm.quantize.weights import dequantize
from tests.quantize.gguf_models import CONFIG, TOKENS, write_gguf


@pytest.mark.parametrize("kind", [Types.F32, Types.F16, Types.Q8_0, Types.Q4_1, Types.Q4_0])
def test_every_tensor_is_that_of_the_gguf_package(tmp_path, kind):
    values = write_gguf(tmp_path / "m.gguf", linears=kind)
    source = open_source(tmp_path / "m.gguf")
    for name, value in values.items():
        np.testing.assert_array_equal(source.tensor(name), value, err_msg=name)
    assert source.config == describe(CONFIG)


def mixed(name: str) -> Types:
    return Types.Q4_0 if "q_proj" in name else Types.Q4_1


@pytest.mark.parametrize(
    ("linears", "symmetric"), [(Types.Q4_1, False), (Types.Q4_0, True), (mixed, False)], ids=["4_1", "4_0", "mixed"]
)
def test_keep_is_exact(tmp_path, linears, symmetric):
    values = write_gguf(tmp_path / "m.gguf", linears=linears, config={"tie_word_embeddings": False})
    result = quantize(tmp_path / "m.gguf", tmp_path / "out")
    assert (result["method"], result["group_size"], result["symmetric"]) == ("keep", 32, symmetric)
    assert result["relative_weight_error"] == 0
    checkpoint = read_checkpoint(tmp_path / "out")
    for name in linear_shapes(checkpoint.config):
        np.testing.assert_array_equal(dequantize(checkpoint.linear(name)), values[f"{name}.weight"])
    for name in table_shapes(checkpoint.config):
        np.testing.assert_array_equal(dequantize_table(checkpoint.table(name)), values[f"{name}.weight"])


def test_keep_needs_a_four_bit_model(tmp_path):
    write_gguf(tmp_path / "m.gguf", linears=lambda name: Types.Q8_0 if "o_proj" in name else Types.Q4_1)
    with pytest.raises(AgqError, match="not 4 bit"):
        quantize(tmp_path / "m.gguf", tmp_path / "out", method="keep")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [{"group_size": 64}, {"symmetric": True}], ids=lambda arguments: next(iter(arguments))
)
def test_keep_has_no_other_grid(tmp_path, arguments):
    write_gguf(tmp_path / "m.gguf")
    with pytest.raises(AgqError, match="choose gptq or rtn"):
        quantize(tmp_path / "m.gguf", tmp_path / "out", method="keep", **arguments)


def test_a_float_table_is_requantized(tmp_path):
    values = write_gguf(tmp_path / "m.gguf", tables=Types.F16)
    quantize(tmp_path / "m.gguf", tmp_path / "out")
    table = read_checkpoint(tmp_path / "out").table("model.embed_tokens")
    weight = values["model.embed_tokens.weight"]
    assert np.abs(dequantize_table(table) - weight).max() < 0.01 * np.abs(weight).max()


def test_the_tokenizer_is_built_from_the_vocabulary(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    quantize(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    encoded = tokenizer.encode("a t12<|im_end|>").ids
    assert encoded == [TOKENS.index(token) for token in ("a", "Ġt", "1", "2", "<|im_end|>")]
    text = "naïve — 日本\n\t 3.14"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in settings["chat_template"]


def test_a_begin_token_is_added_if_the_file_says_so(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    path = tmp_path / "m.gguf"
    key = b"tokenizer.ggml.add_bos_token" + struct.pack("<I", 7)
    path.write_bytes(path.read_bytes().replace(key + b"\0", key + b"\1"))
    open_source(path).copy_tokenizer(tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a").ids == [1, TOKENS.index("a")]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"smollm", b"smolln", "tokenizer of kind"),
        (b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert", "tokenizer of kind"),
        (b"blk.0.attn_q.weight", b"blk.0.attn_x.weight", "attn_x"),
        (b"blk.1.attn_q.weight", b"blk.7.attn_q.weight", r"does not account for|layers.7"),
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen2", "architecture 'qwen2'"),
        (b"GGUF", b"GGML", "does not begin with GGUF"),
        (b"GGUF\3", b"GGUF\1", "version"),
    ],
)
def test_other_models_are_refused(tmp_path, old, new, words):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(AgqError, match=words):
        open_source(path).copy_tokenizer(tmp_path)


def test_another_type_of_tensor_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    name = b"blk.0.attn_v.weight"
    data = bytearray(path.read_bytes())
    at = data.index(name) + len(name) + 4 + 2 * 8
    data[at : at + 4] = struct.pack("<I", 12)
    path.write_bytes(data)
    with pytest.raises(AgqError, match=r"blk\.0\.attn_v\.weight is Q4_K"):
        open_source(path)


def test_scales_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    tensor = read_gguf(path)[1]["blk.0.attn_v.weight"]
    data = path.read_bytes()
    at = data.index(tensor.data.tobytes())
    path.write_bytes(data[:at] + b"\xff\xff" + data[at + 2 :])
    source = open_source(path)
    with pytest.raises(AgqError, match="v_proj"):
        source.kept_linear("model.layers.0.self_attn.v_proj")
    with pytest.raises(AgqError, match="v_proj"):
        source.tensor("model.layers.0.self_attn.v_proj.weight")


def test_a_truncated_file_is_refused_at_any_length(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    short = tmp_path / "short.gguf"
    for length in [*range(0, 4000, 97), *range(4000, len(data), len(data) // 23), len(data) - 40]:
        short.write_bytes(data[:length])
        with pytest.raises(AgqError, match=r"short\.gguf"):
            open_source(short)


@pytest.mark.parametrize("count", [2**31, 2**60, 2**64 - 1])
@pytest.mark.parametrize("kind", [4, 8], ids=["numbers", "strings"])
def test_absurd_lengths_take_no_memory(tmp_path, count, kind):
    path = tmp_path / "m.gguf"
    value = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, kind, count)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + value + bytes(64))
    with pytest.raises(AgqError, match="ends at byte"):
        read_gguf(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, count, count) + bytes(64))
    with pytest.raises(AgqError, match="not a usable GGUF file"):
        read_gguf(path)


def test_random_damage_never_gets_past_our_errors(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path)
    data = path.read_bytes()
    header = data.index(b"blk.1.ffn_down.weight")
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, header, 3):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            open_source(path).copy_tokenizer(tmp_path)
        except AgqError:
            pass
