"""A bundle against PyTorch running the float model it was made of: one thread, one run, rounds in turn.

    python -m benchmarks.speed BUNDLE [--model NAME] [--rounds N] [--json FILE]

Every engine lives in a process of its own that sleeps while it is not asked: PyTorch's threads would disturb the
others, and the bundle's process has no PyTorch at all. PyTorch runs Llama of transformers at its best: SDPA, a
KV cache, logits of the last position only, and for prefill and decode each the fastest of a growing or a
preallocated cache with oneDNN or without it.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
from pathlib import Path

import numpy as np

from agq_tvm.errors import AgqError
from benchmarks import seconds, tables

PREFILL_TOKENS, DECODE_TOKENS = 512, 64
STARTING_LIMIT, ROUND_LIMIT = 600, 300
"""Seconds that a process may take to load its model, and for one measurement."""
TORCH = {"torch float32": "float32", "torch bfloat16": "bfloat16"}
BOUNDS = {
    "decode_over_torch_float32": 5.0,
    "decode_over_torch_bfloat16": 5.0,
    "decode_percent_of_memory_rate": 35.0,
    "prefill_over_torch_float32": 2.0,
    "prefill_over_torch_bfloat16": 1.2,
}


def prompt_of(vocab_size: int) -> list[int]:
    """Return the tokens that every engine gets."""
    return [(7 * i + 1) % vocab_size for i in range(PREFILL_TOKENS)]


class Ours:
    """A bundle on one thread, and the rate at which this process reads memory."""

    def __init__(self, bundle: str):
        from agq_tvm.runtime.bundle import Bundle
        from agq_tvm.runtime.engine import Engine, LocalSession
        from agq_tvm.tuning import limits

        loaded = Bundle(bundle)
        if loaded.manifest["context"] < PREFILL_TOKENS:
            raise AgqError(
                f"{bundle} has a context of {loaded.manifest['context']}, the benchmark needs {PREFILL_TOKENS}: "
                f"compile it with --context {PREFILL_TOKENS} or more"
            )
        self._engine = Engine(loaded, LocalSession(loaded, threads=1))
        self._prompt = prompt_of(self._engine.vocab_size)
        self._memory = limits.memory_limit(threads=1)

    def prefill(self) -> float:
        """Time the prompt: tokens per second."""
        self._engine.reset()

        def work():
            self.logits = self._engine.prefill(self._prompt)

        return PREFILL_TOKENS / seconds(work)

    def decode(self) -> float:
        """Time tokens after a prompt of one: tokens per second."""
        self._engine.reset()
        self._engine.prefill(self._prompt[:1])

        def work():
            for token in self._prompt[:DECODE_TOKENS]:
                self._engine.decode(token)

        return DECODE_TOKENS / seconds(work)

    def memory(self) -> float:
        """Read memory: GB/s, the median of five."""
        return statistics.median(self._memory.rate() for _ in range(5))

    def setting(self) -> dict:
        """Return what was chosen: nothing."""
        return {}


class Torch:
    """The float model in PyTorch on one thread."""

    def __init__(self, model: str, dtype: str):
        import torch
        from transformers import LlamaForCausalLM
        from transformers.models.llama.configuration_llama import LlamaConfig

        from agq_tvm.quantize.source import open_source, tensor_shapes

        torch.set_num_threads(1)
        self._torch, self._dtype = torch, getattr(torch, dtype)
        source = open_source(model)
        config = LlamaConfig(**source.raw_config, attn_implementation="sdpa")
        self._model = LlamaForCausalLM(config).to(self._dtype).eval()
        tensors = {name: torch.from_numpy(np.array(source.tensor(name))) for name in tensor_shapes(source.config)}
        missing, unexpected = self._model.load_state_dict(tensors, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise AgqError(f"transformers' Llama does not take the tensors of {model}: {missing + unexpected}")
        self._model.tie_weights()
        self._prompt = torch.tensor([prompt_of(config.vocab_size)])
        self._settings = self._fastest_settings()

    def _fastest_settings(self) -> dict[str, dict]:
        choices = [{"static": static, "mkldnn": mkldnn} for static in (False, True) for mkldnn in (True, False)]
        best = {}
        for name, work in (("prefill", self._prefill), ("decode", self._decode)):
            # The better of two: the first warms up.
            rates = [max(work(**choice) for _ in range(2)) for choice in choices]
            best[name] = choices[int(np.argmax(rates))]
        return best

    def _cache(self, static: bool):
        from transformers import DynamicCache, StaticCache

        if static:
            return StaticCache(config=self._model.config, max_cache_len=PREFILL_TOKENS)
        return DynamicCache(config=self._model.config)

    def _using(self, mkldnn: bool):
        """Switch oneDNN, and nothing else: what is not given stays as it is only if it is None."""
        unchanged = {"deterministic": None, "allow_tf32": None, "fp32_precision": None}
        return self._torch.backends.mkldnn.flags(enabled=mkldnn, **unchanged)

    def _forward(self, tokens, cache):
        return self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    def _prefill(self, static: bool, mkldnn: bool) -> float:
        with self._torch.inference_mode(), self._using(mkldnn):
            cache = self._cache(static)

            def work():
                self.logits = self._forward(self._prompt, cache)[0, -1].float().numpy()

            return PREFILL_TOKENS / seconds(work)

    def _decode(self, static: bool, mkldnn: bool) -> float:
        with self._torch.inference_mode(), self._using(mkldnn):
            cache = self._cache(static)
            self._forward(self._prompt[:, :1], cache)

            def work():
                for i in range(DECODE_TOKENS):
                    self._forward(self._prompt[:, i : i + 1], cache)

            return DECODE_TOKENS / seconds(work)

    def prefill(self) -> float:
        """Time the prompt: tokens per second."""
        return self._prefill(**self._settings["prefill"])

    def decode(self) -> float:
        """Time tokens after a prompt of one: tokens per second."""
        return self._decode(**self._settings["decode"])

    def setting(self) -> dict:
        """Return what was chosen for prefill and decode."""
        return self._settings


def _serve(connection, make, arguments: tuple) -> None:
    """Run an engine in a process of its own: a name of a measurement in, its result out."""
    try:
        engine = make(*arguments)
        connection.send(("ready", None))
        while (name := connection.recv()) is not None:
            value = engine.logits if name == "logits" else getattr(engine, name)()
            connection.send(("done", value))
    except EOFError:
        pass
    except Exception as error:  # its words go to the process that asked
        connection.send(("error", f"{type(error).__name__}: {error}"))


class Process:
    """An engine in a process of its own.

    Parameters
    ----------
    name : str
        For messages.
    make : callable
        Makes the engine there, from `arguments`.
    """

    def __init__(self, name: str, make, *arguments):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
        self._process.start()
        there.close()

    def wait_until_ready(self) -> None:
        """Wait for the model to be loaded."""
        self._answer(STARTING_LIMIT)

    def ask(self, what: str):
        """Measure once.

        Raises
        ------
        AgqError
            If the process fails, dies or takes too long.
        """
        self._connection.send(what)
        return self._answer(ROUND_LIMIT)

    def _answer(self, limit: float):
        if not self._connection.poll(limit):
            self.stop()
            raise AgqError(f"{self.name} gave no answer in {limit} s")
        try:
            kind, value = self._connection.recv()
        except EOFError:
            self._process.join(10)
            raise AgqError(f"{self.name} died (exit status {self._process.exitcode})") from None
        if kind == "error":
            raise AgqError(f"{self.name} failed: {value}")
        return value

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join(10)


def bytes_per_token(bundle: str) -> int:
    """Count what decoding one token reads: packed matrices with their scales and offsets, and norms.

    The embedding counts as the output table that it is when both are tied; otherwise only a row of it is read.
    """
    from agq_tvm.runtime.bundle import Bundle

    parameters = Bundle(bundle).parameters
    unread = ["rope."]
    if any(parameter.name.startswith("head.") for parameter in parameters):
        unread.append("embedding.")
    return sum(parameter.nbytes for parameter in parameters if not parameter.name.startswith(tuple(unread)))


def measure(bundle: str, model: str, rounds: int) -> tuple[dict, dict, dict]:
    """Time all engines in turn.

    Returns
    -------
    rates : dict of str to dict
        Of each engine, ``"prefill"``, ``"decode"`` (and ``"memory"`` of ours): a list with every round.
    settings : dict of str to dict
        What each chose.
    agreement : dict of str to float
        Cosine of each PyTorch's last logits with ours: whether they run the same model.
    """
    # One thread each, also of what a library starts by itself when it is imported.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    makers = {"agq_tvm": (Ours, bundle)}
    makers |= {name: (Torch, model, dtype) for name, dtype in TORCH.items()}
    engines: dict[str, Process] = {}
    try:
        for name, (make, *arguments) in makers.items():  # one after another: each needs its core to itself
            print(f"loading {name}", file=sys.stderr)
            engines[name] = Process(name, make, *arguments)
            engines[name].wait_until_ready()
        rates = {name: {"prefill": [], "decode": []} for name in engines}
        rates["agq_tvm"]["memory"] = []
        for number in range(rounds + 1):
            print(f"round {number} of {rounds}", file=sys.stderr)
            for name, engine in engines.items():
                for work, values in rates[name].items():
                    value = engine.ask(work)
                    if number:  # the first round is not counted
                        values.append(value)
        settings = {name: engine.ask("setting") for name, engine in engines.items()}
        logits = {name: engine.ask("logits").astype("float64") for name, engine in engines.items()}
    finally:
        for engine in engines.values():
            engine.stop()
    agreement = {name: _cosine(logits[name], logits["agq_tvm"]) for name in TORCH}
    return rates, settings, agreement


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def summary(rates: dict, size: int) -> dict:
    """Compare the medians: ratios ours / PyTorch, and the share of what memory allows, with their bounds."""
    medians = {
        name: {work: statistics.median(values) for work, values in found.items()} for name, found in rates.items()
    }
    ours = medians["agq_tvm"]
    found = {"decode_percent_of_memory_rate": 100 * ours["decode"] * size / (1e9 * ours["memory"])}
    for name, dtype in TORCH.items():
        for work in ("decode", "prefill"):
            found[f"{work}_over_torch_{dtype}"] = ours[work] / medians[name][work]
    return {name: {"value": found[name], "bound": bound, "met": found[name] >= bound} for name, bound in BOUNDS.items()}


def print_tables(rates: dict, compared: dict, size: int) -> None:
    """Print the speeds, the limit and the comparisons."""
    lines = [("engine", f"pp{PREFILL_TOKENS} tok/s", "±", f"tg{DECODE_TOKENS} tok/s", "±")]
    for name, found in rates.items():
        cells = [
            f"{f(found[work]):.1f}" for work in ("prefill", "decode") for f in (statistics.median, statistics.pstdev)
        ]
        lines.append((name, *cells))
    print(tables.aligned(lines))
    memory = statistics.median(rates["agq_tvm"]["memory"])
    print(f"\nmemory read {memory:.1f} GB/s, {size / 1e6:.1f} MB a token: at most {1e9 * memory / size:.0f} tok/s\n")
    head = ("comparison", "value", "bound", "met")
    lines = [
        (name.replace("_", " "), f"{c['value']:.2f}", f"{c['bound']:.1f}", "yes" if c["met"] else "no")
        for name, c in compared.items()
    ]
    print(tables.aligned([head, *lines]))


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n")[0])
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="what it was made of; %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=tables.RESULTS / "speed.json", metavar="FILE")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        size = bytes_per_token(args.bundle)
        rates, settings, agreement = measure(args.bundle, args.model, args.rounds)
    except AgqError as error:
        sys.exit(f"error: {error}")
    compared = summary(rates, size)
    print_tables(rates, compared, size)
    contents = {
        "model": args.model,
        "threads": 1,
        "rounds": args.rounds,
        "bytes_per_token": size,
        "cosine_with_torch": agreement,
        "torch_settings": {name: settings[name] for name in TORCH},
        "comparisons": compared,
        "rates": rates,
    }
    packages = ("apache-tvm", "torch", "transformers", "numpy")
    tables.write_report(args.json, tables.report("benchmarks.speed", packages, **contents))


if __name__ == "__main__":
    main()
