"""What `agq schedules` does: looking into libraries of tuned schedules, and keeping them in order."""

from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.files import fresh_directory
from agq_tvm.kernels.record import Record, best_of
from agq_tvm.kernels.record_file import RECORDS, RecordFile
from agq_tvm.kernels.record_library import devices_in, shipped_directory, user_directory


def list_schedules(directory: str | None, device: str | None) -> dict:
    """Return the best record of every task, by device.

    Parameters
    ----------
    directory : str, optional
        One library; by default the user's own and the shipped one.
    device : str, optional
        Only this one.

    Returns
    -------
    dict
        ``libraries``, ``left_out`` (damaged lines), and ``devices``: for each its ``trials``, ``failures``,
        ``emulated`` (trials on emulated boards, of which none is the best) and ``tasks``, where a task has ``task``,
        ``seconds``, ``how``, ``confirmed``, ``decisions`` and ``provenance``.

    Raises
    ------
    AgqError
        If there is no such library or device in it.
    """
    directories = [Path(directory)] if directory else [user_directory(), shipped_directory()]
    if directory and not directories[0].is_dir():
        raise AgqError(f"{directory} is no library of schedules: it is no directory")
    names = sorted({name for each in directories for name in devices_in(each)})
    if device and device not in names:
        raise AgqError(f"there are no schedules for {device!r}, only for {', '.join(names) or 'nothing'}")
    names = [device] if device else names
    found, left_out = {}, []
    for name in names:
        files = [RecordFile(each / name / RECORDS) for each in directories]
        records = [record for file in files for record in file.read()]
        left_out += [problem for file in files for problem in file.problems]
        found[name] = {
            "trials": len(records),
            "failures": sum(record.seconds is None for record in records),
            "emulated": sum(record.emulated for record in records),
            "tasks": [_as_row(record) for _, record in sorted(best_of(records).items())],
        }
    return {"libraries": [str(each) for each in directories], "devices": found, "left_out": left_out}


def _as_row(record: Record) -> dict:
    return {
        "task": record.task,
        "seconds": record.time,
        "how": record.how,
        "confirmed": record.confirmed,
        "decisions": record.decisions,
        "provenance": record.provenance,
    }


def merge_schedules(sources: list[str], into: str | None) -> dict:
    """Add the records of libraries to another; of two of the same candidate and processor the better one stays.

    Returns
    -------
    dict
        ``library``, ``added``, ``replaced`` and ``left_out``.
    """
    target, left_out = Path(into) if into else user_directory(), []
    added = replaced = 0
    for source in sources:
        devices = devices_in(source)
        if not devices:
            raise AgqError(f"{source} is no library of schedules: no folder in it has a {RECORDS}")
        for device in devices:
            file = RecordFile(Path(source) / device / RECORDS)
            records = file.read()
            left_out += file.problems
            changes = _merge(RecordFile(target / device / RECORDS), records)
            added, replaced = added + changes[0], replaced + changes[1]
    return {"library": str(target), "added": added, "replaced": replaced, "left_out": left_out}


def _merge(target: RecordFile, records: list[Record]) -> tuple[int, int]:
    counts = [0, 0]

    def better(own: list[Record]) -> list[Record]:
        kept = {}
        for record in own:
            kept.setdefault(record.key, record)
        for record in records:
            if record.key not in kept:
                counts[0] += 1
                kept[record.key] = record
            elif record.rank < kept[record.key].rank:
                counts[1] += 1
                kept[record.key] = record
        return list(kept.values())

    if records:
        target.replace(better)
    return counts[0], counts[1]


def prune_schedules(directory: str | None, keep: int) -> dict:
    """Leave only the best records of each task, way of measuring and processor; those of old versions of kernels go.

    Parameters
    ----------
    directory : str, optional
        A library; by default the user's own.
    keep : int
        Records of each task.

    Returns
    -------
    dict
        ``library``, ``kept``, ``removed`` and ``left_out`` (damaged lines, which stay).
    """
    library = Path(directory) if directory else user_directory()
    kept, removed, left_out = 0, 0, []
    for device in devices_in(library):
        file = RecordFile(library / device / RECORDS)
        removed += file.replace(lambda records: _best(records, keep))
        kept += len(file.read())
        left_out += file.problems
    return {"library": str(library), "kept": kept, "removed": removed, "left_out": left_out}


def _best(records: list[Record], keep: int) -> list[Record]:
    """Choose what stays. A version above ours, which a later program wrote, says nothing about ours."""
    from agq_tvm.kernels.tunable import VERSIONS

    groups: dict[tuple, list[Record]] = {}
    for record in records:
        if record.usable and record.kernel_version >= VERSIONS.get(record.kernel["class"], 0):
            what = record.task, record.how, record.confirmed, record.cpu, record.kernel_version
            groups.setdefault(what, []).append(record)
    best = {id(record) for group in groups.values() for record in sorted(group, key=lambda each: each.rank)[:keep]}
    return [record for record in records if id(record) in best]


def export_schedules(directory: str | None, device: str, output: str) -> dict:
    """Write a device's usable records as MetaSchedule's own pair of files, which ``ms.database.JSONDatabase`` reads.

    Traces are made anew from decisions that the kernels' spaces allow; the rest is left out.

    Returns
    -------
    dict
        ``output``, ``records`` and ``left_out``.
    """
    from tvm.s_tir import meta_schedule as ms

    from agq_tvm.kernels import tunable
    from agq_tvm.kernels.instruction_sets import instruction_set
    from agq_tvm.targets import load_device
    from agq_tvm.tuning.carrier import carrier, scheduled
    from agq_tvm.tvm_seam import Target

    library = Path(directory) if directory else user_directory()
    file, target = RecordFile(library / device / RECORDS), Target(load_device(device).tvm_target())
    records = [record for record in file.read() if record.usable]
    if not records:
        raise AgqError(f"{file.path} has no record that could be exported")
    written = 0
    with fresh_directory(output, "schedules") as folder:
        database = ms.database.JSONDatabase(work_dir=str(folder))
        for record in records:
            try:
                isa = instruction_set(record.instruction_set)
            except AgqError:
                continue
            space = tunable.space_described(record.kernel, isa, _threads(record))
            if space is None or not space.allows(record.decisions):
                continue
            module = carrier(record.task)
            trace = scheduled(module, space, record.decisions).trace
            workload = database.commit_workload(module)
            database.commit_tuning_record(ms.database.TuningRecord(trace, workload, list(record.seconds), target, []))
            written += 1
    return {"output": str(output), "records": written, "left_out": len(records) - written}


def _threads(record: Record) -> int:
    threads = record.provenance.get("threads")
    return threads if type(threads) is int and threads > 0 else 1
