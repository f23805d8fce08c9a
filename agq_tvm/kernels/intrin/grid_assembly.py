"""Products on an integer grid in assembly for Arm: signed bytes, `step * q + low`, summed in integers over a panel.

One loop puts codes on their grid, once for all rows, the other one multiplies; groups end only in the first.
"""

from collections.abc import Callable, Sequence

from agq_tvm.kernels.intrin.assembly import looped, registers
from agq_tvm.kernels.layout import K_BLOCK

_STEPS, _LOWS, _NIBBLE, _ZERO = 8, 16, 24, 25
"""Registers, of the first two as many as a code has neighbours."""
_LOADS = 16 * K_BLOCK // 2 // 64
"""Of a k-block of 16 columns."""


def summed(
    unroll: int,
    k_block: Callable[[], list[str]],
    place: int = 0,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
) -> list[str]:
    """Return the loop over rounds of k-blocks for 4 rows by 8 columns, whose totals are in v0-v7.

    Parameters
    ----------
    unroll : int
        K-blocks of a round.
    k_block : callable
        Instructions that multiply a k-block and add its products to v0-v7.
    place : int
        First register that totals of rows come to from memory.
    before, after : sequence of str
        Instructions that bring them to v0-v7 from there, and back.
    """
    halves = [registers("4s", place + first) for first in (0, 4)]
    lines = [f"ld1 {halves[0]}, [{{sums}}], #64", f"ld1 {halves[1]}, [{{sums}}]", *before]
    lines += looped([line for _ in range(unroll) for line in k_block()])
    return [*lines, *after, f"st1 {halves[1]}, [{{sums}}]", "sub {sums}, {sums}, #64", f"st1 {halves[0]}, [{{sums}}]"]


def unpacked(blocks: int, depth: int) -> list[str]:
    """Return the loop over groups that puts 16 columns on their grid: 8 for one call, 8 for the next.

    Parameters
    ----------
    blocks : int
        K-blocks of a group.
    depth : int
        Channels of a column that stand side by side, 4 or 8: as many registers take 16 columns.
    """
    lines = [f"ld1 {{v{_STEPS}.16b}}, [{{step}}], #16", f"ld1 {{v{_LOWS}.16b}}, [{{low}}], #16"]
    lines += [f"eor v{_LOWS}.16b, v{_LOWS}.16b, v{_ZERO}.16b", *_repeated(_STEPS, depth), *_repeated(_LOWS, depth)]
    for load in range(blocks * _LOADS):
        lines.append(f"ld1 {registers('16b', 0)}, [{{packed}}], #64")
        for first in range(0, 4, depth // 2):
            lines += _on_grid(4 * load + first, first, depth)
    return [f"movi v{_NIBBLE}.16b, #0x0f", f"movi v{_ZERO}.16b, #0x80", *looped(lines)]


def _repeated(first: int, times: int) -> list[str]:
    """Repeat each byte of a register, which gives as many registers, the first one in its place."""
    lines, count = [], 1
    for kind in ("16b", "8h", "4s")[: times.bit_length() - 1]:
        for i in reversed(range(count)):
            each = f"v{first + i}.{kind}, v{first + i}.{kind}"
            lines += [f"zip{half + 1} v{first + 2 * i + half}.{kind}, {each}" for half in (1, 0)]
        count *= 2
    return lines


def _on_grid(number: int, first: int, depth: int) -> list[str]:
    """Put the registers of 8 columns on their grid: low nibbles before high ones; `number` counts registers."""
    count = depth // 2
    low = [(4 + i, first + i) for i in range(count)]
    high = [((4 + count + i) % 8, first + i) for i in range(count)]
    lines = [f"and v{to}.16b, v{packed}.16b, v{_NIBBLE}.16b" for to, packed in low]
    lines += [f"ushr v{to}.16b, v{packed}.16b, #4" for to, packed in high]
    codes = [(to, (number + i) % depth) for part in (low, high) for i, (to, _) in enumerate(part)]
    lines += [f"mul v{to}.16b, v{to}.16b, v{_STEPS + column}.16b" for to, column in codes]
    lines += [f"add v{to}.16b, v{to}.16b, v{_LOWS + column}.16b" for to, column in codes]
    where = ("codes", "next_codes")[number // count % 2]
    return lines + [f"st1 {registers('16b', codes[i][0])}, [{{{where}}}], #64" for i in range(0, len(codes), 4)]
