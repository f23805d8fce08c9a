"""The command line as a user meets it: results on standard output, one sentence and code 2 for a mistake."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from agq_tvm.cli.main import build_parser, main
from tests.tiny import write_tiny_llama


def result_of(process) -> dict:
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def refused(process, *words: str) -> None:
    assert process.returncode == 2, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("agq: ")]
    assert len(lines) == 1 and "Traceback" not in process.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents. " * 20)
    return path


def test_whole_way(agq, tmp_path, text):
    model = write_tiny_llama(tmp_path / "model", seed=3)
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    made = result_of(agq("quantize", model, "-o", checkpoint, "--method", "rtn", "--group-size", "32", "--json"))
    assert made["method"] == "rtn" and made["group_size"] == 32
    made = result_of(agq("compile", checkpoint, "--target", "host", "-o", bundle, "--context", "128", "--json"))
    assert made["context"] == 128
    written = result_of(agq("generate", bundle, "--prompt", "It was", "--max-tokens", "5", "--json"))
    assert written["prompt"] == "It was" and 0 <= written["generated_tokens"] <= 5
    plain = agq("generate", bundle, "--prompt", "It was", "--max-tokens", "5")
    assert plain.stdout == "It was" + written["text"] + "\n"
    scores = [
        result_of(agq("eval", what, "--data", text, "--window", "64", "--json")) for what in (bundle, checkpoint, model)
    ]
    names = {"perplexity", "perplexity_stderr", "nll", "nll_stderr", "tokens", "window", "protocol", "text"}
    assert all(set(score) == names | {"selection", "text_sha256"} for score in scores)
    assert all(0 < score["perplexity_stderr"] < score["perplexity"] for score in scores)
    assert scores[0]["tokens"] == scores[1]["tokens"] == scores[2]["tokens"] > 500
    assert scores[0]["nll"] == pytest.approx(scores[1]["nll"], rel=1e-3)
    assert scores[0]["nll"] != scores[2]["nll"]
    speed = result_of(agq("bench", bundle, "--prefill", "40", "--decode", "5", "--rounds", "1", "--json"))
    assert list(speed["tests"]) == ["pp40", "tg5"] and all(test["mean"] > 0 for test in speed["tests"].values())


def test_budget_of_activation_bits(agq, tmp_path):
    model = write_tiny_llama(tmp_path / "model", seed=3)
    options = ("--method", "rtn", "--group-size", "32", "--fold", "--activation-bits")
    told = agq("quantize", model, "-o", tmp_path / "c", *options, "5.0")
    assert told.returncode == 0, told.stderr
    assert (
        "4 to 7 bit, 5.000 on average with scales and zero points" in told.stdout and "norms folded in" in told.stdout
    )
    refused(agq("quantize", model, "-o", tmp_path / "d", *options, "4.3"), "4.3 bits are too few", "4.375")


def test_targets_and_kernels(agq):
    targets = result_of(agq("targets", "--json"))
    assert {"raspberry-pi-4", "snapdragon-870"} <= {target["name"] for target in targets["targets"]}
    assert "raspberry-pi-4" in agq("targets").stdout
    kernels = result_of(agq("kernels", "--json"))["kernels"]
    assert {"vpdpbusd", "vpmaddubsw", "sdot", "smlal"} <= {kernel["instruction"] for kernel in kernels}


def test_unknown_target(agq, tiny_checkpoint, tmp_path):
    refused(
        agq("compile", tiny_checkpoint, "--target", "toaster", "-o", tmp_path / "b"),
        "toaster",
        "raspberry-pi-4",
    )
    assert list(tmp_path.iterdir()) == []


def test_not_a_checkpoint(agq, tmp_path):
    refused(agq("compile", tmp_path / "nothing", "--target", "host", "-o", tmp_path / "b"), "nothing")
    refused(agq("eval", tmp_path / "nothing", "--data", "persuasion"), "nothing")
    refused(agq("generate", tmp_path / "nothing", "--prompt", "x"), "is not a bundle")
    assert list(tmp_path.iterdir()) == []


def test_truncated_checkpoint(agq, tiny_checkpoint, tmp_path):
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(agq("compile", broken, "--target", "host", "-o", tmp_path / "b"), "broken")
    assert not (tmp_path / "b").exists()


def test_options_beside_a_variant_take_precedence(agq, tmp_path):
    model = write_tiny_llama(tmp_path / "model")
    given = ("--variant", "w8a8", "--group-size", "32", "--activation", "per-token-group", "--json")
    made = result_of(agq("quantize", model, "-o", tmp_path / "c", *given))
    assert (made["weight_bits"], made["group_size"], made["activation"]) == (8, 32, "per-token-group")


@pytest.mark.parametrize("name,word", [("release", "benchmarks.accuracy"), ("agileq-2", "agileq-4")])
def test_variants_that_cannot_be_made(agq, tmp_path, name, word):
    refused(agq("quantize", tmp_path / "model", "-o", tmp_path / "c", "--variant", name), name, word)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("context", ["8", "100000"])
def test_context_that_does_not_fit(agq, tiny_checkpoint, tmp_path, context):
    arguments = ("compile", tiny_checkpoint, "--target", "host", "-o", tmp_path / "b", "--context", context)
    refused(agq(*arguments), context, "256")


def test_output_that_is_not_ours_is_left_alone(agq, tiny_checkpoint, tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    refused(agq("compile", tiny_checkpoint, "--target", "host", "-o", tmp_path), "not an earlier bundle")
    assert (tmp_path / "keep.txt").read_text() == "mine"


def test_full_disk(tiny_checkpoint, tmp_path):
    """A limit on file size stands for the full disk: both end a write half-way."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from agq_tvm.cli.main import main\n"
        f"sys.exit(main(['compile', {str(tiny_checkpoint)!r}, '--target', 'host', '-o', {str(tmp_path / 'b')!r}]))\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    refused(process)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", (["schedules", "list"], ["targets"]))
def test_a_reader_who_has_enough_is_no_error(command):
    """`| head` closes the pipe, before a long output is whole, and before a short one is flushed."""
    read, write = os.pipe()
    os.close(read)
    script = f"import sys; from agq_tvm.cli.main import main; sys.exit(main({command!r}))"
    process = subprocess.run(
        [sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write)
    assert (process.returncode, process.stderr) == (141, "")


def test_a_mistake_is_told_where_a_bar_stood():
    """An error leaves the bar of the loop that raised it; the sentence must not go on where that ends."""
    script = (
        "import sys, time\n"
        "from agq_tvm.cli import main\n"
        "from agq_tvm.errors import AgqError\n"
        "from agq_tvm.progress import progress\n"
        "def run(_):\n"
        "    for number in progress(range(9), 'counting'):\n"
        "        time.sleep(1.1)\n"
        "        if number: raise AgqError('it is lost')\n"
        "parsed = type('Parser', (), {'parse_args': lambda self, _: type('Arguments', (), {'run': run})})\n"
        "main.build_parser = parsed\n"
        "sys.exit(main.main([]))\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert process.returncode == 2, process.stderr
    lines = [line for line in re.split(r"[\r\n]", process.stderr) if line.strip()]
    assert lines[-1] == "agq: it is lost" and lines[-2].startswith("counting:")


def test_bundle_for_another_machine(agq, tiny_checkpoint, tmp_path):
    bundle = tmp_path / "b"
    assert agq("compile", tiny_checkpoint, "--target", "generic-aarch64", "-o", bundle).returncode == 0
    process = agq("generate", bundle, "--prompt", "x")
    refused(process, "aarch64", "--target host")
    assert process.stdout == ""


def test_every_command_has_help(agq):
    names = list(build_parser()._subparsers._group_actions[0].choices)
    assert {
        "quickstart",
        "quantize",
        "compile",
        "generate",
        "eval",
        "lm-eval",
        "analyze",
        "prune-search",
        "profile",
        "bench",
        "targets",
        "kernels",
        "boards",
    } <= set(names)
    for name in names:
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args([name, "--help"])
        assert stop.value.code == 0


def test_import_is_light():
    """`import agq_tvm` and the command's own start need neither torch nor TVM."""
    script = (
        "import sys, agq_tvm, agq_tvm.cli.main\n"
        "agq_tvm.cli.main.build_parser()\n"
        "print([m for m in ('torch', 'transformers', 'tvm') if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert process.stdout.strip() == "[]"


def test_running_needs_no_torch(tiny_bundle):
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from agq_tvm.runtime.bundle import Bundle\n"
        "from agq_tvm.runtime.engine import Engine\n"
        f"print(len(Engine(Bundle({str(tiny_bundle)!r})).prefill([1, 2, 3])))"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert process.stdout.strip() == "260", process.stderr


def test_pruning_needs_layers_and_a_share(agq, tmp_path):
    arguments = ("quantize", write_tiny_llama(tmp_path / "model"), "-o", tmp_path / "c", "--method", "rtn")
    refused(agq(*arguments, "--prune-layers", "1,2"), "--prune-beta")
    refused(agq(*arguments, "--prune-layers", "1,9", "--prune-beta", "0.5"), "layer 9 does not exist")
    refused(agq(*arguments, "--prune-renumber"), "--prune-renumber", "--prune-layers")
    made = result_of(agq(*arguments, "--prune-layers", "1,2", "--prune-beta", "0.5", "--prune-renumber", "--json"))
    assert made["pruning"] == {"layers": [1, 2], "beta": 0.5, "renumber": True}


def test_shifts_need_columns_and_static_activations(agq, tmp_path, text):
    arguments = ("quantize", write_tiny_llama(tmp_path / "model"), "-o", tmp_path / "c", "--method", "rtn")
    arguments += ("--calibration", text, "--max-refine", "3", "--shifts", "--activation", "static")
    refused(agq(*arguments), "group size column")
    made = agq(*arguments, "--group-size", "column")
    assert "group size column" in made.stdout and "static, TRIP up to 2^3 by shifts" in made.stdout


def test_eval_says_what_was_scored(agq, tiny_checkpoint, text):
    arguments = ("eval", tiny_checkpoint, "--data", text, "--window", "64")
    result = result_of(agq(*arguments, "--json"))
    lines = dict(line.split(None, 1) for line in agq(*arguments).stdout.splitlines())
    assert lines["perplexity"] == f"{result['perplexity']:.4f} ± {result['perplexity_stderr']:.4f}"
    assert lines["tokens"] == f"{result['tokens']} scored, windows of 64, protocol all"
    sha256 = hashlib.sha256(text.read_bytes()).hexdigest()
    assert lines["text"] == f"{text} (sha256 {sha256[:12]})" and result["text_sha256"] == sha256
    one = result_of(agq(*arguments, "--max-tokens", "64", "--json"))
    assert (one["tokens"], one["nll_stderr"], one["perplexity_stderr"]) == (63, None, None)


def test_calibration_is_chosen_and_shown(agq, tmp_path, text):
    model = write_tiny_llama(tmp_path / "model")
    options = ("--calibration-samples", "2", "--calibration-length", "30", "--seed", "4", "--calibration")
    shown = agq("quantize", model, "-o", tmp_path / "c", *options, text)
    assert f"2 windows of 30, seed 4, of {text} (sha256 " in shown.stdout, shown.stderr
    (tmp_path / "short").write_text("short")
    refused(
        agq("quantize", model, "-o", tmp_path / "d", *options, tmp_path / "short"), "5 tokens", "give a longer text"
    )
    assert not (tmp_path / "d").exists()


def test_data_sets_by_name(agq, tiny_checkpoint, tmp_path):
    def scored(**variables):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), **variables}
        return agq("eval", tiny_checkpoint, "--data", "ptb", "--window", "64", "--json", env=environment)

    refused(scored(), "no copy of ptb", "AGQ_DATA")
    (tmp_path / "ptb.test.txt").write_text("made up words for the test \n" * 20)
    assert result_of(scored(AGQ_DATA=str(tmp_path)))["text"] == "ptb test"


@pytest.mark.parametrize(
    "option", ["--timeout=0", "--timeout=-1", "--timeout=nan", "--time-limit=0", "--time-limit=inf", "--cooldown=-1"]
)
def test_seconds_that_are_none(capsys, option):
    with pytest.raises(SystemExit) as ended:
        main(["tune", "checkpoint", "--target", "host", option])
    assert ended.value.code == 2 and f"{option.split('=')[1]} is no time" in capsys.readouterr().err
