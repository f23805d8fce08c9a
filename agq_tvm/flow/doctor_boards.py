"""The way to boards, step by step, as `agq doctor` goes it: see `doctor.Check` for what each step gives."""

import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from agq_tvm.boards.status import board_status, unfit
from agq_tvm.boards.tracker import board_features, board_is_emulated, connect, parse_tracker, tracker_summary
from agq_tvm.errors import AgqError
from agq_tvm.targets import Device, detect, load_device

_WAIT, _TIME_LIMIT = 10.0, 60.0
_SKEW = 60.0
_MEMORY, _DISK = 256 << 20, 256 << 20
_HOT = 80_000


def look_at_boards(tracker: str, key: str | None, device: Device | None) -> Iterator[dict]:
    """Look at a tracker, and at all free boards of a key.

    Parameters
    ----------
    tracker : str
        ``"HOST:PORT"``.
    key : str or None
        Without one only the tracker is looked at.
    device : Device or None
        What the boards should be; by default the best that their processors can do.

    Yields
    ------
    dict
        The fields of a `doctor.Check`.
    """
    try:
        begun = time.monotonic()
        keys = tracker_summary(*parse_tracker(tracker))
        milliseconds = 1000 * (time.monotonic() - begun)
    except AgqError as error:
        yield _check("tracker", "wrong", str(error), "start one with `agq tracker`, or open the way to it (ssh -L)")
        return
    yield _check(
        "tracker", "ok", f"{tracker} answers in {milliseconds:.0f} ms; keys: {', '.join(sorted(keys)) or 'none'}"
    )
    if key is None:
        yield _check("key", "skipped", "no --key was given")
        return
    if key not in keys:
        advice = "start the board's server with this --key and --tracker, or take one of the keys above"
        yield _check("key", "wrong", f"nobody has the key {key!r} at {tracker}", advice)
        return
    entry = keys[key]
    yield _occupation(entry)
    yield from _free_boards(tracker, key, entry, device)


def _check(name: str, state: str, found: str, advice: str = "") -> dict:
    return {"name": name, "state": state, "found": found, "advice": advice}


def _occupation(entry: dict) -> dict:
    """Say how many boards are free, and whom the others serve."""
    boards, free = len(entry["boards"]), min(entry["free"], len(entry["boards"]))
    busy = [_served(board) for board in entry["busy"]]
    busy += [f"{boards - free - len(busy)} serve somebody that they do not name"] if boards - free > len(busy) else []
    found = "; ".join([f"{boards} registered, {free} free", *busy])
    if entry["pending"]:
        found += f"; {entry['pending']} clients wait"
    if not free:
        return _check("boards", "wrong", found, "wait for who uses them, or end that process")
    return _check("boards", "ok", found)


def _served(board: dict) -> str:
    host, port = board["board"]
    return f"{host}:{port} serves {board['user']} for {max(0, time.time() - board['since']):.0f} s"


def _free_boards(tracker: str, key: str, entry: dict, device: Device | None) -> Iterator[dict]:
    """Look at the boards that are free, all of them held meanwhile so that each comes once."""
    sessions: list = []
    try:
        for _ in range(min(entry["free"], len(entry["boards"]))):
            try:
                sessions.append(connect(tracker, key, timeout=_TIME_LIMIT, wait=_WAIT))
            except AgqError as error:
                yield _check(
                    "session", "wrong", str(error), "look at the board's log, and whether its port is reachable"
                )
                return
        if len({board_is_emulated(session) for session in sessions}) > 1:
            found = f"some boards under the key {key!r} are emulated and others are not: their times do not compare"
            yield _check("fleet", "wrong", found, "give emulated boards a key of their own")
        for session in sessions:
            yield from (check | {"name": f"{session.board} {check['name']}"} for check in _board(session, device))
    finally:
        session = None
        sessions.clear()
        gc.collect()


def _board(session, device: Device | None) -> Iterator[dict]:
    """Look at one board."""
    features = board_features(session)
    if features is None:
        yield _check("processor", "note", "TVM's Python server does not tell what its processor can do")
    else:
        machine = "aarch64" if "asimd" in features else "x86_64"
        fastest = detect.best_device(machine, features)
        complaint = unfit(session, device) if device else None
        if complaint:
            yield _check(
                "processor", "wrong", f"it {complaint}", f"compile with --target {fastest}, or use another board"
            )
            return
        yield _check("processor", "ok", f"can run code for {device.name if device else fastest}")
        if board_is_emulated(session):
            yield _check(
                "emulation", "note", "the board is emulated: it shows what is right, and its time means nothing"
            )
        device = device or load_device(fastest)
    if device is None:
        yield _check("kernel", "skipped", "name the device with --target to send a kernel there and back")
    else:
        yield _round_trip(session, device)
    yield from _condition(session)


def _round_trip(session, device: Device) -> dict:
    """Send a kernel, run it, and compare what it computes."""
    from agq_tvm.flow.doctor_kernel import small_task
    from agq_tvm.tuning.candidate import export_candidate, make_candidate
    from agq_tvm.tuning.measure import ONCE, MeasureError, measure
    from agq_tvm.tuning.places import Board
    from agq_tvm.tuning.reference import arguments_of

    task = small_task(device)
    advice = "the board's TVM may be of another version: write its folder again with `agq boards server`"
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "kernel.so")
        try:
            export_candidate(make_candidate(task, None), device, path)
            begun = time.monotonic()
            measure(Board(session), path, arguments_of(task), 1, ONCE, time.monotonic())
        except AgqError as error:
            return _check("kernel", "wrong", str(error), "see `linker`")
        except MeasureError as error:
            return _check(
                "kernel", "wrong", f"a {device.instruction_set} kernel computes something else ({error})", advice
            )
        except Exception as error:  # what RPC raises, by release
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            told = next((line for line in lines if "the session on the board" in line), lines[0] if lines else "")
            return _check("kernel", "wrong", f"a {device.instruction_set} kernel does not run there: {told}", advice)
        seconds = time.monotonic() - begun
    return _check(
        "kernel", "ok", f"a {device.instruction_set} kernel went there and back in {seconds:.2f} s, and is right"
    )


def _condition(session) -> Iterator[dict]:
    """Look at what a board says of itself."""
    before = time.time()
    status = board_status(session)
    after = time.time()
    if status is None:
        yield _check("condition", "note", "this server does not tell: use that of `agq boards server`")
        return
    skew = round(status["time"] - (before + after) / 2, 1) + 0.0  # no -0.0
    state = "wrong" if abs(skew) > _SKEW else "ok"
    yield _check("clock", state, f"{skew:+.1f} s from ours", "set it, or have it set: timedatectl set-ntp true")
    for what, limit, advice in (
        ("memory", _MEMORY, "end other programs there"),
        ("disk", _DISK, "make room in its folder for temporary files, or start the server with TMPDIR set"),
    ):
        free, whole = status.get(f"{what}_free_bytes"), status.get(f"{what}_bytes")
        if free is not None and whole is not None:
            found = f"{free >> 20} of {whole >> 20} MB free"
            yield _check(what, "wrong" if free < limit else "ok", found, advice)
    if status.get("millidegrees"):
        zone, hottest = max(status["millidegrees"].items(), key=lambda each: each[1])
        found = f"{hottest / 1000:.0f} °C ({zone})"
        yield _check("temperature", "wrong" if hottest > _HOT else "ok", found, "cool it: hot processors slow down")
    if status.get("kilohertz"):
        values = sorted(status["kilohertz"].values())
        yield _check("frequency", "ok", f"{values[0] / 1e3:.0f} to {values[-1] / 1e3:.0f} MHz now")
