"""What quantization costs SmolLM2-135M-Instruct: perplexity on two texts, paired with the unpacked model.

    python -m benchmarks.accuracy

The model is 4 bit already (GGUF Q4_1); "float" is that model unpacked. Every variant scores the same tokens as
it, so that differences have much smaller errors than the perplexities themselves. Exit code 1 if a bound is
not met.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from agq_tvm.flow.compile import compile_checkpoint
from agq_tvm.flow.evaluate import evaluate_reference
from agq_tvm.flow.evaluate_bundle import evaluate_bundle
from agq_tvm.flow.quantize import quantize
from agq_tvm.progress import say
from agq_tvm.quantize.texts import load_text
from agq_tvm.runtime.perplexity import Score, compare
from benchmarks.tables import RESULTS, aligned, report, write_report

WINDOW = 512
TOKENS = 32 * WINDOW  # 511 of every window are scored: 16,352
TEXTS = ("persuasion", "jargon")
# The checkpoints to make: arguments of `quantize`.
CHECKPOINTS = {
    "keep": {"method": "keep"},
    "keep-trip": {"method": "keep", "activation": "per-token", "max_refine": 4},
    "keep-static": {"method": "keep", "activation": "static"},
    "rtn-g64": {"method": "rtn", "group_size": 64, "activation": "none"},
    "gptq-g64": {"method": "gptq", "group_size": 64, "activation": "none"},
}
REFERENCE = "keep, 8 bit per token and group of 32"
COMPILED = f"{REFERENCE}, compiled, prefill in chunks"
COMPILED_LIMIT = 0.002  # of its own reference
# What is scored: a name, its checkpoint, its activations, and by how much the perplexity may grow.
VARIANTS = (
    ("keep, float activations", "keep", "none", 0.0001),
    ("keep, 8 bit per token", "keep", "per-token", None),
    ("keep, 8 bit per token, TRIP up to 2^4", "keep-trip", "per-token", 0.03),
    (REFERENCE, "keep", "per-token-group", 0.008),
    ("keep, 8 bit static", "keep-static", "static", None),
    ("RTN groups of 64, float activations", "rtn-g64", "none", None),
    ("GPTQ groups of 64, float activations", "gptq-g64", "none", None),
)
HALF_OF_RTN = "GPTQ g64 loses at most half of what RTN g64 loses"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="default: %(default)s")
    parser.add_argument("--work", metavar="DIR", help="keep the checkpoints here, and use those that are there")
    parser.add_argument("-o", "--output", default=RESULTS / "accuracy.json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = make_checkpoints(arguments.model, Path(arguments.work or scratch))
        texts = [measure(arguments.model, checkpoints, text) for text in TEXTS]
    for text in texts:
        print(f"\n{text['text']}, {text['tokens']} tokens scored in windows of {WINDOW}, sha256 {text['sha256'][:12]}")
        print(aligned(table(text)))
    write_report(
        arguments.output,
        report("benchmarks.accuracy", ("torch", "numpy"), model=arguments.model, window=WINDOW, texts=texts),
    )
    return 0 if all(bound["met"] for text in texts for bound in text["bounds"]) else 1


def make_checkpoints(model: str, directory: Path) -> dict[str, Path]:
    """Quantize the model in every way; return the checkpoints by name."""
    for name, settings in CHECKPOINTS.items():
        if not (directory / name).exists():
            quantize(model, directory / name, **settings)
    if not (directory / "bundle").exists():
        compile_checkpoint(directory / "keep", "host", directory / "bundle")
    return {name: directory / name for name in (*CHECKPOINTS, "bundle")}


def measure(model: str, checkpoints: dict[str, Path], text: str) -> dict:
    """Score one text with the model and every variant."""
    scores = {"float": timed("float", text, model)}
    for name, checkpoint, activation, _ in VARIANTS:
        scores[name] = timed(name, text, checkpoints[checkpoint], activation)
    started = time.perf_counter()
    scores[COMPILED] = evaluate_bundle(checkpoints["bundle"], text, WINDOW, TOKENS)
    say(f"{text}: {COMPILED}: perplexity {scores[COMPILED].perplexity:.3f} ({time.perf_counter() - started:.0f} s)")
    return {
        "text": text,
        "sha256": load_text(text)[1],
        "tokens": scores["float"].tokens,
        "rows": [row(name, score, scores["float"]) for name, score in scores.items()],
        "bounds": bounds(scores),
    }


def timed(name: str, text: str, model: str | Path, activation: str | None = None) -> Score:
    """Score a text and say how long it took."""
    started = time.perf_counter()
    score = evaluate_reference(model, text, WINDOW, TOKENS, activation)
    say(f"{text}: {name}: perplexity {score.perplexity:.3f} ({time.perf_counter() - started:.0f} s)")
    return score


def row(name: str, score: Score, baseline: Score) -> dict:
    """Describe one variant."""
    change = compare(score, baseline)
    return {
        "variant": name,
        "perplexity": score.perplexity,
        "perplexity_stderr": score.perplexity_stderr,
        "change": change.perplexity_change,
        "change_stderr": change.perplexity_change_stderr,
    }


def bounds(scores: dict[str, Score]) -> list[dict]:
    """Hold every bound against the mean plus two standard errors."""
    found = []
    for name, _, _, limit in VARIANTS:
        if limit is not None:
            change = compare(scores[name], scores["float"])
            upper = change.perplexity_change + 2 * change.perplexity_change_stderr
            found.append({"bound": name, "limit": limit, "upper": upper, "met": bool(upper <= limit)})
    change = compare(scores[COMPILED], scores[REFERENCE])
    upper = change.perplexity_change + 2 * change.perplexity_change_stderr
    name = f"{COMPILED}, from its reference"
    found.append({"bound": name, "limit": COMPILED_LIMIT, "upper": upper, "met": bool(upper <= COMPILED_LIMIT)})
    upper = excess_over_half(*(scores[name] for name in ("float", VARIANTS[-2][0], VARIANTS[-1][0])))
    return [*found, {"bound": HALF_OF_RTN, "limit": 0.0, "upper": upper, "met": bool(upper <= 0)}]


def excess_over_half(exact: Score, rtn: Score, gptq: Score) -> float:
    """Return GPTQ's relative perplexity loss less half of RTN's, plus two standard errors (to first order)."""
    changes = [compare(score, exact) for score in (gptq, rtn)]
    shares = [np.exp(change.nll) * factor for change, factor in zip(changes, (1, -0.5), strict=True)]
    mean = changes[0].perplexity_change - 0.5 * changes[1].perplexity_change
    combined = sum(share * (score.losses - exact.losses) for share, score in zip(shares, (gptq, rtn), strict=True))
    return float(mean + 2 * Score(exact.window, combined).nll_stderr)


def table(text: dict) -> list[tuple[str, ...]]:
    """Lay out the rows of one text, then its bounds."""
    lines = [("variant", "perplexity", "change %", "± 1 SE")]
    for entry in text["rows"]:
        change = (f"{100 * entry['change']:+.4f}", f"{100 * entry['change_stderr']:.4f}")
        lines.append((entry["variant"], f"{entry['perplexity']:.3f}", *change))
    for bound in text["bounds"]:
        verdict = "met" if bound["met"] else "NOT MET"
        limits = (f"{100 * bound['upper']:+.4f}", f"limit {100 * bound['limit']:g}")
        lines.append((f"{verdict}: {bound['bound']} (mean + 2 SE)", "", *limits))
    return lines


if __name__ == "__main__":
    sys.exit(main())
