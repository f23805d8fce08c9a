"""The tokens that calibration looks at."""

import os
import random

from agq_tvm.errors import AgqError
from agq_tvm.progress import say
from agq_tvm.quantize.texts import load_text


def encode_text(tokenizer_path: str | os.PathLike, text: str) -> list[int]:
    """Encode a text without special tokens, with the tokenizer in ``tokenizer.json``.

    Raises
    ------
    AgqError
        If the tokenizer cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(os.fspath(tokenizer_path))
    except Exception as error:  # tokenizers raises plain Exception
        raise AgqError(f"{tokenizer_path} cannot be read as a tokenizer ({error})") from error
    return tokenizer.encode(text, add_special_tokens=False).ids


def cut_windows(
    tokenizer_path: str | os.PathLike,
    text_name: str | os.PathLike,
    samples: int,
    length: int,
    seed: int | None = None,
) -> list[list[int]]:
    """Cut a text into windows that do not overlap.

    Parameters
    ----------
    tokenizer_path : path-like
    text_name : str or path-like
        See `load_text`; of a data set the part to train with is taken.
    samples : int
        Windows wanted; fewer are returned, and that is said, if the text is shorter.
    length : int
        Tokens of a window.
    seed : int, optional
        Draw the windows at random, every set of places alike; by default they are evenly spread.

    Raises
    ------
    AgqError
        If the text has fewer tokens than one window.
    """
    text, _ = load_text(text_name, "train")
    tokens = encode_text(tokenizer_path, text)
    available = len(tokens) // length if length > 0 else 0
    if samples < 1:
        raise AgqError(f"{samples} windows of {text_name} were asked for: ask for 1 or more")
    if available < 1:
        raise AgqError(f"{text_name} has {len(tokens)} tokens, less than one window of {length}: give a longer text")
    count = min(samples, available)
    if count < samples:
        say(f"{text_name} has {len(tokens)} tokens: {count} windows of {length} instead of {samples}")
    if seed is None:
        starts = [i * available // count * length for i in range(count)]
    else:
        starts = _random_starts(len(tokens), count, length, seed)
    return [tokens[start : start + length] for start in starts]


def _random_starts(tokens: int, count: int, length: int, seed: int) -> list[int]:
    """Draw where windows start: places among the tokens that no window takes, then the windows before them added."""
    draw = random.Random(seed).random  # the same numbers in every version of Python
    free = tokens - count * length
    places = sorted(int(draw() * (free + 1)) for _ in range(count))
    return [place + i * length for i, place in enumerate(places)]
