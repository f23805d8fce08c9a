"""One candidate: a kernel built from decisions, with what makes its operands and checks its results on a board."""

import os
import shutil
import tempfile
from pathlib import Path

from agq_tvm.kernels import tunable
from agq_tvm.targets import Device
from agq_tvm.tuning.helpers import MAIN, candidate_exporter, digest_name, fill_name
from agq_tvm.tuning.operands import operands_of
from agq_tvm.tuning.task import Task
from agq_tvm.tvm_seam import Target, tvm


def make_candidate(task: Task, decisions: dict[str, int] | None):
    """Build a candidate.

    Parameters
    ----------
    task : Task
    decisions : dict of str to int, or None
        What was decided, checked against the space; None is the default.

    Returns
    -------
    IRModule
        ``main``, the kernel; ``fill_<i>`` for every operand; ``digest_<i>`` for those that it writes. See
        `agq_tvm.tuning.operands`, which lists the operands and makes the same on the host.

    Raises
    ------
    AgqError
        If the space does not allow the decisions.
    """
    isa = task.instruction_set
    if decisions is not None:
        task.space.check(decisions)
    func = tunable.build(task.kernel, isa, decisions)
    functions = {MAIN: func}
    for place, operand in enumerate(operands_of(task.kernel, func)):
        functions[fill_name(place)] = operand.fill_function()
        if operand.role in ("output", "updated"):
            functions[digest_name(place)] = operand.digest_function()
    return tvm.IRModule({name: func.with_attr("global_symbol", name) for name, func in functions.items()})


def export_candidate(module, device: Device, path: str | os.PathLike) -> None:
    """Compile a candidate and write its library, ``.so``, for a device.

    Raises
    ------
    AgqError
        If it cannot be linked.
    """
    with tempfile.TemporaryDirectory(prefix="agq-candidate-") as scratch:
        executable = tvm.compile(module, Target(device.tvm_target()))
        made = Path(scratch) / "candidate.so"
        executable.export_library(str(made), fcompile=candidate_exporter(device), workspace_dir=scratch)
        beside = Path(f"{path}.{os.getpid()}.part")
        shutil.copyfile(made, beside)
        os.replace(beside, path)  # it takes its name at once
