"""Models that prune, compiled, against the torch reference: the same tokens in every cache, and the same logits."""

import re

import numpy as np
import pytest

from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.kernels.emit import LANES
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.pruning import PruningSchedule
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.runtime.agreement import agreement
from agq_tvm.runtime.engine import Engine, chunks
from agq_tvm.targets import load_device
from tests.compiled import CompiledModel
from tests.tiny import write_tiny_model

HERE = load_device("host").instruction_set
CONTEXT = 64
ROWS = 24
TOKENS = np.random.default_rng(8).integers(3, 259, 48).tolist()
SHARED = {"apply_residual_connection_post_layernorm": True}
NORMS_AFTER = {"num_hidden_layers": 3, "do_layer_norm_before": False}
CASES = {  # family, its variant, its schedule, attention, instruction set; seeds under which few codes are ties
    "llama": ("llama", {"num_hidden_layers": 4}, PruningSchedule((2, 3), 0.6), "float", HERE, 3),
    "llama, renumbered": ("llama", {"num_hidden_layers": 4}, PruningSchedule((2, 3), 0.6, True), "float", HERE, 3),
    "opt, norms after": ("opt", NORMS_AFTER, PruningSchedule((1,), 0.5), "float", "generic", 3),
    "bloom, norms shared": ("bloom", {"n_layer": 4} | SHARED, PruningSchedule((1, 3, 4), 0.8), "log2", "generic", 3),
    "bloom, renumbered": ("bloom", {"n_layer": 3}, PruningSchedule((1, 2), 0.7, True), "float", "generic", 4),
}


class Keys:
    """An observer that keeps the keys of every layer, [KV heads, R, D]."""

    def __init__(self):
        self.keys = []

    def linear_input(self, layer, name, x):
        pass

    def attention(self, layer, q, k, bias):
        self.keys.append(k.numpy())


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory):
    """The reference and the compiled model of a case."""
    family, overrides, schedule, attention, isa, seed = CASES[request.param]
    root = tmp_path_factory.mktemp("pruned")
    source = write_tiny_model(root / "m", family, seed, **overrides)
    settings = {"attention": attention, "calibration": Calibration(samples=2, length=48)}
    quantize(source, root / "c", method="rtn", group_size=64, pruning=schedule, **settings)
    checkpoint = read_checkpoint(root / "c")
    with pytest.MonkeyPatch.context() as patch:
        model = CompiledModel(checkpoint, isa, CONTEXT, patch, ROWS)
    return ReferenceModel.from_checkpoint(checkpoint), model


def cached_keys(model: CompiledModel, layer: int) -> np.ndarray:
    """Return a layer's keys, [KV heads, context, D]."""
    index = [name for name, _, _ in model.caches].index(f"layers.{layer}.keys")
    keys = model._tensors[index].numpy().astype("float32")
    return keys.transpose(0, 1, 3, 2).reshape(len(keys), CONTEXT, -1)


def check_caches(reference: ReferenceModel, model: CompiledModel, engine: Engine, tokens, cut) -> np.ndarray:
    """Compare every layer's cache with the keys of the reference's rows; return its logits."""
    seen = Keys()
    expected = reference.prune(tokens, cut, observer=seen)
    segment, layers = 0, reference.pruning.layers
    for layer, keys in enumerate(seen.keys):
        count = engine._cached[segment]
        assert count == len(expected.kept[segment]) == keys.shape[1]
        found = cached_keys(model, layer)[:, :count]
        # Another token's key is nowhere near.
        np.testing.assert_allclose(found, keys, atol=0.05 * np.abs(keys).max(), err_msg=f"layer {layer}")
        segment += layer + 1 in layers
    assert CONTEXT % LANES == 0 and engine.length == len(tokens)
    return expected.logits


def test_the_same_tokens_stay_and_decoding_goes_on(both):
    """Codes on a tie move a few rows of these small models by 1e-2; the others agree to 1e-11."""
    reference, model = both
    engine, expected, found = Engine(model, model), [], []
    for prompt in (1, 2, 3, 8, 23, 24, 25, 26, 40):
        cut = [valid for _, valid in chunks(prompt, [ROWS])]
        engine.reset()
        found.append(engine.prefill(TOKENS[:prompt])[None])
        expected.append(check_caches(reference, model, engine, TOKENS[:prompt], cut)[-1:])
        found += [engine.decode(token)[None] for token in TOKENS[prompt : prompt + 3]]
        found.append(engine.prefill(TOKENS[prompt + 3 : prompt + 8], all_logits=True))
        expected.append(check_caches(reference, model, engine, TOKENS[: prompt + 8], cut)[-8:])
    rows = [agreement(*row[:, None]).mean_kl for row in np.stack([np.concatenate(expected), np.concatenate(found)], 1)]
    assert np.median(rows) <= 1e-9 and np.mean(rows) <= 5e-3


def test_a_chunk_runs_with_fewer_rows_later(both):
    reference, model = both
    counts = reference.pruning.counts(ROWS)
    expected = {-(-count // 8) * 8 for count in counts}
    linears = {gvar.name_hint for gvar, _ in model.lowered.functions_items() if gvar.name_hint.startswith("linear_w4")}
    rows = {int(re.search(r"_m(\d+)_", name)[1]) for name in linears}
    assert rows == {1, ROWS, *expected} and len(expected) > 1


def test_a_second_prompt_is_pruned_by_itself(both):
    """The conversation goes on: position 0 is in the caches already, and the new last token stays."""
    reference, model = both
    engine = Engine(model, model)
    engine.prefill(TOKENS[:20])
    engine.prefill(TOKENS[20:40])
    both_cached = [2 * count for count in reference.pruning.counts(20)]
    assert engine._cached == both_cached and engine.length == 40
    engine.reset()
    assert engine._cached == [0] * len(both_cached) and engine.length == 0
