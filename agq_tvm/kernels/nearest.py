"""What is known of like kernels, for one that was not tuned itself."""

from agq_tvm.kernels import tunable
from agq_tvm.kernels.attrs import describe
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.record import Record
from agq_tvm.kernels.record_library import Library
from agq_tvm.kernels.space import Space


def nearest(library: Library, kernel, isa: InstructionSet, threads: int) -> list[tuple[Record, dict[str, int]]]:
    """Return the best records of like kernels, the nearest first, each with the decisions it suggests.

    Parameters
    ----------
    library : Library
    kernel : one of `tunable.KINDS`
        With a design space.
    isa : InstructionSet
    threads : int
        That `kernel` runs on.
    """
    own = tunable.space_of(kernel, isa, threads)

    def suggests(record: Record) -> bool:
        return _carried(record, own, isa) is not None

    near = library.nearest(describe(kernel), isa.name, threads, tunable.version_of(kernel), suggests)
    return [(record, _carried(record, own, isa)) for record in near]


def _carried(record: Record, own: Space, isa: InstructionSet) -> dict[str, int] | None:
    """Return the hand-made decisions of a kernel, but for what a like kernel's record has otherwise than its own.

    Hand-made decisions follow the sizes: 8 rows may multiply codes as they are stored where 128 unpack them. What was
    left as it was made says nothing about another size.

    Parameters
    ----------
    record : Record
    own : Space
        Of the kernel.
    isa : InstructionSet

    Returns
    -------
    dict of str to int, or None
        None if the record's decisions, or what comes of them, are in no space.
    """
    theirs = tunable.space_described(record.kernel, isa, record.provenance["threads"])
    if theirs is None or not theirs.allows(record.decisions):
        return None
    changed = {name: value for name, value in record.decisions.items() if value != theirs.default[name]}
    decisions = own.default | changed
    return decisions if own.allows(decisions) else None
