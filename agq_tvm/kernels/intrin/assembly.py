"""What the inner loops that are written in assembly share: their operands, and the function that TVM links in.

A call takes R rows by a few columns through the groups of a panel. Why not leave it to LLVM: 64 bytes come with one
instruction (`ld1` of four registers), also as the values that sums start at, and no register is ever saved.

Floats are exact to the last rounding without a conversion: a sum that starts at the bits of `MAGIC` holds, read as a
float, MAGIC + dot. Then s · (MAGIC + dot) - s · MAGIC is one multiply-add, rounded once like s · dot, because a
float16 s times MAGIC is a float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

MAGIC = 1.5 * 2.0**23
"""Adding an integer of less than 22 bits to its bits adds that to its value."""
OPERANDS = ("x", "codes", "factors", "scales", "sums", "count", "stride", "magic")
"""What a loop is given, in order. All are registers of its own, which it may change.

x, codes, factors, scales, sums : pointers
    To activation codes, unpacked weights, what dot products are multiplied by, activation scales, and float sums.
count : rounds of the loop, each of `Form.unroll` groups.
stride : bytes to the next k-block of activations, from the last 64 that a loop reads of this one.
magic : pointer to 16 times `MAGIC`.
"""
UNPACK_OPERANDS = ("packed", "codes", "next_codes", "count")
"""What unpacking is given: packed weights, where the codes of the first and of the second call go, and k-blocks."""
GRID_OPERANDS = ("x", "codes", "sums", "count", "stride")
"""What a loop over an integer grid is given: the same, but that sums are int32, and count is of rounds of k-blocks."""
GRID_UNPACK_OPERANDS = ("packed", "step", "low", "codes", "next_codes", "count")
"""What unpacking onto a grid is given: packed weights, steps and lows, uint8 [groups, columns] each, where the codes of
the first and of the second call go, and groups."""
_LANES_OF_SCALES = 4


@dataclass(frozen=True)
class Form:
    """What a loop is written for.

    Attributes
    ----------
    per_group : bool
        Whether activations have a scale for each group, or one for the row, which is applied outside.
    blocks : int
        K-blocks of a group.
    groups : int
        Of a row: the distance of the scales of two rows.
    unroll : int
        Groups of a round: 4, 2 or 1.
    """

    per_group: bool
    blocks: int
    groups: int
    unroll: int

    @property
    def name(self) -> str:
        """E.g. ``group_b1_u4_g64``."""
        scales = f"group_b{self.blocks}_u{self.unroll}_g{self.groups}"
        return scales if self.per_group else f"token_b{self.blocks}_u{self.unroll}"


@dataclass(frozen=True)
class Assembly:
    """The inner loop of prefill.

    Attributes
    ----------
    rows, columns : int
        R and the columns of one call.
    chunk : int
        Columns whose sums stand side by side: sums are [M / R, chunks, R, chunk].
    code_scale : callable
        ``f(per_group) -> int``: unpacked codes are q - 8 times this.
    unpack : callable
        ``f(per_group) -> list of str``: instructions that unpack codes, with operands of `UNPACK_OPERANDS`.
    panel : int
        Channels that a call goes through at most.
    groups : tuple of int
        Group sizes that it is written for.
    running : bool
        With one scale for the row: whether sums run on from group to group, so that they are multiplied by the
        difference of this group's scale and the next one's.
    lines : callable
        ``f(Form) -> list of str``: instructions with operands ``{x}``, ``{codes}``, ...
    factors : callable
        ``f(per_group) -> list of (kind, i)``: what a group's factors are, in vectors of 4 columns, the i-th each;
        kind ``"s"`` is the scale and ``"t"`` -scale · MAGIC.
    grid : callable or None
        ``f(unroll) -> list of str``: instructions that sum bytes of an integer grid over rounds of so many k-blocks,
        with operands of `GRID_OPERANDS`.
    unpack_grid : callable or None
        ``f(blocks) -> list of str``: instructions that put groups of so many k-blocks on their grid, with operands of
        `GRID_UNPACK_OPERANDS`.
    """

    rows: int
    columns: int
    chunk: int
    code_scale: Callable[[bool], int]
    unpack: Callable[[bool], list[str]]
    panel: int
    groups: tuple[int, ...]
    running: bool
    lines: Callable[[Form], list[str]]
    factors: Callable[[bool], list[tuple[str, int]]]
    grid: Callable[[int], list[str]] | None = None
    unpack_grid: Callable[[int], list[str]] | None = None


def unroll_of(groups: int, blocks: int) -> int:
    """Return the groups of a round: their scales are lanes of one register, and the code must not grow too long."""
    return next(n for n in (4, 2, 1) if groups % n == 0 and n * blocks <= _LANES_OF_SCALES)


def registers(kind: str, first: int, count: int = 4) -> str:
    """Return a list of registers, e.g. ``v4.4s-v7.4s`` in braces."""
    return "{" + f"v{first}.{kind}-v{first + count - 1}.{kind}" + "}"


def scale_loads(form: Form, rows: int, first: int) -> list[str]:
    """Load the scales of a round's groups, one register for each row, and go on to the next round's."""
    size, name = 4 * form.unroll, {4: "q", 2: "d", 1: "s"}[form.unroll]
    lines = [f"ldr {name}{first + r}, [{{scales}}, #{4 * r * form.groups}]" for r in range(1, rows)]
    return [*lines, f"ldr {name}{first}, [{{scales}}], #{size}"]


def looped(lines: list[str]) -> list[str]:
    """Repeat instructions ``{count}`` times."""
    return ["1:", *lines, "subs {count}, {count}, #1", "b.ne 1b"]


def sums_in_registers(
    form: Form,
    k_block: Callable[[], list[str]],
    scaled: Callable[[int], list[str]],
    scaled_by_differences: Callable[[], list[str]],
) -> list[str]:
    """Take 4 rows by 8 columns through a panel of groups: v0-v7 dot products, v8-v15 float sums.

    v28-v31 are the activation scales of the rows, or v31 is `MAGIC` where there is one for the row.

    Parameters
    ----------
    form : Form
    k_block : callable
        Instructions that multiply a k-block and add its products to v0-v7.
    scaled : callable
        Those that end the round's i-th group where activations have a scale for each.
    scaled_by_differences : callable
        Those that end a group where dot products run on.
    """
    lines = [f"ld1 {registers('4s', first)}, [{{sums}}], #64" for first in (8, 12)]
    lines += [f"ld1 {registers('4s', first)}, [{{magic}}]" for first in (0, 4)]
    body = scale_loads(form, 4, 28) if form.per_group else []
    lines += [] if form.per_group else ["ldr q31, [{magic}]"]
    for group in range(form.unroll):
        for _ in range(form.blocks):
            body += k_block()
        body += scaled(group) if form.per_group else scaled_by_differences()
    lines += [*looped(body), "sub {sums}, {sums}, #128"]
    return [*lines, *(f"st1 {registers('4s', first)}, [{{sums}}], #64" for first in (8, 12))]


def function(name: str, lines: list[str], operands: tuple[str, ...]) -> str:
    """Return LLVM's text of a function that runs `lines`; its arguments are `operands`, pointers and integers."""
    kinds = ["i64" if operand in ("count", "stride") else "ptr" for operand in operands]
    text = "\\0A".join(lines)
    for place, operand in enumerate(operands):
        text = text.replace("{" + operand + "}", f"${place}")
    outputs = ",".join(["=&r"] * len(operands))
    inputs = ",".join(str(i) for i in range(len(operands)))
    clobbers = ",".join(f"~{{v{i}}}" for i in range(32))
    arguments = ", ".join(f"{kind} %{operand}" for kind, operand in zip(kinds, operands, strict=True))
    results = "{" + ", ".join(kinds) + "}"
    constraints = f"{outputs},{inputs},{clobbers},~{{memory}},~{{cc}}"
    return (
        f"define void @{name}({arguments}) {{\n"
        f'  call {results} asm sideeffect "{text}", "{constraints}"({arguments})\n'
        "  ret void\n}\n"
    )
