"""TVM's runtime without its compiler, for what only runs models.

``import tvm`` takes seconds and hundreds of megabytes: the compiler with LLVM in it, the passes in Python, and
PyTorch wherever that is installed. A compiled model needs none of it.
"""

import importlib.util
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path


@cache
def tvm_ffi():
    """Return the module ``tvm_ffi``, TVM's runtime loaded. ``import tvm`` may come before or after."""
    with _without("torch"):  # which tvm_ffi imports against a conflict that Windows has, and to convert its tensors
        import tvm_ffi
    libraries = Path(importlib.util.find_spec("tvm").origin).parent / "lib"
    # Global, as `import tvm` has it: the compiler's library looks for these symbols.
    tvm_ffi.libinfo.load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=[libraries])
    return tvm_ffi


@contextmanager
def _without(module: str):
    """Let an import of a module fail inside, unless it is there already."""
    blocked = module not in sys.modules
    if blocked:
        sys.modules[module] = None
    try:
        yield
    finally:
        if blocked:
            del sys.modules[module]
