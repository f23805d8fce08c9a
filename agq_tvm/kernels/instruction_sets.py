"""The instruction sets that kernels are written for.

Those without a `multiply_4x4` run 4-bit activations in their kernels for 8-bit ones, bit for bit; `neon-paper` is
`neon` with the multiplier of the Agile-Quant paper, `avx512vnni-xeon` is `avx512vnni` in other tiles.
"""

from agq_tvm.errors import AgqError
from agq_tvm.kernels.intrin.avx2 import AVX2
from agq_tvm.kernels.intrin.avx512vnni import AVX512VNNI, XEON
from agq_tvm.kernels.intrin.avxvnni import AVXVNNI
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.intrin.dotprod import DOTPROD
from agq_tvm.kernels.intrin.generic import GENERIC
from agq_tvm.kernels.intrin.i8mm import I8MM
from agq_tvm.kernels.intrin.neon import NEON, NEON_PAPER
from agq_tvm.kernels.linear_float import float_form

INSTRUCTION_SETS = {
    isa.name: isa for isa in (AVX512VNNI, XEON, AVXVNNI, AVX2, I8MM, DOTPROD, NEON, NEON_PAPER, GENERIC)
}


def instruction_set(name: str, activation: str = "") -> InstructionSet:
    """Return the instruction set of that name; its float form where the activation is ``"none"``.

    Raises
    ------
    AgqError
        If there are no kernels for it.
    """
    if name not in INSTRUCTION_SETS:
        raise AgqError(f"no kernels for instruction set {name!r}: there are {', '.join(INSTRUCTION_SETS)}")
    isa = INSTRUCTION_SETS[name]
    return float_form(isa) if activation == "none" else isa
