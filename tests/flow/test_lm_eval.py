"""The harness's own code on tasks made up here: local data, no hub."""

import json
import os
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from agq_tvm.errors import AgqError
from agq_tvm.flow.evaluate import open_reference
from tests.tiny import write_tiny_llama

try:
    import lm_eval  # noqa: F401

    MISSING = False
except ImportError:
    MISSING = True
    warnings.warn("lm-eval is missing (pip install 'agq-tvm[lm-eval]'): its adapter is not tested", stacklevel=1)

needs_harness = pytest.mark.skipif(MISSING, reason="lm-eval is missing")

_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {kind}
test_split: test
{rest}
"""
_CHOICE = """
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
_ROLLING = """
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
"""
_UNTIL = """
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
DOCUMENTS = [
    {
        "question": f"It was a dark and stormy night number {i}",
        "choices": [" or so.", " it rained.", "!"],
        "label": i % 3,
    }
    for i in range(4)
]


def request(*arguments):
    return SimpleNamespace(args=arguments)


def by_hand(reference, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logits = reference.logits(context + continuation)[len(context) - 1 : -1].astype("float64")
    chosen = logits[np.arange(len(continuation)), continuation]
    return float((chosen - np.log(np.exp(logits).sum(1))).sum()), bool((logits.argmax(1) == continuation).all())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("lm-eval") / "model", seed=3, max_position_embeddings=48)


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    return open_reference(source, tmp_path_factory.mktemp("scratch"))[0]


@pytest.fixture(scope="module")
def ours(source):
    from agq_tvm.flow.lm_eval_adapter import AgqModel

    return AgqModel(str(source))


@needs_harness
def test_continuations_are_scored_as_the_model_says(ours, reference):
    pairs = [("It was a dark", " night"), ("It was ", "a"), ("", "It"), ("x" * 100, "yes")]
    found = ours.loglikelihood([request(*pair) for pair in pairs])
    encode = ours.tok_encode
    expected = [
        (encode("It was a dark"), encode(" night")),
        (encode("It was"), encode(" a")),
        ([ours.eot_token_id], encode("It")),
        (encode("x" * 45), encode("yes")),
    ]
    for (value, greedy), (context, continuation) in zip(found, expected, strict=True):
        wanted, is_greedy = by_hand(reference, context, continuation)
        assert value == pytest.approx(wanted, abs=1e-3) and greedy == is_greedy
    best = ours.generate_until([request("It was a dark", {"until": [], "max_gen_toks": 1})])[0]
    tokens = encode("It was a dark")
    assert by_hand(reference, tokens, [int(reference.logits(tokens)[-1].argmax())])[1]
    assert best == ours._tokenizer.decode([int(reference.logits(tokens)[-1].argmax())])
    with pytest.raises(AgqError, match="48 tokens does not fit"):
        ours.loglikelihood([request("a", "b" * 48)])


@needs_harness
def test_rolling_scores_every_token_once(ours, reference):
    text = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals."
    tokens = ours.tok_encode(text)
    assert 48 < len(tokens) < 94
    first = by_hand(reference, [ours.eot_token_id], tokens[:47])[0]
    rest = tokens[47:]
    last = by_hand(reference, tokens[-48 : -len(rest)], rest)[0]
    assert ours.loglikelihood_rolling([request(text)])[0] == pytest.approx(first + last, abs=1e-3)


@needs_harness
def test_generation_ends_where_it_is_told_to(ours):
    whole = ours.generate_until([request("It was a dark", {"max_gen_toks": 12})])[0]
    assert len(whole) > 3
    stop = whole[2:4]
    assert ours.generate_until([request("It was a dark", {"until": stop})])[0] == whole[: whole.find(stop)]
    assert ours.generate_until([request("It was a dark", {"until": ["", "\0"], "max_gen_toks": 12})])[0] == whole
    with pytest.raises(AgqError, match="sampling"):
        ours.generate_until([request("It", {"do_sample": True, "temperature": 0.7})])


@needs_harness
def test_a_bundle_answers_like_its_checkpoint(tiny_bundle, tiny_checkpoint):
    from agq_tvm.flow.lm_eval_adapter import AgqModel

    pairs = [request("It was a dark", " and stormy night"), request("the rain", " "), request("", "fell in torrents")]
    compiled, exact = AgqModel(tiny_bundle), AgqModel(tiny_checkpoint)
    found, wanted = ([value for value, _ in model.loglikelihood(pairs)] for model in (compiled, exact))
    np.testing.assert_allclose(found, wanted, rtol=0.02)
    prompt = request("It was a dark", {"max_gen_toks": 3})
    assert compiled.generate_until([prompt]) == exact.generate_until([prompt])


@needs_harness
def test_tasks_of_every_kind_run(agq, tiny_bundle, tmp_path):
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    kinds = {"choice": ("multiple_choice", _CHOICE), "rolling": ("loglikelihood_rolling", _ROLLING)}
    kinds["until"] = ("generate_until", _UNTIL)
    for name, (kind, rest) in kinds.items():
        (tmp_path / f"{name}.yaml").write_text(_TASK.format(name=name, data=data, kind=kind, rest=rest))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    files = ",".join(str(tmp_path / f"{name}.yaml") for name in kinds)
    run = agq("lm-eval", tiny_bundle, "--tasks", files, "--limit", "3", "--json", env=environment)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["lm_eval"] and result["limit"] == 3
    metrics = {name: task["metrics"] for name, task in result["tasks"].items()}
    assert {name: task["documents"] for name, task in result["tasks"].items()} == dict.fromkeys(kinds, 3)
    from agq_tvm.flow.lm_eval_adapter import AgqModel

    model, used = AgqModel(tiny_bundle), DOCUMENTS[:3]
    right = [
        np.argmax([value for value, _ in model.loglikelihood([request(d["question"], c) for c in d["choices"]])])
        == d["label"]
        for d in used
    ]
    assert metrics["choice"]["acc"][0] == pytest.approx(np.mean(right)) and metrics["choice"]["acc"][1] is not None
    total = sum(model.loglikelihood_rolling([request(document["question"]) for document in used]))
    size = sum(len(document["question"]) for document in used)
    assert metrics["rolling"]["byte_perplexity"][0] == pytest.approx(np.exp(-total / size), rel=1e-3)
    assert metrics["until"]["exact_match"][0] == 0.0


@needs_harness
def test_unknown_tasks_are_one_sentence(tiny_bundle):
    from agq_tvm.flow.harness import run_tasks

    with pytest.raises(AgqError, match=r"cannot run no-such-task \("):
        run_tasks(tiny_bundle, ["no-such-task"])


def test_without_the_harness_it_is_one_sentence(tmp_path, monkeypatch):
    from agq_tvm.flow.harness import run_tasks

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(AgqError, match=r"agq-tvm\[lm-eval\]"):
        run_tasks(tmp_path, ["anything"])
