"""What the forms of keys and values cost in perplexity, of a model that is float otherwise.

    python -m benchmarks.caches [MODEL] [--data persuasion,jargon]

Paired with float32 caches, token by token, 8 windows of 512.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from agq_tvm.cli.options import names
from agq_tvm.flow.evaluate import open_reference
from agq_tvm.quantize.activations import dynamic_codes
from agq_tvm.quantize.forward import Attend, float_attention
from agq_tvm.quantize.log2 import value_codes, value_scales
from agq_tvm.quantize.source import open_source
from agq_tvm.quantize.texts import load_text
from agq_tvm.runtime.perplexity import Difference, compare, score
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
"""How queries, keys and values are rounded; the last is what ``agq compile --cache int8`` runs."""


def attending(query: Round, key: Round, value: Round) -> Attend:
    """Return attention that rounds what it is given."""
    return lambda q, k, v, bias: float_attention(query(q), key(k), value(v), bias)


def measure(model: str, text: str, windows: int = WINDOWS, window: int = WINDOW) -> dict[str, Difference]:
    """Score a text with every form of `FORMS`, and compare it with the first one."""
    with tempfile.TemporaryDirectory() as scratch:
        reference, tokenizer = open_reference(open_source(model), Path(scratch))
        encoded = Tokenizer.from_file(str(tokenizer)).encode(load_text(text)[0], add_special_tokens=False)
    tokens = encoded.ids[: windows * window]
    scores = {}
    for name, rounds in FORMS.items():
        attend = attending(*rounds)
        model = reference.altered(lambda _, layer, attend=attend: layer._replace(attend=attend))
        scores[name] = score(model.logits, tokens, window)
    return {name: compare(scores[name], scores["float32"]) for name in FORMS if name != "float32"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", metavar="MODEL", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--data", type=names, default=("persuasion", "jargon"), help="texts, between commas")
    parser.add_argument("-o", "--output", default=RESULTS / "caches.json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for text in arguments.data:
        for form, found in measure(arguments.model, text).items():
            rows.append({"text": text, "caches": form, "nll": found.nll, "nll_stderr": found.nll_stderr})
    lines = [(row["text"], row["caches"], f"{row['nll']:+.4f}", f"{row['nll_stderr']:.4f}") for row in rows]
    print(aligned([("text", "caches", "nll", "error"), *lines]))
    setting = {"windows": WINDOWS, "window": WINDOW}
    write_report(arguments.output, report("benchmarks.caches", ("torch", "numpy"), rows=rows, **setting))
    return 0


if __name__ == "__main__":
    sys.exit(main())
