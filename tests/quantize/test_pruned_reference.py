"""The reference with pruning: by hand with transformers' modules, and by what must hold for every family."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from agq_tvm.models.decoder import PREFILL_BUCKETS
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.forward import start_probabilities
from agq_tvm.quantize.pruning import PruningSchedule, select
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.source import open_source
from agq_tvm.runtime.engine import chunks
from tests.tiny import tiny_config, write_tiny_model

TOKENS = np.random.default_rng(3).integers(3, 259, 50).tolist()
FAMILIES = {
    "llama": ("llama", {}),
    "opt": ("opt", {}),
    "opt, norms after": ("opt", {"do_layer_norm_before": False}),
    "bloom": ("bloom", {}),
    "bloom, norms shared": ("bloom", {"apply_residual_connection_post_layernorm": True}),
}


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path) -> ReferenceModel:
    family, overrides = FAMILIES[request.param]
    return ReferenceModel.from_source(open_source(write_tiny_model(tmp_path / "m", family, 4, **overrides)))


def start_scores(model: ReferenceModel, tokens: list[int]) -> np.ndarray:
    """Return what the rows of a pass without pruning give to the first token in the first layer, [T]."""

    class Watcher:
        def linear_input(self, layer, name, x):
            pass

        def attention(self, layer, q, k, bias):
            if layer == 0:
                self.scores = start_probabilities(q, k, bias).sum(0).numpy()

    watcher = Watcher()
    model.logits(tokens, observer=watcher)
    return watcher.scores


def by_hand(path, tokens: list[int], schedule: PruningSchedule, keeps: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Prune with transformers' modules, one layer after the other; return logits and which tokens are left."""
    config = LlamaConfig(**tiny_config(num_hidden_layers=4), attn_implementation="eager")
    theirs = LlamaForCausalLM(config).eval()
    tensors = {name: torch.from_numpy(value) for name, value in load_file(path / "model.safetensors").items()}
    theirs.load_state_dict(tensors, strict=False)
    hidden, positions, keeps = theirs.model.embed_tokens(torch.tensor([tokens])), torch.arange(len(tokens)), [*keeps]
    for i, layer in enumerate(theirs.model.layers):
        rope = theirs.model.rotary_emb(hidden, (torch.arange(len(positions)) if schedule.renumber else positions)[None])
        mask = torch.full((len(positions),) * 2, -torch.inf).triu(1)[None, None]
        attended, maps = layer.self_attn(layer.input_layernorm(hidden), rope, mask)
        hidden = hidden + attended
        if i + 1 in schedule.layers:
            assert maps.shape == (1, 6, len(positions), len(positions))
            importance = maps[0, :, :, 0].sum(0).numpy()
            ranked = sorted(range(1, len(positions) - 1), key=lambda row: -importance[row])
            left = sorted([0, *ranked[: keeps.pop(0) - 2], len(positions) - 1])
            hidden, positions = hidden[:, left], positions[left]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return theirs.lm_head(theirs.model.norm(hidden))[0].numpy(), positions.numpy()


@pytest.mark.parametrize("renumber", [False, True])
def test_whole_prompt_by_hand(tmp_path, renumber):
    path = write_tiny_model(tmp_path / "m", "llama", 6, num_hidden_layers=4)
    model = ReferenceModel.from_source(open_source(path))
    model.pruning = PruningSchedule((2, 3), 0.6, renumber)
    with torch.inference_mode():
        expected, positions = by_hand(path, TOKENS, model.pruning, [32, 21])
    found = model.prune(TOKENS, [len(TOKENS)])
    assert [len(kept) for kept in found.kept] == [50, 32, 21]
    np.testing.assert_array_equal(found.kept[-1], positions)
    np.testing.assert_allclose(found.logits, expected, atol=2e-4 * np.abs(expected).max())


def test_the_first_layer_drops_the_least_important(model):
    model.pruning = PruningSchedule((1,), 0.4)
    scores = start_scores(model, TOKENS)
    assert scores[0] == pytest.approx(6)
    whole = model.prune(TOKENS, [50])
    np.testing.assert_array_equal(whole.kept[1], select(scores, 30, [0, 49]))
    cut = [valid for _, valid in chunks(50, PREFILL_BUCKETS)]
    assert cut == [32, 16, 2]
    local = model.prune(TOKENS, cut)
    parts = [select(scores[:32], 20, [0]), 32 + select(scores[32:48], 10), 48 + select(scores[48:], 2, [1])]
    np.testing.assert_array_equal(local.kept[1], np.concatenate(parts))


def test_in_the_last_layer_pruning_changes_nothing_for_the_rest(model):
    """Its attention still sees all tokens, and an MLP looks at one."""
    model.pruning = PruningSchedule((2,), 0.7)
    left = model.prune(TOKENS, [20, 20])
    assert [len(kept) for kept in left.kept] == [50, 10 + 6 + 6]
    np.testing.assert_array_equal(left.kept[1][-10:], range(40, 50))
    expected = model.logits(TOKENS)
    np.testing.assert_allclose(left.logits, expected[left.kept[1]], atol=2e-5 * np.abs(expected).max())


def test_pruning_nothing_is_the_model_as_it_is(model):
    model.pruning = PruningSchedule((1, 2), 0.01)
    left = model.prune(TOKENS, [32, 18])
    assert [len(kept) for kept in left.kept] == [50, 50, 50]
    np.testing.assert_array_equal(left.logits, model.logits(TOKENS))


def test_what_comes_later_does_not_change_what_was_dropped(model):
    model.pruning = PruningSchedule((1, 2), 0.6)
    alone, longer = model.prune(TOKENS[:40], [32, 8]), model.prune(TOKENS, [32, 8])
    for few, many in zip(alone.kept, longer.kept, strict=True):
        np.testing.assert_array_equal(many, [*few, *range(40, 50)])
    rows = len(alone.logits)
    np.testing.assert_allclose(longer.logits[:rows], alone.logits, atol=2e-5 * np.abs(alone.logits).max())


def test_positions_counted_anew_show_where_attention_knows_distances(model):
    """Learned positions enter once; the same first choice of tokens, then other logits of all others."""
    kept, anew = [], []
    for renumber, logits in ((False, kept), (True, anew)):
        model.pruning = PruningSchedule((1,), 0.5, renumber)
        left = model.prune(TOKENS, [32, 8])
        logits += [left.kept[1].tolist(), left.logits]
    assert kept[0] == anew[0] != [*range(len(kept[0]))]
    if model.config.positions == "learned":
        np.testing.assert_array_equal(anew[1], kept[1])
    else:
        far = np.abs(anew[1] - kept[1]).max(1) > 1e-3 * np.abs(kept[1]).max()
        assert not far[0] and far[-10:].all()


@pytest.mark.parametrize("tokens", [TOKENS[:1], TOKENS[:2]])
def test_the_shortest_prompts_lose_nothing(model, tokens):
    model.pruning = PruningSchedule((1, 2), 0.99)
    np.testing.assert_array_equal(model.prune(tokens, [len(tokens)]).logits, model.logits(tokens))


def test_every_layer_keeps_the_first_token_and_the_last(model):
    model.pruning = PruningSchedule((1, 2), 0.99)
    for chunk in ([50], [32, 16, 2], [49, 1], [1, 49]):
        for kept in model.prune(TOKENS, chunk).kept:
            assert kept[0] == 0 and kept[-1] == 49 and len(set(kept)) == len(kept)


def test_the_schedule_comes_from_the_checkpoint(quantized):
    schedule = PruningSchedule((1,), 0.5)
    model = ReferenceModel.from_checkpoint(read_checkpoint(quantized(pruning=schedule)))
    assert model.pruning == schedule
    rows = []
    model.prune(TOKENS, [50], trace=lambda name, codes, *_: rows.append((name, len(codes))))
    assert rows[:4] == [("layers.0.qkv", 50), ("layers.0.o", 50), ("layers.0.gate_up", 25), ("layers.0.down", 25)]
    assert {count for _, count in rows[4:]} == {25}


def test_chunks_that_do_not_fit(model):
    with pytest.raises(ValueError):
        model.prune(TOKENS, [50])
    model.pruning = PruningSchedule((1,), 0.5)
    for chunk in ([51], [], [0, 50]):
        with pytest.raises(ValueError):
            model.prune(TOKENS, chunk)
