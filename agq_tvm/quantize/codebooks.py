"""The codes of probabilities quantized by their logarithm: a code c stands for 2^-c, the one after the last for 0."""

from dataclasses import dataclass

FRACTION_BITS = 15
"""Sums of values are counted in units of 2^-15 times their scale."""
VALUE_LIMIT = 127
"""Codes of values are -127..127."""


@dataclass(frozen=True)
class CodeBook:
    """How the probabilities of a row, e^(s - maximum) / sum, become powers of two.

    Attributes
    ----------
    largest : int
        The last code, at most 15: codes 0..largest stand for 1, 1/2, …, 2^-largest, and largest + 1 for zero.
    relative : bool
        False: a code is round(-log2 p), and the row stands as it is rounded, with a sum of 0.7 to 1.42.
        True: instead of sum, its power of two below, 2^floor(log2 sum), divides, so that the largest probability is
        a power of two and is not rounded; the row is then divided by what it adds up to.
    """

    largest: int
    relative: bool

    @property
    def zero(self) -> int:
        """The code of a probability that is rounded to nothing."""
        return self.largest + 1


CODE_BOOKS = {
    "log2-paper": CodeBook(largest=15, relative=False),  # 16 powers and zero: Agile-Quant's
    "log2": CodeBook(largest=14, relative=True),  # 15 powers and zero: a nibble
}
"""By the name of the attention in a checkpoint."""
