"""Bundles with int8 caches: models that rotate, that have ALiBi, that prune, that have log2 attention."""

import json

import numpy as np
import pytest

from agq_tvm.cli.main import main
from agq_tvm.flow.compile import compile_checkpoint
from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.int8_cache import attend_int8
from agq_tvm.quantize.pruning import PruningSchedule
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.runtime.agreement import agreement
from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.engine import Engine
from agq_tvm.targets import load_device
from tests.compiled import CompiledModel
from tests.tiny import write_tiny_model

HERE = load_device("host").instruction_set
TOKENS = np.random.default_rng(5).integers(3, 259, 40).tolist()


def checkpoint_of(folder, family: str, **settings):
    source = write_tiny_model(folder / "m", family, 3)
    settings = {"method": "rtn", "group_size": 64, "activation": "none"} | settings
    quantize(source, folder / "c", **settings)
    return read_checkpoint(folder / "c")


def run(engine: Engine) -> np.ndarray:
    rows = [engine.prefill(TOKENS[:26], all_logits=True), *(engine.decode(token)[None] for token in TOKENS[26:39])]
    return np.concatenate([*rows, engine.prefill(TOKENS[39:])[None]])


@pytest.mark.parametrize(("family", "isa"), [("llama", HERE), ("llama", "generic"), ("bloom", HERE)])
def test_the_compiled_model_is_the_reference(tmp_path, monkeypatch, family, isa):
    checkpoint = checkpoint_of(tmp_path, family)
    model = CompiledModel(checkpoint, isa, 64, monkeypatch, cache="int8")
    exact = ReferenceModel.from_checkpoint(checkpoint)
    reference = exact.altered(lambda _, layer: layer._replace(attend=attend_int8))
    found = run(Engine(model, model))
    same = agreement(reference.logits(TOKENS), found)
    assert same.mean_kl <= 1e-4 and same.top1 >= 0.97
    assert agreement(exact.logits(TOKENS), found).mean_kl > 2 * same.mean_kl  # and not that of other caches


@pytest.mark.parametrize(
    "settings",
    [{"attention": "log2", "calibration": Calibration(samples=3, length=48)}, {"pruning": PruningSchedule((1,), 0.5)}],
    ids=["log2", "pruning"],
)
def test_with_other_features(tmp_path, monkeypatch, settings):
    """Keys are rounded only a little."""
    checkpoint = checkpoint_of(tmp_path, "llama", **settings)
    results = []
    for cache in ("float16", "int8"):
        model = CompiledModel(checkpoint, HERE, 64, monkeypatch, cache=cache)
        engine = Engine(model, model)
        last = engine.prefill(TOKENS[:24])  # a model that prunes does it here
        results.append(np.stack([last, *(engine.decode(token) for token in TOKENS[24:30])]))
    assert 0 < agreement(*results).mean_kl < 0.02


def test_a_bundle_says_what_its_caches_are(tmp_path, capsys):
    checkpoint = checkpoint_of(tmp_path, "llama", activation="per-token-group")
    with pytest.raises(Exception, match="unknown cache 'int4': choose one of float16, int8"):
        compile_checkpoint(checkpoint.path, "host", tmp_path / "b", cache="int4")
    command = ["compile", str(checkpoint.path), "--target", "host", "-o", str(tmp_path / "b"), "--context", "64"]
    assert main([*command, "--cache", "int8"]) == 0
    bundle = Bundle(tmp_path / "b")
    assert bundle.manifest["cache"] == "int8"
    types = {name.removeprefix("layers.0."): dtype for name, _, dtype in bundle.caches if name.startswith("layers.0.")}
    assert types == {"keys": "int8", "values": "int8", "key_scales": "float32", "value_scales": "float32"}
    capsys.readouterr()
    (tmp_path / "text.txt").write_text("All that is gold does not glitter. " * 12)
    assert main(["eval", str(tmp_path / "b"), "--data", str(tmp_path / "text.txt"), "--window", "32", "--json"]) == 0
    assert np.isfinite(json.loads(capsys.readouterr().out)["perplexity"])
