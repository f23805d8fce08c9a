"""What the forms of keys and values, and of embedding and head, cost in perplexity.

    python -m benchmarks.caches [MODEL] [--data persuasion,jargon] [--work DIR] [--only caches|heads]

Paired, token by token, 8 windows of 512. Caches: of a model that is float otherwise, against float32 ones. Heads: of
the model as ``agq quantize --head-bits`` makes it, activations quantized, against one whose tables are float16.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from agq_tvm.cli.options import names
from agq_tvm.errors import AgqError
from agq_tvm.flow.evaluate import open_reference
from agq_tvm.flow.quantize import quantize
from agq_tvm.quantize.activations import dynamic_codes
from agq_tvm.quantize.calibration import encode_text
from agq_tvm.quantize.forward import Attend, float_attention
from agq_tvm.quantize.log2 import value_codes, value_scales
from agq_tvm.quantize.source import Source, open_source
from agq_tvm.quantize.texts import load_text
from agq_tvm.runtime.perplexity import Score, compare, score
from benchmarks.tables import RESULTS, aligned, report, write_report

WINDOW, WINDOWS = 512, 8
Round = Callable[[Tensor], Tensor]


def _float32(x: Tensor) -> Tensor:
    return x


def _float16(x: Tensor) -> Tensor:
    return x.half().float()


def by_token(x: Tensor) -> Tensor:
    """Round to int8, float32 [heads, T, D], with a scale for each token and head."""
    codes, scales = dynamic_codes(x)
    return codes * scales


def by_head(x: Tensor) -> Tensor:
    """Round to int8 with a scale for each head: that of the window itself, which no calibration could better."""
    scales = value_scales(x.abs().amax((1, 2)))
    return value_codes(x, scales) * scales[:, None, None]


FORMS: dict[str, tuple[Round, Round, Round]] = {
    "float32": (_float32, _float32, _float32),
    "float16": (_float32, _float16, _float16),
    "int8 keys": (_float32, by_token, _float16),
    "int8 values, by token": (_float32, _float16, by_token),
    "int8 values, by head": (_float32, _float16, by_head),
    "int8 keys and values": (_float32, by_token, by_token),
    "int8 queries, keys and values": (by_token, by_token, by_token),
}
"""How queries, keys and values are rounded; the second is what compiled models have, the last ``--cache int8``."""


def attending(query: Round, key: Round, value: Round) -> Attend:
    """Return attention that rounds what it is given."""
    return lambda q, k, v, bias: float_attention(query(q), key(k), value(v), bias)


HEADS = {"16 bit": 16, "8 bit": 8, "4 bit": 4}
"""What ``--head-bits`` stores embedding and head as."""


def score_caches(source: Source, text: str, windows: int = WINDOWS, window: int = WINDOW) -> dict[str, Score]:
    """Score a text with every form of `FORMS`; the first is what the others are compared with."""
    scores = {}
    with tempfile.TemporaryDirectory() as scratch:
        reference, tokenizer = open_reference(source, Path(scratch))
        tokens = _tokens(tokenizer, text, windows * window)
    for name, rounds in FORMS.items():
        attend = attending(*rounds)
        model = reference.altered(lambda _, layer, attend=attend: layer._replace(attend=attend))
        scores[name] = score(model.logits, tokens, window)
    return scores


def score_heads(
    source: Source, text: str, work: Path, windows: int = WINDOWS, window: int = WINDOW
) -> dict[str, Score]:
    """Score a text with every form of `HEADS`; the first is what the others are compared with.

    Parameters
    ----------
    source : Source
    text : str
    work : Path
        Checkpoints that are there are used; others are made there, with the defaults of ``agq quantize``.
    windows, window : int
        Windows of the text, and tokens of each.
    """
    scores = {}
    for name, bits in HEADS.items():
        checkpoint = work / f"head-{bits}"
        if not checkpoint.exists():
            quantize(source, checkpoint, head_bits=bits)
        model, tokenizer = open_reference(checkpoint, work)
        scores[name] = score(model.logits, _tokens(tokenizer, text, windows * window), window)
    return scores


def rows_of(text: str, what: str, scores: dict[str, Score]) -> list[dict]:
    """Return a row for each form, all against the first."""
    first, rows = next(iter(scores)), []
    for form, scored in scores.items():
        row = {"text": text, "what": what, "form": form, "perplexity": scored.perplexity}
        if form != first:
            found = compare(scored, scores[first])
            row |= {"nll": found.nll, "nll_stderr": found.nll_stderr}
            row |= {"change": found.perplexity_change, "change_stderr": found.perplexity_change_stderr}
        rows.append(row)
    return rows


def _tokens(tokenizer: Path, text: str, count: int) -> list[int]:
    return encode_text(tokenizer, load_text(text)[0])[:count]


def _cells(row: dict) -> tuple[str, ...]:
    change = (f"{100 * row['change']:+.2f}", f"{100 * row['change_stderr']:.2f}") if "change" in row else ("", "")
    return (row["text"], f"{row['what']}: {row['form']}", f"{row['perplexity']:.3f}", *change)


def _measure(arguments: argparse.Namespace, work: Path) -> list[dict]:
    source, rows = open_source(arguments.model), []
    for text in arguments.data:
        if arguments.only != "heads":
            rows += rows_of(text, "caches", score_caches(source, text))
        if arguments.only != "caches":
            rows += rows_of(text, "embedding, head", score_heads(source, text, work))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", metavar="MODEL", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--data", type=names, default=("persuasion", "jargon"), help="texts, between commas")
    parser.add_argument("--work", metavar="DIR", type=Path, help="keep checkpoints here, and use those that are there")
    parser.add_argument("--only", choices=("caches", "heads"))
    parser.add_argument("-o", "--output", default=RESULTS / "caches.json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = _measure(arguments, arguments.work or Path(scratch))
    print(aligned([("text", "form", "perplexity", "change %", "± SE"), *map(_cells, rows)]))
    setting = {"windows": WINDOWS, "window": WINDOW}
    write_report(arguments.output, report("benchmarks.caches", ("torch", "numpy"), rows=rows, **setting))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AgqError as error:
        sys.exit(f"benchmarks.caches: {error}")
