"""Anything: plain loops over lanes that LLVM vectorizes as the target allows."""

from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.layout import Layout

GENERIC = InstructionSet(
    name="generic",
    layout_4bit=Layout(bits=4, vectors=2, lanes=8, depth=1, zero=0),
    layout_8bit=Layout(bits=8, vectors=2, lanes=8, depth=1, zero=128),
    rows=2,
)
