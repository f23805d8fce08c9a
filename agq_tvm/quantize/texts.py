"""Texts for calibration and testing: three that come with the package, data sets by name, or any file."""

import gzip
import hashlib
import os
from importlib import resources
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.quantize.named_texts import DATA_SETS, load_named

TEXTS = ("calibration", "persuasion", "jargon")


def load_text(name_or_path: str | os.PathLike, use: str = "test") -> tuple[str, str]:
    """Load a text.

    Parameters
    ----------
    name_or_path : str or path-like
        ``"calibration"`` (English of many kinds, then the beginning of Austen's Emma), ``"persuasion"`` (the
        beginning of her Persuasion), ``"jargon"`` (the beginning of the Jargon File), a name in
        `agq_tvm.quantize.named_texts.DATA_SETS`, or a UTF-8 file.
    use : {"test", "train"}
        Which part of a data set.

    Returns
    -------
    text : str
    sha256 : str
        Of its bytes, as hexadecimal digits.

    Raises
    ------
    AgqError
        If there is no such file or data set, or it is empty or not UTF-8.
    """
    name = os.fspath(name_or_path)
    if name in TEXTS:
        packed = resources.files("agq_tvm.quantize").joinpath("data", f"{name}.txt.gz")
        data = gzip.decompress(packed.read_bytes())
    elif name in DATA_SETS:
        data = load_named(name, use).encode()
    else:
        data = _read(name)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AgqError(f"{name} is not UTF-8 text (byte {error.start}): convert it first") from error
    if not text.strip():
        raise AgqError(f"{name} is empty: give a text")
    return text, hashlib.sha256(data).hexdigest()


def title(name_or_path: str | os.PathLike, use: str = "test") -> str:
    """Name a text for a report: a file or shipped text as it is, a data set with its split."""
    name = os.fspath(name_or_path)
    return f"{name} {DATA_SETS[name].splits[use]}" if name in DATA_SETS else name


def _read(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except FileNotFoundError:
        raise AgqError(f"there is no text {name}: give a file, or one of {', '.join((*TEXTS, *DATA_SETS))}") from None
    except OSError as error:
        raise AgqError(f"cannot read {name}: {error.strerror or error}") from error
