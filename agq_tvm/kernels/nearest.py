"""What is known of like kernels, for one that was not tuned itself."""

from agq_tvm.errors import AgqError
from agq_tvm.kernels import tunable
from agq_tvm.kernels.attrs import describe
from agq_tvm.kernels.intrin.base import InstructionSet
from agq_tvm.kernels.record import Record
from agq_tvm.kernels.record_library import Library


def nearest(library: Library, kernel, isa: InstructionSet, threads: int) -> list[tuple[Record, dict[str, int]]]:
    """Return the best records of like kernels, the nearest first, each with the decisions it suggests.

    Parameters
    ----------
    library : Library
    kernel : one of `tunable.KINDS`
    isa : InstructionSet
    threads : int
        That `kernel` runs on.
    """

    def suggests(record: Record) -> bool:
        return _carried(record, kernel, isa, threads) is not None

    near = library.nearest(describe(kernel), isa.name, threads, tunable.version_of(kernel), suggests)
    return [(record, _carried(record, kernel, isa, threads)) for record in near]


def _carried(record: Record, kernel, isa: InstructionSet, threads: int) -> dict[str, int] | None:
    """Return the hand-made decisions of a kernel, but for what a like kernel's record has otherwise than its own.

    Hand-made decisions follow the sizes: 16 rows may multiply codes as they are stored where 128 unpack them. What was
    left as it was made says nothing about another size.

    Returns
    -------
    dict of str to int, or None
        None if the record's decisions, or what comes of them, are in no space.
    """
    try:
        theirs = tunable.space_of(tunable.described(record.kernel, isa), isa, record.provenance["threads"])
    except AgqError:
        return None
    own = tunable.space_of(kernel, isa, threads)
    if theirs is None or own is None or not theirs.allows(record.decisions):
        return None
    changed = {name: value for name, value in record.decisions.items() if value != theirs.default[name]}
    decisions = own.default | changed
    return decisions if own.allows(decisions) else None
