"""The whole job in one call: a real model to 4-bit weights and 8-bit activations, compiled and measured."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from agq_tvm import __version__
from agq_tvm.errors import AgqError
from agq_tvm.files import read_json, sha256_file, write_json
from agq_tvm.flow.compile import compile_checkpoint
from agq_tvm.flow.evaluate import evaluate_reference
from agq_tvm.flow.evaluate_bundle import evaluate_bundle
from agq_tvm.flow.quantize import quantize
from agq_tvm.progress import say
from agq_tvm.quantize.checkpoint import read_checkpoint
from agq_tvm.runtime.bundle import MANIFEST, Bundle
from agq_tvm.runtime.generate import generate
from agq_tvm.runtime.perplexity import compare
from agq_tvm.runtime.status import processor_name
from agq_tvm.tables import as_table, megabytes
from agq_tvm.targets import load_device

BOARDS = ("raspberry-pi-4", "snapdragon-870")
TEXT, WINDOW, WINDOWS = "persuasion", 512, 16
_BENCH_LIMIT = 600.0


def quickstart(model: str, output: str | os.PathLike, prompt: str) -> dict:
    """Quantize a model, compile it for this machine and two boards, measure it and let it write.

    What an earlier run left in `output` is used again where it still fits.

    Parameters
    ----------
    model : str
        See `agq_tvm.quantize.source.open_source`.
    output : path-like
        Gets ``checkpoint/``, ``host/``, one directory for each board, and ``results.json``.
    prompt : str
        What the compiled model continues.

    Returns
    -------
    dict
        What ``results.json`` holds.

    Raises
    ------
    AgqError
        If any step cannot be done.
    """
    start = time.perf_counter()
    folder = Path(output)
    checkpoint = _checkpoint(model, folder)
    host = _bundle(checkpoint, "host", folder / "host")
    speed = _bench_apart(host)
    written = generate(host, prompt)
    quality = _quality(model, host)
    boards = {name: _board(checkpoint, name, folder / name) for name in BOARDS}
    result = {
        "model": model,
        "agq_tvm": __version__,
        "machine": machine(),
        "quality": quality,
        "speed": speed,
        "checkpoint_bytes": _size(checkpoint),
        "boards": boards,
        "generated": written,
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_json(folder / "results.json", result)
    return result


def _checkpoint(model: str, folder: Path) -> Path:
    path, origin = folder / "checkpoint", folder / ".origin.json"
    made = {"model": str(model), "agq_tvm": __version__}
    if origin.is_file() and path.is_dir() and read_json(origin, "quickstart folder") == made:
        try:
            read_checkpoint(path)
            say(f"using {path}")
            return path
        except AgqError as error:
            say(f"{error}: making it again")
    quantize(model, path)
    write_json(origin, made)
    return path


def _bundle(checkpoint: Path, target: str, path: Path) -> Path:
    if (path / MANIFEST).is_file():
        try:
            manifest = Bundle(path).manifest
            same = manifest["checkpoint_sha256"] == sha256_file(checkpoint / "model.safetensors")
            ours = manifest["versions"]["agq_tvm"] == __version__
            if same and ours and manifest["device"]["name"] == load_device(target).name:
                say(f"using {path}")
                return path
        except (AgqError, KeyError) as error:
            say(f"{error}: making it again")
    compile_checkpoint(checkpoint, target, path)
    return path


def _bench_apart(bundle: Path) -> dict:
    """Time a bundle in a process of its own: torch's threads, once started, would disturb it."""
    command = [sys.executable, "-m", "agq_tvm", "bench", str(bundle), "--json"]
    say("timing prefill and decode")
    result = subprocess.run(command, stdout=subprocess.PIPE, timeout=_BENCH_LIMIT)
    if result.returncode:
        raise AgqError(f"the bench of {bundle} ended with code {result.returncode}: see its message above")
    found = json.loads(result.stdout)
    prefill, decode = found["tests"].values()
    return {name: found[name] for name in ("threads", "instruction_set")} | {
        "prefill_tokens": prefill["tokens"],
        "prefill_tokens_per_second": prefill["mean"],
        "decode_tokens": decode["tokens"],
        "decode_tokens_per_second": decode["mean"],
        "bytes": found["memory"]["bundle"],
    }


def _quality(model: str, bundle: Path) -> dict:
    say(f"perplexity of the float model and of the bundle on {TEXT}")
    window = min(WINDOW, Bundle(bundle).manifest["context"])
    baseline = evaluate_reference(model, TEXT, window, WINDOWS * window)
    quantized = evaluate_bundle(bundle, TEXT, window, WINDOWS * window)
    difference = compare(quantized, baseline)
    return {
        "text": TEXT,
        "window": window,
        "tokens": baseline.tokens,
        "float_perplexity": baseline.perplexity,
        "perplexity": quantized.perplexity,
        "nll_difference": difference.nll,
        "nll_difference_stderr": difference.nll_stderr,
        "perplexity_change": difference.perplexity_change,
        "perplexity_change_stderr": difference.perplexity_change_stderr,
    }


def _board(checkpoint: Path, name: str, path: Path) -> dict:
    _bundle(checkpoint, name, path)
    return {"bundle": str(path), "bytes": Bundle(path).nbytes, "library": str(path / "model.so")}


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def machine() -> str:
    """Describe this machine's processor in a few words."""
    return f"{processor_name()}, {os.cpu_count()} cores"


def report(result: dict) -> str:
    """Lay out what `quickstart` found as text."""
    quality, speed = result["quality"], result["speed"]
    change, error = 100 * quality["perplexity_change"], 100 * quality["perplexity_change_stderr"]
    rows = [
        ("", "float", "W4A8, compiled"),
        ("perplexity", f"{quality['float_perplexity']:.2f}", f"{quality['perplexity']:.2f}"),
        ("  change", "", f"{change:+.2f} % ± {error:.2f} (paired)"),
        (
            "prefill",
            "",
            f"{speed['prefill_tokens_per_second']:.0f} tokens/s ({speed['prefill_tokens']} tokens)",
        ),
        ("decode", "", f"{speed['decode_tokens_per_second']:.0f} tokens/s"),
        ("size", "", megabytes(speed["bytes"])),
    ]
    boards = [(name, megabytes(board["bytes"]), board["bundle"]) for name, board in result["boards"].items()]
    written = result["generated"]
    return "\n".join(
        [
            f"{result['model']} on {result['machine']}, {speed['threads']} threads ({speed['instruction_set']})",
            "",
            as_table(rows),
            "",
            f"Perplexity on {quality['text']}: {quality['tokens']} tokens, windows of {quality['window']}.",
            "",
            written["prompt"] + written["text"],
            "",
            "Compiled for boards as well:",
            as_table(boards),
            "",
            f"{result['seconds']:.0f} s in all",
        ]
    )
