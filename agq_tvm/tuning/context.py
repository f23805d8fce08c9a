"""Making MetaSchedule's contexts without TVM's own tensor intrinsics."""

import sys
import types
from unittest import mock

from tvm.s_tir import meta_schedule as ms

_INTRINSICS = "tvm.s_tir.tensor_intrin"


def tune_context(**arguments) -> ms.TuneContext:
    """Return a `TuneContext` for one thread.

    TVM would parse all its intrinsics first, CUDA's among them, which takes half a minute; we have our own.
    """
    module = sys.modules.get(_INTRINSICS) or types.ModuleType(_INTRINSICS)
    with mock.patch.dict(sys.modules, {_INTRINSICS: module}):
        return ms.TuneContext(num_threads=1, **arguments)
