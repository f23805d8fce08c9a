"""Memory is read while rows of prefill are multiplied, and not only while codes are unpacked.

Packed codes are unpacked in steps along K, and stay for all rows. Each tile of rows fetches its part of the next
step's codes, so that unpacking finds them in a cache. A part is best of no more lines than a core waits for at a time,
16 of a Xeon: the k-block of a tile of 64 columns. So a step is of no more k-blocks than there are tiles of rows.
"""

import math

from agq_tvm.kernels.intrin.tensor_intrin import prefetch
from agq_tvm.tvm_seam import T

_LINE = 64
"""Bytes that memory is fetched in."""
_SECOND_CACHE = 2
"""`prefetch`'s locality."""


def emit_fetch(w, steps: int, parts: int):
    """Emit the block ``fetch``: each step's successor in parts, whose place is in the loop over tiles of rows.

    Parameters
    ----------
    w : uint8 buffer [NT, KB, S, V, L, D]
        Packed codes; beyond the last step of a tile of columns comes the next tile.
    steps : int
        C, which divides KB.
    parts : int
        Tiles of rows.

    Returns
    -------
    fetched : uint8 buffer [NT, C, parts]
        Nothing is stored there: what reads it comes after a part.
    """
    tiles, *inner = (int(extent) for extent in w.shape)
    size = math.prod(inner) // steps
    lines = -(-size // (_LINE * parts))
    fetched = T.sblock_alloc_buffer((tiles, steps, parts), "uint8")
    with T.grid(*fetched.shape) as loops, T.sblock("fetch"):
        t, c, part = T.axis.remap("SSS", loops)
        T.reads(w[t, c * (inner[0] // steps), 0, 0, 0, 0])
        T.writes(fetched[t, c, part])
        with T.serial(lines) as line:
            prefetch(w, (t * steps + c + 1) * size + (part * lines + line) * _LINE, _SECOND_CACHE)
    return fetched
