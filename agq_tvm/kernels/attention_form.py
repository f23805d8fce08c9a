"""What attention is made of: the forms of its caches, and the shapes and names of one kernel."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from agq_tvm.kernels.emit import LANES
from agq_tvm.kernels.intrin.avx512vnni import XEON
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.intrin.dotprod import DOTPROD
from agq_tvm.quantize.codebooks import CODE_BOOKS, CodeBook
from agq_tvm.tvm_seam import T

CACHES = ("float16", "int8")
"""What keys and values can be stored as."""
DEPTH = 4
"""Bytes of a lane in int8 caches: channels of a key, or keys of a value's channel."""


@dataclass(frozen=True)
class ByteDot:
    """An instruction that multiplies bytes and adds four products to each lane of 32 bits.

    Attributes
    ----------
    accumulate : callable
        ``f(total, codes, repeated) -> total``, see `Multiply`.
    lanes : int
        Lanes of 32 bits in a register.
    unsigned : bool
        Whether it wants codes unsigned: + 128, which the sums of what they are multiplied with take out again.
    """

    accumulate: Callable[[Any, Any, Any], Any]
    lanes: int
    unsigned: bool


@dataclass(frozen=True)
class AttentionForm:
    """What caches hold, and how an instruction set reads them.

    Attributes
    ----------
    cache : str
        One of `CACHES`. int8 keys have a scale for each token and head, and so have int8 values.
    book : CodeBook or None
        What probabilities are rounded to; values are int8 then, with a static scale for each KV head.
    sums : int
        Floats of running sums that stay in registers.
    busy : int
        Floats of running sums that are enough for multiply-adds, each of which waits for the one before in its sum.
    dot : ByteDot or None
        What multiplies codes of int8 caches; None for multiply-adds of floats, which hold those integers exactly.
    """

    cache: str = "float16"
    book: CodeBook | None = None
    sums: int = 96
    busy: int = 96
    dot: ByteDot | None = None

    @property
    def pairs(self) -> int:
        """(row, head) pairs whose scores of a vector of keys stay in registers.

        Keys that become floats do so in parts, which leaves room for one more.
        """
        return self.sums // LANES + (self.dot is None)

    def describe(self) -> dict:
        """Return what `described_form` makes the form from."""
        book = next((name for name, book in CODE_BOOKS.items() if book == self.book), None)
        return {"cache": self.cache, "book": book, "dot": self.dot is not None}


def described_form(description: dict, isa: InstructionSet) -> AttentionForm:
    """Return the form of a description on an instruction set."""
    form = attention_form(isa, description["cache"], CODE_BOOKS.get(description["book"]))
    return form if description["dot"] else replace(form, dot=None)


def attention_form(isa: InstructionSet, cache: str = "float16", book: CodeBook | None = None) -> AttentionForm:
    """Return the form of attention on an instruction set."""
    # What has smmla has sdot, and that reads 4 channels of a key at a time.
    bytewise = DOTPROD if isa.name == "i8mm" else isa
    multiply, layout = bytewise.multiply_8bit, bytewise.layout_8bit
    dot = None
    if cache == "int8" and multiply and layout.depth == DEPTH and multiply.total == "int32" and not multiply.fold:
        dot = ByteDot(multiply.accumulate, layout.lanes, layout.zero == 0)
    # Of 32 registers of 16 floats, or of 32 of 4 and 16 of 8, three quarters.
    sums = 384 if isa.family == "avx512vnni" else 96
    # Two units of 16 floats want twice what one does, or two of 8.
    return AttentionForm(cache, book, sums, 192 if isa.name == XEON.name else 96, dot)


@dataclass(frozen=True)
class AttentionKernel:
    """Shapes of one attention: M rows, heads, context.

    Attributes
    ----------
    rows, heads, kv_heads, head_dim, context : int
        M, H, KV, D and the length of the caches (a multiple of 16).
    form : AttentionForm
    alibi : bool
        Whether scores get the slope of their head times the distance of the key from the row, 0 or less.
    pruned : bool
        Whether the caches lack tokens that were pruned, so that ALiBi needs the positions of rows and keys.
    importance : bool
        Whether the probability that each row and head gives to the first key is wanted, too: what tokens are pruned by.
    fixed : bool
        Whether the caches are full, so that loops have fixed extents: for tuning.
    """

    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    form: AttentionForm = AttentionForm()
    alibi: bool = False
    pruned: bool = False
    importance: bool = False
    fixed: bool = False

    @property
    def shared(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def name(self) -> str:
        """E.g. ``attention_m128_h9_kv3_d64_c2048``."""
        alibi = ("pruned_alibi_" if self.pruned else "alibi_") if self.alibi else ""
        kind = f"{alibi}{'log2_' if self.form.book else ''}{'int8_' if self.int8 else ''}"
        kind = f"fixed_{kind}" if self.fixed else kind
        return f"{kind}attention_{'importance_' if self.importance else ''}{self.suffix}"

    def append_name(self, rotary: bool) -> str:
        """E.g. ``rope_append_m128_h9_kv3_d64_c2048``, or without ``rope_``."""
        kind = f"{'log2_' if self.form.book else ''}{'int8_' if self.int8 else ''}"
        return f"{kind}{'rope_' if rotary else ''}append_{self.suffix}"

    @property
    def suffix(self) -> str:
        """The shapes, as in names."""
        return f"m{self.rows}_h{self.heads}_kv{self.kv_heads}_d{self.head_dim}_c{self.context}"

    @property
    def int8(self) -> bool:
        """Whether keys are codes with a scale for each token and head."""
        return self.form.cache == "int8"

    @property
    def int8_values(self) -> bool:
        """Whether values are codes with a scale for each token and head, too; those of a book have static ones."""
        return self.int8 and self.form.book is None

    @property
    def channels(self) -> int:
        """Channels of a head in int8 caches, in whole vectors; the last ones may be 0."""
        return -(-self.head_dim // LANES) * LANES

    @property
    def queries(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Shape and type of the queries or, for int8 keys, of their codes, and then of the scales of these.

        Codes are floats where floats are multiplied.
        """
        if not self.int8:
            return (((self.rows, self.heads, self.head_dim), "float32"),)
        codes = (self.rows, self.heads, self.channels), "int8" if self.form.dot else "float32"
        return codes, ((self.rows, self.heads), "float32")

    @property
    def caches(self) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """Name, shape and type of every cache of a layer, in the order in which kernels take them.

        Keys stand sixteen positions side by side, so that a vector of scores needs no sum across lanes; int8 ones in
        words of four channels, and int8 values of four positions, which is how instructions multiply bytes.
        """
        KV, D, context = self.kv_heads, self.head_dim, self.context
        if not self.int8:
            keys = ("keys", (KV, context // LANES, D, LANES), "float16")
        else:
            keys = ("keys", (KV, context // LANES, self.channels // DEPTH, LANES, DEPTH), "int8")
        if self.int8_values:
            values = ("values", (KV, context // DEPTH, self.channels, DEPTH), "int8")
        else:
            values = ("values", (KV, context, D), "int8" if self.form.book else "float16")
        scales = [("key_scales", (KV, context), "float32")] * self.int8
        scales += [("value_scales", (KV, context), "float32")] * self.int8_values
        return (keys, values, *scales)

    def declare_query(self) -> list:
        """Declare the next arguments, `queries`."""
        return [T.arg(name, T.buffer(*query)) for name, query in zip(("q", "q_scales"), self.queries, strict=False)]

    def declare_caches(self) -> dict:
        """Declare the next arguments, the caches, by name."""
        return {name: T.arg(name, T.buffer(shape, dtype)) for name, shape, dtype in self.caches}

    def declare_value_scale(self) -> list:
        """Declare the next argument, the static scales of a book's values, float32 [KV]; nothing without one."""
        return [T.arg("value_scale", T.buffer((self.kv_heads,), "float32"))] if self.form.book else []
