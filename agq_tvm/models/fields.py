"""Reading a Hugging Face ``config.json`` without trusting it: every value checked, every mistake one sentence."""

import math
from collections.abc import Collection, Mapping

from agq_tvm.errors import AgqError

# The largest value taken seriously for each size, so that a damaged config cannot ask for absurd memory.
_LARGEST = {
    "vocab_size": 1 << 22,
    "hidden": 1 << 16,
    "inner": 1 << 20,
    "layers": 1 << 10,
    "heads": 1 << 10,
    "positions": 1 << 24,
}


class Fields:
    """The values of a config.

    Parameters
    ----------
    config : mapping
        The contents of ``config.json``.
    family : str
        As messages name it, e.g. ``"LLaMA"``.
    """

    def __init__(self, config: Mapping, family: str) -> None:
        self.config = config
        self.family = family

    def get(self, name: str, default: object = None) -> object:
        """Return a value as it is; one that is null counts as missing."""
        value = self.config.get(name)
        return default if value is None else value

    def size(self, name: str, kind: str, default: int | None = None) -> int:
        """Return an integer in 1..the largest sensible one of its kind.

        Raises
        ------
        AgqError
            If it is none, or is missing and has no default.
        """
        value = self.get(name, default)
        if value is None:
            raise AgqError(f"config.json has no {name}: it does not describe a model of the family {self.family}")
        if type(value) is not int or not 1 <= value <= _LARGEST[kind]:
            raise AgqError(f"config.json: {name} must be an integer in 1..{_LARGEST[kind]}, not {value!r}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a boolean."""
        value = self.get(name, default)
        if type(value) is not bool:
            raise AgqError(f"config.json: {name} must be true or false, not {value!r}")
        return value

    def positive(self, name: str, default: float, most: float = 1e30) -> float:
        """Return a finite number above 0 and at most `most`."""
        return positive(self.config.get(name, default), name, most)

    def choice(self, name: str, default: str, choices: Collection[str]) -> str:
        """Return one of the values that are supported."""
        value = self.config.get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise AgqError(f"config.json: {name} {value!r} is not supported; supported: {', '.join(choices)}")
        return value

    def token(self, name: str, default: int | None, vocab: int) -> int | None:
        """Return a token's number, or None."""
        return _token(self.config.get(name, default), name, vocab)

    def tokens(self, name: str, default: int | None, vocab: int) -> tuple[int, ...]:
        """Return the tokens' numbers of a value that is one number, several, or null."""
        value = self.config.get(name, default)
        values = value if isinstance(value, list) else [value]
        return tuple(token for v in values if (token := _token(v, name, vocab)) is not None)

    def head_dim(self, hidden: int, heads: int, heads_name: str, hint: str) -> int:
        """Return hidden / heads, which must be whole; `hint` ends the sentence that refuses."""
        if hidden % heads:
            raise AgqError(f"config.json: hidden_size {hidden} is not a multiple of {heads_name} {heads}: {hint}")
        return hidden // heads


def positive(value: object, name: str, most: float = 1e30) -> float:
    """Return a finite number above 0 and at most `most`, or refuse it by `name`."""
    number = type(value) in (int, float)
    if not number or not math.isfinite(value) or not 0 < value <= most:
        raise AgqError(f"config.json: {name} must be a number above 0 and at most {most:g}, not {value!r}")
    return float(value)


def _token(value: object, name: str, vocab: int) -> int | None:
    if value is not None and (type(value) is not int or not 0 <= value < vocab):
        raise AgqError(f"config.json: {name} must be a token below {vocab}, not {value!r}")
    return value
