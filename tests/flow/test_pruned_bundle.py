"""A model that prunes, as a bundle: what it scores, and what its manifest says."""

import pytest

from agq_tvm.errors import AgqError
from agq_tvm.flow import compile, library
from agq_tvm.flow.evaluate import evaluate_reference
from agq_tvm.flow.evaluate_bundle import evaluate, evaluate_bundle
from agq_tvm.flow.quantize import quantize
from agq_tvm.models import relax_decoder
from agq_tvm.quantize.pruning import PruningSchedule
from agq_tvm.runtime.bench import compare_prefill
from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.engine import chunks, prompt_chunks
from agq_tvm.runtime.perplexity import compare
from tests.compiled import functions
from tests.tiny import write_tiny_model

ROWS = 16
TEXT = {"data": "persuasion", "window": 16, "max_tokens": 160}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A folder with a checkpoint that drops half of the tokens in layer 1 of 2, and its bundle for this machine.

    It is compiled in this process and with few functions: seconds instead of half a minute.
    """

    def build(request: library.LibraryRequest):
        library._build(request)
        return library.read_tensors(request)

    path = tmp_path_factory.mktemp("pruned")
    source = write_tiny_model(path / "model", "bloom", 5)
    quantize(source, path / "checkpoint", method="rtn", group_size=32, pruning=PruningSchedule((1,), 0.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relax_decoder, "function_names", lambda: functions(ROWS))
        patch.setattr(compile, "PREFILL_BUCKETS", (ROWS,))
        patch.setattr(compile, "build_library", build)
        compile.compile_checkpoint(path / "checkpoint", "host", path / "bundle", context=64)
    return path


# Chunks of 12 tokens, of 15, and of 16 and 8, all of them but the 16 padded to 16 rows; then a quarter that is scored.
@pytest.mark.parametrize("window", [16, 20, 32])
def test_a_bundle_scores_what_the_reference_scores(pruned, window):
    text, prompt, buckets = TEXT | {"window": window}, window * 3 // 4, Bundle(pruned / "bundle").manifest["buckets"]
    # The reference cuts for all buckets, of which this bundle has one: only where both cut alike, the same tokens stay.
    assert [valid for _, valid in chunks(prompt, buckets)] == prompt_chunks(prompt)
    found, expected = evaluate_bundle(pruned / "bundle", **text), evaluate_reference(pruned / "checkpoint", **text)
    assert found.protocol == expected.protocol == "suffix"
    assert found.losses.shape == (160 // window, window - prompt)
    assert abs(compare(found, expected).nll) < 1e-3 * expected.nll


def test_a_bundle_is_told_from_a_checkpoint(pruned):
    said, found = evaluate(pruned / "bundle", **TEXT), evaluate_bundle(pruned / "bundle", **TEXT)
    assert (said["protocol"], said["tokens"], said["nll"]) == ("suffix", 40, found.nll)
    assert said["selection"] == "chunk"


def test_a_bundle_says_how_it_prunes(pruned):
    bundle = Bundle(pruned / "bundle")
    assert bundle.manifest["pruning"] == {"layers": [1], "beta": 0.5, "renumber": False}
    assert [cache for cache in bundle.caches if cache[2] == "int32"] == [("segments.1.positions", (64,), "int32")]


def test_two_bundles_are_timed_in_turns(pruned):
    bundle = Bundle(pruned / "bundle")
    assert all(10 < speed < 1e7 for speed in compare_prefill(bundle, bundle, 24, rounds=2))
    with pytest.raises(AgqError, match="do not fit the context of 64"):
        compare_prefill(bundle, bundle, 65)


def test_a_bundle_selects_by_chunk(pruned):
    with pytest.raises(AgqError, match="selects tokens by chunk: give a checkpoint"):
        evaluate(pruned / "bundle", **TEXT, selection="prompt")
    said = evaluate(pruned / "checkpoint", **TEXT, selection="prompt")
    assert (said["tokens"], said["selection"]) == (40, "prompt")


@pytest.mark.parametrize(("protocol", "words"), [("paper-protocol", "is for checkpoints"), ("all", "choose the pro")])
def test_protocols_that_a_pruned_bundle_does_not_have(pruned, protocol, words):
    with pytest.raises(AgqError, match=words):
        evaluate_bundle(pruned / "bundle", **TEXT, protocol=protocol)
