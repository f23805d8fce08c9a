"""What token pruning costs, and whether it makes activations easier to quantize, by the length of the input.

    python -m benchmarks.pruning

Perplexity is that of the last quarter of each window, before which the rest is pruned (protocol ``suffix``), so that
all rows of a window size score the same tokens. The weights are the same 4-bit ones throughout; activations are float,
static with TRIP (calibrated with the pruning of the row) or scaled per token and group. Layers count from 1.
"""

import argparse
import math
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from agq_tvm.flow.evaluate import SELECTIONS, suffix_logits
from agq_tvm.flow.quantize import Calibration, quantize
from agq_tvm.progress import say
from agq_tvm.quantize.activations import ActivationQuantizer
from agq_tvm.quantize.calibration import cut_windows
from agq_tvm.quantize.checkpoint import Checkpoint, read_checkpoint
from agq_tvm.quantize.pruning import PruningSchedule
from agq_tvm.quantize.reference import ReferenceModel
from agq_tvm.quantize.texts import load_text
from agq_tvm.runtime.perplexity import Difference, Score, compare, score_suffix
from benchmarks.tables import RESULTS, aligned, report, write_report

WINDOWS = (128, 256, 512, 1024)
TOKENS = 3072
DEPTHS = (1 / 3, 1 / 2, 3 / 4)  # of the layers that drop tokens
SHARES = (0.25, 0.5, 0.75)
GROUP = "per token and group"
STATIC = "static, TRIP"
MAX_REFINE = 4
CALIBRATION = 8  # windows; the ranges of 64 are hardly wider


@dataclass(frozen=True)
class Run:
    """One way to run the model.

    Attributes
    ----------
    schedule : PruningSchedule or None
    activation : str
        ``"float"``, `STATIC` or `GROUP`.
    selection : str
        See `agq_tvm.flow.evaluate.SELECTIONS`.
    """

    schedule: PruningSchedule | None
    activation: str = "float"
    selection: str = "chunk"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="default: %(default)s")
    parser.add_argument("--method", default="keep", help="how weights become 4 bit (default: %(default)s)")
    parser.add_argument("--text", default="persuasion", help="default: %(default)s")
    parser.add_argument("--windows", default=",".join(map(str, WINDOWS)), help="their sizes (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each window size (default: %(default)s)")
    parser.add_argument("--work", metavar="DIR", help="keep the checkpoints here, and use those that are there")
    parser.add_argument("-o", "--output", default=RESULTS / "pruning.json", type=Path)
    arguments = parser.parse_args()
    windows = [int(size) for size in arguments.windows.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(arguments.work or scratch)
        found = measure(arguments.model, arguments.method, work, arguments.text, windows, arguments.tokens)
    for name in ("pruning", "choices", "errors"):
        print(f"\n{aligned(table(found[name]))}")
    scored_tokens = {line["window"]: line["scored"] for line in found["pruning"]}
    for window, words in found["verdicts"].items():
        count = scored_tokens[window] // (window - window * 3 // 4)
        print(f"{count} windows of {window}: pruning makes quantizing {words}")
    write_report(arguments.output, report("benchmarks.pruning", ("torch", "numpy"), **found))
    return 0


def measure(model: str, method: str, work: Path, text: str, windows: list[int], tokens: int) -> dict:
    """Quantize as far as need be, score every run on every window size, and lay out what came out."""
    dense = checkpoint_of(model, method, work, None, GROUP)
    schedules = schedules_for(dense.config.num_layers)
    cut = {size: cut_windows(dense.path / "tokenizer.json", text, max(2, tokens // size), size) for size in windows}
    scores: dict[tuple[Run, int], Score] = {}
    errors: dict[tuple[PruningSchedule | None, int], dict] = {}
    for schedule in (None, *schedules):
        static = checkpoint_of(model, method, work, schedule, STATIC)
        quantizers = {STATIC: static, GROUP: dense}
        for activation, checkpoint in {"float": dense, **quantizers}.items():
            reference = ReferenceModel.from_checkpoint(checkpoint, "none" if activation == "float" else None)
            for run in runs(schedule, activation, schedule == schedules[1]):
                reference.pruning = run.schedule
                watch = Watch(quantizers, schedules[0].layers[0]) if run == Run(schedule) else None
                for size in windows:
                    scores[run, size] = scored(run, reference, cut[size], watch)
                    if watch:
                        errors[schedule, size] = watch.take()
            del reference
    return {
        "model": model,
        "text": text,
        "text_sha256": load_text(text)[1],
        "schedules": [asdict(schedule) for schedule in schedules],
        "static_calibration_windows": CALIBRATION,
        "pruning": [line for size in windows for line in pruning_rows(scores, schedules, dense, size)],
        "choices": [line for size in windows for line in choice_rows(scores, schedules[1], size)],
        "errors": [line for size in windows for line in error_rows(errors, schedules, dense, size)],
        "verdicts": {size: verdict([saved(scores, each, STATIC, size) for each in schedules]) for size in windows},
    }


def schedules_for(layers: int) -> list[PruningSchedule]:
    """Return three schedules of the same layers, which drop ever more."""
    chosen = tuple(sorted({math.floor(depth * layers) + 1 for depth in DEPTHS}))
    return [PruningSchedule(chosen, share) for share in SHARES]


def checkpoint_of(model: str, method: str, work: Path, schedule: PruningSchedule | None, activation: str) -> Checkpoint:
    """Make a checkpoint, or read the one that is there."""
    share = f"{schedule.beta:g}" if schedule else "dense"
    settings = {"activation": "static", "max_refine": MAX_REFINE} if activation == STATIC else {}
    directory = work / f"pruning-{'static' if settings else 'group'}-{share}"
    if not directory.exists():
        calibration = Calibration(samples=CALIBRATION)
        group_size = None if method == "keep" else 32
        options = {"method": method, "group_size": group_size, "pruning": schedule, "calibration": calibration}
        quantize(model, directory, **options, **settings)
    return read_checkpoint(directory)


def runs(schedule: PruningSchedule | None, activation: str, is_middle: bool) -> list[Run]:
    """List the runs of a checkpoint; other choices are compared for the middle schedule in float."""
    plain = Run(schedule, activation)
    if not is_middle or activation != "float":
        return [plain]
    return [plain, replace(plain, selection="prompt"), replace(plain, schedule=replace(schedule, renumber=True))]


def scored(run: Run, reference: ReferenceModel, windows: list[list[int]], watch: "Watch | None") -> Score:
    """Score windows with a run, and say what came out."""
    tokens, window = [token for cut in windows for token in cut], len(windows[0])
    model = Watched(reference, watch) if watch else reference
    result = score_suffix(partial(suffix_logits, model, SELECTIONS[run.selection]), tokens, window)
    pruning = "dense" if run.schedule is None else f"beta {run.schedule.beta:g}"
    anew = ", renumbered" if run.schedule and run.schedule.renumber else ""
    say(f"window {window}, {pruning}{anew}, by {run.selection}, {run.activation}: nll {result.nll:.4f}")
    return result


class Watched:
    """A reference whose passes are watched."""

    def __init__(self, reference: ReferenceModel, watch: "Watch"):
        self.pruning = reference.pruning
        self.logits = partial(reference.logits, observer=watch)
        self.prune = partial(reference.prune, observer=watch)


class Watch:
    """An observer that rounds the inputs of linears in every way, from the MLP of the first pruning layer on.

    Parameters
    ----------
    checkpoints : dict
        By the name of the activation.
    first_layer : int
        Counted from 1.
    """

    def __init__(self, checkpoints: dict[str, Checkpoint], first_layer: int):
        self.checkpoints, self.first_layer = checkpoints, first_layer
        self.quantizers: dict[tuple, ActivationQuantizer] = {}
        self.sums: dict[str, list] = {}
        self.take()

    def take(self) -> dict[str, float]:
        """Return the mean over rows and linears of the relative error, by activation, and begin anew."""
        sums, self.sums = self.sums, {name: [0.0, 0] for name in self.checkpoints}
        return {name: total / count for name, (total, count) in sums.items() if count}

    def linear_input(self, layer: int, name: str, x: torch.Tensor) -> None:
        """See `agq_tvm.quantize.reference.Observer`."""
        if layer + 1 < self.first_layer or (layer + 1 == self.first_layer and name in ("qkv", "o")):
            return
        for activation in self.checkpoints:
            error = self._quantizer(activation, layer, name).rounded(x) - x
            relative = error.norm(dim=1) / x.norm(dim=1).clamp_min(1e-30)
            self.sums[activation][0] += float(relative.sum())
            self.sums[activation][1] += len(x)

    def attention(self, *_) -> None:
        """See `agq_tvm.quantize.reference.Observer`."""

    def _quantizer(self, activation: str, layer: int, name: str) -> ActivationQuantizer:
        if (activation, layer, name) not in self.quantizers:
            checkpoint = self.checkpoints[activation]
            linear = next(linear for linear in checkpoint.config.linears if linear.name == name)
            first, scheme = checkpoint.fused(layer, linear.parts)[0], checkpoint.scheme
            static = (float(first.act_scale[0]), int(first.act_zero[0])) if activation == STATIC else None
            alpha = None if first.alpha is None else torch.from_numpy(first.alpha.astype("int32"))
            made = ActivationQuantizer(scheme.activation, scheme.group_size, static, alpha)
            self.quantizers[activation, layer, name] = made
        return self.quantizers[activation, layer, name]


def quantizing(scores: dict, schedule: PruningSchedule | None, activation: str, size: int) -> Score:
    """Return how much more a token costs with rounded activations than with float ones, as if it were a score."""
    rounded, exact = (scores[Run(schedule, name), size] for name in (activation, "float"))
    return Score(size, rounded.losses - exact.losses, rounded.protocol)


def saved(scores: dict, schedule: PruningSchedule, activation: str, size: int) -> Difference:
    """Return how much less quantizing costs with pruning than without."""
    return compare(quantizing(scores, None, activation, size), quantizing(scores, schedule, activation, size))


def verdict(differences: list[Difference]) -> str:
    """Say what pruning did to the cost of quantizing, all schedules together, by two standard errors."""
    clear = [np.sign(each.nll) for each in differences if abs(each.nll) > 2 * each.nll_stderr]
    if clear and min(clear) == max(clear):
        word = "cheaper" if clear[0] > 0 else "dearer"
        return f"{word} with {len(clear)} of {len(differences)} schedules"
    return "neither cheaper nor dearer" if not clear else "cheaper with some schedules, dearer with others"


def pruning_rows(scores: dict, schedules: list, checkpoint: Checkpoint, size: int) -> list[dict]:
    """Describe what pruning and quantizing cost at one window size."""
    rows = []
    for schedule in (None, *schedules):
        for activation in ("float", STATIC, GROUP):
            score = scores[Run(schedule, activation), size]
            line = {"window": size, "scored": score.tokens, **sparsity(schedule, size, checkpoint)}
            line |= {"activations": activation, "perplexity": score.perplexity}
            line |= difference("pruning", compare(score, scores[Run(None, activation), size]))
            line |= difference("quantizing", compare(score, scores[Run(schedule, "float"), size]))
            if schedule is not None:
                line |= difference("saved", saved(scores, schedule, activation, size))
            rows.append(line)
    return rows


def choice_rows(scores: dict, schedule: PruningSchedule, size: int) -> list[dict]:
    """Compare what the middle schedule leaves open: where tokens are selected, and their positions."""
    dense, plain, anew = (Run(each) for each in (None, schedule, replace(schedule, renumber=True)))
    whole = replace(plain, selection="prompt")
    rows = []
    for name, run in (("by chunk", plain), ("in the whole prompt", whole), ("by chunk, renumbered", anew)):
        line = {"window": size, "selection": name, "perplexity": scores[run, size].perplexity}
        line |= difference("from_dense", compare(scores[run, size], scores[dense, size]))
        rows.append(line | difference("from_chunk", compare(scores[run, size], scores[plain, size])))
    return rows


def error_rows(errors: dict, schedules: list, checkpoint: Checkpoint, size: int) -> list[dict]:
    """List the relative errors of the inputs of linears behind the first drop."""
    rows = []
    for schedule in (None, *schedules):
        found = {f"{name}_error": value for name, value in errors[schedule, size].items()}
        rows.append({"window": size, **sparsity(schedule, size, checkpoint), **found})
    return rows


def sparsity(schedule: PruningSchedule | None, size: int, checkpoint: Checkpoint) -> dict:
    """Return beta and s of a schedule for the prompt in a window."""
    if schedule is None:
        return {"beta": 0.0, "sparsity": 0.0}
    share = schedule.sparsity(size * 3 // 4, checkpoint.config.num_layers)
    return {"beta": schedule.beta, "sparsity": share}


def difference(name: str, value: Difference) -> dict:
    """Put a difference into a row."""
    return {f"{name}_nll": value.nll, f"{name}_stderr": value.nll_stderr}


def table(rows: list[dict]) -> list[tuple[str, ...]]:
    """Lay out rows, whose first may lack columns that later ones have."""
    names = list(dict.fromkeys(name for line in rows for name in line))
    header = tuple(name.replace("_nll", " Δnll").replace("_stderr", " ±").replace("_", " ") for name in names)
    return [header, *(tuple(_cell(name, line.get(name)) for name in names) for line in rows)]


def _cell(name: str, value) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:+.4f}" if name.endswith("_nll") else f"{value:.3f}" if name == "perplexity" else f"{value:.4f}"


if __name__ == "__main__":
    sys.exit(main())
