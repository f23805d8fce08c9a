"""How far two honest computations of the same 8-bit model drift apart, and how far a compiled one does.

    python -m benchmarks.agreement CKPT BUNDLE

Logits on the first 512 tokens of a text: float activations against 8-bit ones, the torch reference against itself
with its sums in another order, and the compiled model against the reference.
"""

import argparse
import sys
from pathlib import Path

from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.texts import load_text
from agq_tvm.runtime.agreement import Agreement, agreement
from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.engine import Engine
from agq_tvm.runtime.text import load_tokenizer
from benchmarks.tables import RESULTS, aligned, report, write_report

TEXT, TOKENS = "persuasion", 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("-o", "--output", default=RESULTS / "agreement.json", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments.checkpoint, arguments.bundle)
    print(aligned([("compared", "mean KL", "top-1 %"), *(line(name, same) for name, same in rows.items())]))
    values = [{"compared": name, "mean_kl": same.mean_kl, "top1": same.top1} for name, same in rows.items()]
    write_report(
        arguments.output,
        report("benchmarks.agreement", ("torch", "numpy"), text=TEXT, tokens=TOKENS, rows=values),
    )
    return 0


def line(name: str, same: Agreement) -> tuple[str, str, str]:
    """Lay out one comparison."""
    return name, f"{same.mean_kl:.5f}", f"{100 * same.top1:.1f}"


def measure(checkpoint: str, bundle: str) -> dict[str, Agreement]:
    """Compute all logits; return what each pair has in common."""
    source = read_checkpoint(checkpoint)
    tokens = load_tokenizer(source.path).encode(load_text(TEXT)[0], add_special_tokens=False).ids[:TOKENS]
    reference = ReferenceModel.from_checkpoint(source)
    expected = reference.logits(tokens)
    floats = ReferenceModel.from_checkpoint(source, activation="none").logits(tokens)
    reordered = reference.logits(tokens, trace=lambda *values: None)
    compiled = Engine(Bundle(bundle)).prefill(tokens, all_logits=True)
    return {
        "8-bit activations with float ones": agreement(floats, expected),
        "reference with itself, summed in another order": agreement(expected, reordered),
        "compiled model with reference": agreement(expected, compiled),
        "compiled model with float activations": agreement(floats, compiled),
    }


if __name__ == "__main__":
    sys.exit(main())
