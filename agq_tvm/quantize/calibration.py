"""The tokens that calibration looks at."""

import os

from agq_tvm.errors import AgqError
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
    tokenizer_path: str | os.PathLike, text_name: str | os.PathLike, samples: int, length: int
) -> list[list[int]]:
    """Cut a text into windows, evenly spread and not overlapping.

    Parameters
    ----------
    tokenizer_path : path-like
    text_name : str or path-like
        See `load_text`.
    samples : int
        Windows wanted; fewer are returned if the text is shorter.
    length : int
        Tokens of a window.

    Raises
    ------
    AgqError
        If the text has fewer tokens than one window.
    """
    text, _ = load_text(text_name)
    tokens = encode_text(tokenizer_path, text)
    available = len(tokens) // length if length > 0 else 0
    if samples < 1:
        raise AgqError(f"{samples} windows of {text_name} were asked for: ask for 1 or more")
    if available < 1:
        raise AgqError(f"{text_name} has {len(tokens)} tokens, less than one window of {length}: give a longer text")
    count = min(samples, available)
    starts = [i * available // count * length for i in range(count)]
    return [tokens[start : start + length] for start in starts]
