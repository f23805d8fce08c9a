"""What a bundle takes besides its weights: peak resident memory, and the time from start to the first token.

    python -m benchmarks.memory BUNDLE... [--rounds N] [-o FILE]

Memory is that of a process that fills a bundle's caches, less that of one that does the same with an empty bundle:
one small layer, and the tokenizer of the measured one. The little that the empty one has of weights is not taken off,
and the bound has no room for activations.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from agq_tvm.runtime.bundle import TOKENIZER_FILES, Bundle
from agq_tvm.tables import as_table
from benchmarks import tables

SLACK = 1.10
FIRST_TOKEN_SECONDS = 2.0
"""For a model as large as SmolLM2 with 135 million parameters: the lower of wall-clock and CPU time, the best run."""
_SMALL_MODEL_BYTES = 128 << 20
_DECODED = 8
_LIMIT = 900


def peak_bytes(bundle: str) -> int:
    """Return the most memory that this process has held at once after it has filled the caches of a bundle."""
    from agq_tvm.runtime.engine import Engine, LocalSession
    from agq_tvm.runtime.text import load_tokenizer

    loaded = Bundle(bundle)
    load_tokenizer(loaded.path)
    engine = Engine(loaded, LocalSession(loaded, threads=1))
    tokens = [(7 * i + 1) % engine.vocab_size for i in range(engine.context)]
    engine.prefill(tokens[:-_DECODED])
    for token in tokens[-_DECODED:]:
        engine.decode(token)
    status = Path("/proc/self/status").read_text()  # of this program, where getrusage counts its parent's, too
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def _peak_of_process(bundle: Path | str) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", "--fill", str(bundle)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=_LIMIT).stdout)


def first_token(bundle: str) -> tuple[float, float]:
    """Run `agq generate` for one token: seconds by the clock and of the processor."""
    command = [sys.executable, "-m", "agq_tvm.cli.main", "generate", bundle, "--prompt", "Hello", "--max-tokens", "1"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, timeout=_LIMIT)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def empty_bundle(bundle: Path, folder: Path) -> Path:
    """Compile a model of one small layer, with the vocabulary and the context of a bundle."""
    from agq_tvm.flow.compile import compile_checkpoint
    from agq_tvm.flow.quantize import quantize
    from tests.tiny import write_tiny_llama

    manifest = Bundle(bundle).manifest
    context, vocab = manifest["context"], manifest["model"]["vocab_size"]
    model = write_tiny_llama(folder / "model", num_hidden_layers=1, max_position_embeddings=context, vocab_size=vocab)
    for name in TOKENIZER_FILES:
        if (bundle / name).is_file():
            (model / name).write_bytes((bundle / name).read_bytes())
    quantize(str(model), folder / "checkpoint", method="rtn")
    compile_checkpoint(folder / "checkpoint", "host", folder / "bundle", context)
    return folder / "bundle"


def _weights(bundle: Bundle) -> int:
    return sum(parameter.nbytes for parameter in bundle.parameters)


def measure(bundle: str, rounds: int) -> dict:
    """Measure a bundle and hold it against its bounds."""
    loaded = Bundle(bundle)
    weights = _weights(loaded)
    caches = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for _, shape, dtype in loaded.caches)
    with tempfile.TemporaryDirectory() as folder:
        smallest = empty_bundle(loaded.path, Path(folder))
        empty = _peak_of_process(smallest) - _weights(Bundle(smallest))
    peak = _peak_of_process(bundle)
    first_token(bundle)  # so that the disk is warm
    times = [first_token(bundle) for _ in range(rounds)]
    result = {
        "weights_bytes": weights,
        "caches_bytes": caches,
        "peak_bytes": peak,
        "empty_peak_bytes": empty,
        "net_bytes": peak - empty,
        "bound_bytes": int(SLACK * (weights + caches)),
        "first_token_seconds": min(min(both) for both in times),
        "first_token_wall_seconds": statistics.median(wall for wall, _ in times),
        "first_token_cpu_seconds": min(cpu for _, cpu in times),
    }
    small = weights < _SMALL_MODEL_BYTES
    late = small and result["first_token_seconds"] > FIRST_TOKEN_SECONDS
    return result | {"within_bounds": result["net_bytes"] <= result["bound_bytes"] and not late}


def as_text(results: dict[str, dict]) -> str:
    """Write the results as a table, in MB and seconds."""
    keys = ("weights_bytes", "caches_bytes", "peak_bytes", "empty_peak_bytes", "net_bytes", "bound_bytes")
    header = ("BUNDLE", "WEIGHTS", "CACHES", "PEAK", "EMPTY", "NET MB", "BOUND", "FIRST TOKEN s", "WALL s", "")
    rows = [
        (
            name,
            *(f"{result[key] / 1e6:.1f}" for key in keys),
            f"{result['first_token_seconds']:.2f}",
            f"{result['first_token_wall_seconds']:.2f}",
            "" if result["within_bounds"] else "over",
        )
        for name, result in results.items()
    ]
    return as_table([header, *rows])


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if a bound is not held."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("bundles", nargs="*", metavar="BUNDLE")
    parser.add_argument("--fill", metavar="BUNDLE", help="print the peak of this process after filling the caches")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", default=tables.RESULTS / "memory.json", type=Path)
    options = parser.parse_args(arguments)
    if options.fill:
        print(peak_bytes(options.fill))
        return 0
    results = {Path(bundle).name: measure(bundle, options.rounds) for bundle in options.bundles}
    print(as_text(results))
    tables.write_report(options.output, tables.report("benchmarks.memory", ("apache-tvm",), bundles=results))
    return 0 if all(result["within_bounds"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
