"""The search for the pruning schedule that costs least perplexity at a wanted speed-up of prefill."""

import math
import os
import random
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.files import read_json, write_json
from agq_tvm.flow.evaluate import is_checkpoint, open_reference, suffix_logits
from agq_tvm.flow.prefill_cost import speedup
from agq_tvm.models.decoder import DecoderConfig
from agq_tvm.progress import progress, say
from agq_tvm.quantize.calibration import cut_windows
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.quantize.pruning import PruningSchedule
from agq_tvm.quantize.texts import load_text
from agq_tvm.runtime.bench import compare_prefill
from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.engine import prompt_chunks
from agq_tvm.runtime.perplexity import Difference, Score, compare, score_suffix

if TYPE_CHECKING:
    from agq_tvm.quantize.reference import ReferenceModel

ROUNDS = (2, 4, 8, 16)
"""Windows that schedules have been scored on after each round; the better half goes on to the next."""
_FIRST_LAYERS = (1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3)
_MOST_LAYERS = 4
_FINALISTS = 3
_LARGEST_SHARE = 0.99
_SHARES = 1000


@dataclass
class Candidate:
    """A schedule that has the wanted speed-up, and what is known of it.

    Attributes
    ----------
    schedule : PruningSchedule
    speedup : float
        Predicted, see `agq_tvm.flow.prefill_cost`.
    losses : list of float64 arrays [tokens]
        Of each window that it was scored on.
    """

    schedule: PruningSchedule
    speedup: float
    losses: list[np.ndarray] = field(default_factory=list)

    def change(self, dense: list[np.ndarray], window: int) -> Difference:
        """Compare with the model that prunes nothing, on the windows scored so far."""
        scores = (Score(window, np.stack(losses), "suffix") for losses in (self.losses, dense[: len(self.losses)]))
        return compare(*scores)


def prune_search(
    model: str | os.PathLike,
    wanted: float,
    data: str | os.PathLike = "calibration",
    window: int = 512,
    target: str = "host",
    measure: bool = False,
) -> dict:
    """Find the layers and the share of tokens to prune that cost least perplexity at a speed-up of prefill.

    Sets of 1 to 4 layers, evenly spread from a first one on, each with the smallest share that has the speed-up, are
    scored on a few windows; the better half is scored on more, and so on. Perplexity is that of the protocol
    ``suffix``, so the prompts that are pruned, and whose speed-up is predicted, are three quarters of a window.

    Parameters
    ----------
    model : str or path-like
        A quantized checkpoint, or a float model (see `agq_tvm.quantize.source.open_source`).
    wanted : float
        More than 1; predicted from multiply-accumulates.
    data : str or path-like
        See `agq_tvm.quantize.texts.load_text`; the text should not be one that the model is judged by later.
    window : int
        Tokens that the model sees at a time.
    target : str
        What `measure` compiles for, and the command says.
    measure : bool
        Compile a checkpoint without pruning and with the best schedule, and time both on this machine.

    Returns
    -------
    dict
        ``model``, ``text``, ``text_sha256``, ``window``, ``prompt_tokens``, ``speedup_wanted``;
        ``candidates``, the best first, each with ``layers``, ``beta``, ``speedup_predicted``, ``sparsity``,
        ``windows`` it was scored on, ``perplexity_change`` and its ``perplexity_change_stderr``, paired with the
        model that prunes nothing; ``command``, which makes a checkpoint of the first; ``measured`` (None, or
        ``dense`` and ``pruned`` in tokens per second, and ``speedup``); and ``seconds``.

    Raises
    ------
    AgqError
        If the speed-up cannot be reached, the model or the text cannot be read, or there is nothing to compile.
    """
    started = time.perf_counter()
    if not wanted > 1:
        raise AgqError(f"a speed-up of {wanted:g} is none: ask for more than 1, e.g. 1.3")
    if measure and not is_checkpoint(model):
        raise AgqError(f"{model} is not a checkpoint, only those are compiled and timed: quantize it first")
    with tempfile.TemporaryDirectory() as scratch:
        reference, tokenizer = open_reference(model, Path(scratch))
        reference.pruning = None
        prompt = window * 3 // 4
        found = candidates(reference.config, prompt, wanted)
        windows = cut_windows(tokenizer, data, ROUNDS[-1], window)
    random.Random(0).shuffle(windows)  # the first few are from all over the text
    dense = halve(reference, found, windows)
    best = found[0].schedule
    return {
        "model": str(model),
        "text": str(data),
        "text_sha256": load_text(data)[1],
        "window": window,
        "prompt_tokens": prompt,
        "speedup_wanted": wanted,
        "candidates": [_described(each, reference.config, dense, window) for each in found],
        "command": quantize_command(model, best),
        "measured": _measured(Path(model), best, prompt, target) if measure else None,
        "seconds": time.perf_counter() - started,
    }


def candidates(config: DecoderConfig, tokens: int, wanted: float) -> list[Candidate]:
    """Return a schedule for each set of layers that can have the speed-up, with the smallest share that has it.

    Parameters
    ----------
    config : DecoderConfig
    tokens : int
        Length of the prompt.
    wanted : float

    Raises
    ------
    AgqError
        If none can.
    """
    found, most = [], 0.0
    for layers in layer_sets(config.num_layers):
        of_share = partial(_speedup_of_share, config, tokens, layers)
        most = max(most, of_share(round(_LARGEST_SHARE * _SHARES)))
        share = _smallest_share(of_share, wanted)
        if share is not None:
            found.append(Candidate(PruningSchedule(layers, share / _SHARES), of_share(share)))
    if not found:
        raise AgqError(
            f"pruning prompts of {tokens} tokens cannot make prefill {wanted:g} times as fast: {most:.2f} is the most, "
            "ask for less or give a longer --window"
        )
    return found


def layer_sets(num_layers: int) -> list[tuple[int, ...]]:
    """Return sets of 1 to 4 layers, counted from 1, evenly spread from a first one, that is none of the shallow ones.

    Attention of those is still local, so it does not say yet which tokens matter.
    """
    sets = set()
    for first in {max(2, math.ceil(part * num_layers)) for part in _FIRST_LAYERS}:
        for count in range(1, _MOST_LAYERS + 1):
            step = (num_layers + 1 - first) / count
            if step >= 1:
                sets.add(tuple(first + int(i * step) for i in range(count)))
    return sorted(sets)


def _speedup_of_share(config: DecoderConfig, tokens: int, layers: tuple[int, ...], share: int) -> float:
    return speedup(config, tokens, PruningSchedule(layers, share / _SHARES))


def _smallest_share(of_share: Callable[[int], float], wanted: float) -> int | None:
    """Return the smallest share, in thousandths, of at least that speed-up, which rises with the share."""
    low, high = 0, round(_LARGEST_SHARE * _SHARES)
    if of_share(high) < wanted:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if of_share(middle) >= wanted else (middle, high)
    return high


def halve(reference: "ReferenceModel", found: list[Candidate], windows: list[list[int]]) -> list[np.ndarray]:
    """Score schedules on more and more windows, ever fewer of them, and sort `found`, the best first.

    Returns
    -------
    list of float64 arrays [tokens]
        The losses of the model that prunes nothing, of each window.
    """
    dense, going = [], len(found)
    for number, count in enumerate(ROUNDS, 1):
        count = min(count, len(windows))
        started = len(dense)
        if started == count:
            break
        new = windows[started:count]
        what = f"round {number} of {len(ROUNDS)}, {going} schedules"
        for losses, schedule, window in progress(list(_passes(found[:going], dense, new)), what, unit="window"):
            losses.append(_window_losses(reference, schedule, window))
        found[:going] = sorted(found[:going], key=lambda each: each.change(dense, len(windows[0])).nll)
        best = found[0]
        change = best.change(dense, len(windows[0]))
        percent = f"{100 * change.perplexity_change:+.2f} % ± {100 * change.perplexity_change_stderr:.2f}"
        say(f"{what}, {count} windows: best {_listed(best.schedule)}, {percent}")
        going = max(min(going, _FINALISTS), going // 2)
    return dense


def _passes(
    going: list[Candidate], dense: list[np.ndarray], windows: list[list[int]]
) -> Iterator[tuple[list[np.ndarray], PruningSchedule | None, list[int]]]:
    for window in windows:
        yield dense, None, window
        for each in going:
            yield each.losses, each.schedule, window


def _window_losses(reference: "ReferenceModel", schedule: PruningSchedule | None, window: list[int]) -> np.ndarray:
    reference.pruning = schedule
    try:
        return score_suffix(partial(suffix_logits, reference, prompt_chunks), window, len(window), False).losses[0]
    finally:
        reference.pruning = None


def _listed(schedule: PruningSchedule) -> str:
    return f"{schedule.beta:g} of the tokens in layers {','.join(map(str, schedule.layers))}"


def _described(each: Candidate, config: DecoderConfig, dense: list[np.ndarray], window: int) -> dict:
    change = each.change(dense, window)
    return {
        "layers": list(each.schedule.layers),
        "beta": each.schedule.beta,
        "speedup_predicted": each.speedup,
        "sparsity": each.schedule.sparsity(window * 3 // 4, config.num_layers),
        "windows": len(each.losses),
        "perplexity_change": change.perplexity_change,
        "perplexity_change_stderr": change.perplexity_change_stderr,
    }


def quantize_command(model: str | os.PathLike, schedule: PruningSchedule) -> str:
    """Return the command that makes a checkpoint with a schedule; for a checkpoint, with its own scheme of a MODEL."""
    words = ["agq", "quantize", str(model), "-o", "CKPT"]
    if is_checkpoint(model):
        scheme = read_checkpoint(model).scheme
        words[2] = "MODEL"
        words += ["--method", scheme.method, "--group-size", str(scheme.group_size), "--activation", scheme.activation]
        words += ["--weight-bits", "8"] if scheme.weight_bits == 8 else []
        words += ["--symmetric"] if scheme.symmetric else []
        words += ["--max-refine", str(scheme.max_refine)] if scheme.max_refine else []
        words += ["--shifts"] if scheme.shifts else []
        words += ["--activation-bits", f"{scheme.mixed_bits:g}"] if scheme.mixed_bits else []
        words += ["--integer-grid"] if scheme.integer_grid else []
        words += ["--fold"] if scheme.fold else []
        words += ["--four-bit", ",".join(scheme.four_bit)] if scheme.four_bit else []
        words += ["--attention", scheme.attention] if scheme.attention != "float" else []
    words += ["--prune-layers", ",".join(map(str, schedule.layers)), "--prune-beta", f"{schedule.beta:g}"]
    return shlex.join(words)


def _measured(checkpoint: Path, schedule: PruningSchedule, tokens: int, target: str) -> dict:
    """Compile the model without pruning and with it, and time both in turns."""
    from agq_tvm.flow.compile import compile_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        bundles = []
        for name, pruning in (("dense", None), ("pruned", schedule)):
            say(f"compiling the {name} model")
            made = with_schedule(checkpoint, pruning, Path(scratch) / f"{name}-checkpoint")
            compile_checkpoint(made, target, Path(scratch) / name)
            bundles.append(Bundle(Path(scratch) / name))
        dense, pruned = compare_prefill(*bundles, tokens)
    return {"dense": dense, "pruned": pruned, "speedup": pruned / dense}


def with_schedule(checkpoint: Path, schedule: PruningSchedule | None, directory: Path) -> Path:
    """Write a checkpoint that differs from another in its schedule alone; its other files are links."""
    directory.mkdir()
    for path in checkpoint.iterdir():
        if path.name != "config.json":
            (directory / path.name).symlink_to(path.resolve())
    config = read_json(checkpoint / "config.json", "quantized checkpoint")
    config["quantization_config"]["pruning"] = asdict(schedule) if schedule else None
    write_json(directory / "config.json", config)
    return directory
