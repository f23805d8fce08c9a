"""What is in every candidate's library: functions of its own, and what is linked to it, see helpers.c."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agq_tvm.targets import Device
from agq_tvm.targets.link import Exporter

MAIN = "main"
"""The kernel."""
SWEEP = "sweep"
"""``sweep(n, operands…)``: calls ``main`` with each `n` operands in turn."""
FIXED = "fixed"
"""``fixed(rounds)``: a chain of multiplications."""
_SOURCE = Path(__file__).parent / "helpers.c"


def fill_name(place: int) -> str:
    """Return the name of the function that fills the operand at a place: ``f(operand)``."""
    return f"fill_{place}"


def digest_name(place: int) -> str:
    """Return the name of the function that digests the operand at a place: ``f(operand, int64 [1])``."""
    return f"digest_{place}"


@dataclass(frozen=True)
class CandidateExporter(Exporter):
    """The ``fcompile`` of ``export_library`` for candidates; their kernel is called ``main``."""

    def __call__(self, file_name: str, files: Sequence[str], options: Sequence[str] | None = None, **_) -> None:
        super().__call__(file_name, [*files, str(_SOURCE)], options)


def candidate_exporter(device: Device) -> CandidateExporter:
    """Return the ``fcompile`` argument of ``export_library`` for candidates."""
    return CandidateExporter(device)
