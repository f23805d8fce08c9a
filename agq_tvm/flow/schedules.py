"""Which schedule each kernel of a model gets, and what came of looking for it."""

from collections import Counter

from agq_tvm.flow.tasks import tuned_variants
from agq_tvm.kernels import tunable
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.nearest import nearest
from agq_tvm.kernels.record import Record
from agq_tvm.kernels.record_library import Library

TUNED, NEAREST, DEFAULT = "tuned", "nearest", "default"


class Chooser:
    """Chooses decisions for kernels from a library, and remembers what it chose.

    Nothing that a file says is taken for granted: decisions that a kernel's space does not allow are left out.

    Parameters
    ----------
    library : Library
    isa : InstructionSet
    threads : int
        That the model runs with.

    Attributes
    ----------
    kernels : dict of str to dict
        By name of the kernel: ``schedule`` (``"tuned"``, ``"nearest"`` or ``"default"``), and what it comes from.
    """

    def __init__(self, library: Library, isa: InstructionSet, threads: int):
        self.library, self.isa, self.threads = library, isa, threads
        self.kernels: dict[str, dict] = {}
        self._records = library.read()

    def __call__(self, kernel) -> dict[str, int] | None:
        """Return the decisions of a kernel, None for the default."""
        if tunable.space_of(kernel, self.isa, self.threads) is None:
            return None
        kind, record, decisions = self._find(kernel)
        found = {"schedule": kind}
        if record is not None:
            found |= {"decisions": decisions, "task": record.task, "how": record.how, "seconds": record.time}
        self.kernels[kernel.name] = found
        return decisions

    def _find(self, kernel) -> tuple[str, Record | None, dict[str, int] | None]:
        allows = tunable.space_of(kernel, self.isa, self.threads).allows
        # Attention: what the longest caches that were tuned for want, up to its own.
        for same in tuned_variants(kernel)[-1:]:
            record = self.library.best(tunable.task_name(same, self.isa, self.threads), allows)
            if record is not None:
                return TUNED, record, dict(record.decisions)
            near = nearest(self.library, same, self.isa, self.threads)
            if near:
                return NEAREST, *near[0]
        return DEFAULT, None, None

    def report(self) -> dict:
        """Return how many kernels have which kind of schedule, each of them, and what was left out."""
        counts = Counter(found["schedule"] for found in self.kernels.values())
        own = [record for record in self._records if record.instruction_set == self.isa.name]
        other = sum(record.kernel_version != tunable.VERSIONS.get(record.kernel["class"]) for record in own)
        return {
            **{kind: counts[kind] for kind in (TUNED, NEAREST, DEFAULT)},
            "simulated": sum(found.get("how") == "simulated" for found in self.kernels.values()),
            "other_version": other,
            "emulated": sum(record.emulated for record in self._records),
            "left_out": self.library.problems,
            "kernels": self.kernels,
        }


def summary(report: dict) -> str:
    """Say in a line which schedules a model has."""
    parts = [f"{report[kind]} {kind}" for kind in (TUNED, NEAREST, DEFAULT) if report[kind]] or ["nothing to choose"]
    text = ", ".join(parts)
    if report["simulated"]:
        text += f" ({report['simulated']} by simulation)"
    ignored = {
        "for other versions of the kernels": report["other_version"],
        "of emulated boards, whose times mean nothing": report["emulated"],
        "damaged": len(report["left_out"]),
    }
    words = [f"{count} {what}" for what, count in ignored.items() if count]
    return f"{text}; records ignored: {'; '.join(words)}" if words else text
