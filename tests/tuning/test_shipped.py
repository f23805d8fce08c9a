"""The schedules that are shipped: records of kernels as they are now, and simulated ones say so."""

import pytest

from agq_tvm.kernels import tunable
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.kernels.record import SIMULATED
from agq_tvm.kernels.record_library import Library, devices_in, shipped_directory
from agq_tvm.targets import load_device

BOARDS = ("raspberry-pi-4", "raspberry-pi-5", "snapdragon-870")
RENEW = "agq tune CKPT --target {} --simulate --library schedules, then agq schedules prune --library schedules"


@pytest.mark.parametrize("device", devices_in(shipped_directory()))
def test_records_are_of_kernels_as_they_are(device):
    library = Library(shipped_directory(), device=device)
    records = library.read()
    assert records and not library.problems
    for record in records:
        isa = instruction_set(record.instruction_set)
        kernel = tunable.described(record.kernel, isa)
        threads = record.provenance["threads"]
        renew = f"renew {record.task}: {RENEW.format(device)}"
        assert tunable.task_name(kernel, isa, threads) == record.task, renew
        assert tunable.space_of(kernel, isa, threads).allows(record.decisions), renew
        assert record.usable and record.instruction_set == load_device(device).instruction_set


@pytest.mark.parametrize("device", BOARDS)
def test_boards_that_nobody_had_are_simulated(device):
    assert device in devices_in(shipped_directory())
    records = Library(shipped_directory(), device=device).read()
    assert all(record.how == SIMULATED or record.provenance.get("board") for record in records)
    assert {1, 128} <= {record.kernel["rows"] for record in records if record.kernel["class"] == "LinearKernel"}
