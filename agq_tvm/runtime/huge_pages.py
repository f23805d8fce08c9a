"""Huge pages behind large arrays, so that a stream of weights waits less for addresses to be looked up."""

import ctypes
import sys

import numpy as np

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
