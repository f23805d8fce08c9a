"""Huge pages behind large arrays, so that a stream of weights waits less for addresses to be looked up."""

import ctypes
import sys
from collections.abc import Sequence

import numpy as np

from agq_tvm.runtime.virtual_machine import ALIGNMENT, aligned

_COLLAPSE = 25  # MADV_COLLAPSE, since Linux 6.1
_HUGE = 2 << 20
"""Bytes at whose multiples a huge page may begin; where pages are larger, Linux takes those that fit."""


def collapse(array: np.ndarray) -> bool:
    """Ask Linux to put huge pages behind an array that has been written, at once.

    numpy asks for them, too, but gets small ones where memory is in pieces. What is huge already costs nothing.

    Parameters
    ----------
    array : array
        Contiguous. Its memory may move, its addresses stay.

    Returns
    -------
    bool
        Whether its whole huge pages are such now; False on systems that do not know the request, too.
    """
    if sys.platform != "linux":
        return False
    begin, end = -(-array.ctypes.data // _HUGE) * _HUGE, (array.ctypes.data + array.nbytes) // _HUGE * _HUGE
    if begin >= end:
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise(begin, end - begin, _COLLAPSE) == 0


def one_block(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Copy arrays to where they are read as a bundle's weights are: one behind the other, on huge pages.

    Returns
    -------
    list of array
        Views of one block, each at a multiple of 64 bytes.
    """
    sizes = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]
    block, begin, copies = aligned((sum(sizes),), "uint8"), 0, []
    for array, size in zip(arrays, sizes, strict=True):
        copy = block[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        copies.append(copy)
        begin += size
    collapse(block)
    return copies
