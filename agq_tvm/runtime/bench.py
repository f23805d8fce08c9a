"""Speed of a bundle: tokens per second of prefill and decode."""

import statistics
import time

from agq_tvm.errors import AgqError
from agq_tvm.progress import progress
from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.engine import Engine, LocalSession


def bench(
    bundle: str,
    threads: int | None = None,
    prefill_tokens: int = 512,
    decode_tokens: int = 64,
    rounds: int = 5,
) -> dict:
    """Time a bundle on this machine.

    Parameters
    ----------
    bundle : path-like
    threads : int, optional
        Those of the device by default.
    prefill_tokens : int
        Prompt length; cut to what fits the context.
    decode_tokens : int
        Tokens decoded after a prompt of one token.
    rounds : int
        Timed repetitions, after one that is not.

    Returns
    -------
    dict
        Medians and standard deviations in tokens per second, as ``prefill_tokens_per_second``, ….

    Raises
    ------
    AgqError
        If the bundle does not run here.
    """
    loaded = Bundle(bundle)
    session = LocalSession(loaded, threads)
    engine = Engine(loaded, session)
    prefill_tokens = min(prefill_tokens, engine.context)
    decode_tokens = min(decode_tokens, engine.context - 1)
    if min(prefill_tokens, decode_tokens, rounds) < 1:
        raise AgqError("bench needs at least one token and one round")
    prompt = [(7 * i + 1) % engine.vocab_size for i in range(prefill_tokens)]
    prefill, decode = [], []
    for _ in progress(range(rounds + 1), "timing", unit="round"):
        engine.reset()
        start = time.perf_counter()
        engine.prefill(prompt)
        prefill.append(prefill_tokens / (time.perf_counter() - start))
        engine.reset()
        engine.prefill(prompt[:1])
        start = time.perf_counter()
        for token in prompt[:decode_tokens]:
            engine.decode(token)
        decode.append(decode_tokens / (time.perf_counter() - start))
    return {
        "device": loaded.manifest["device"]["name"],
        "instruction_set": loaded.manifest["device"]["instruction_set"],
        "threads": session.threads,
        "rounds": rounds,
        "prefill_tokens": prefill_tokens,
        "prefill_tokens_per_second": statistics.median(prefill[1:]),
        "prefill_tokens_per_second_std": statistics.pstdev(prefill[1:]),
        "decode_tokens": decode_tokens,
        "decode_tokens_per_second": statistics.median(decode[1:]),
        "decode_tokens_per_second_std": statistics.pstdev(decode[1:]),
        "bytes": loaded.nbytes,
    }


def compare_prefill(first: Bundle, second: Bundle, tokens: int, rounds: int = 7) -> tuple[float, float]:
    """Time prefill of two bundles in turns, so that what else the machine does meets both.

    Parameters
    ----------
    first, second : Bundle
    tokens : int
        Length of the prompt.
    rounds : int
        Timed repetitions, after one that is not.

    Returns
    -------
    pair of float
        Medians in tokens per second.

    Raises
    ------
    AgqError
        If a bundle does not run here, or the prompt does not fit.
    """
    engines = [Engine(bundle) for bundle in (first, second)]
    times: tuple[list[float], list[float]] = ([], [])
    prompt = [(7 * i + 1) % engines[0].vocab_size for i in range(tokens)]
    for _ in progress(range(rounds + 1), "timing", unit="round"):
        for engine, spent in zip(engines, times, strict=True):
            engine.reset()
            start = time.perf_counter()
            engine.prefill(prompt)
            spent.append(time.perf_counter() - start)
    return tokens / statistics.median(times[0][1:]), tokens / statistics.median(times[1][1:])
