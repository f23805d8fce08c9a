"""Time the operations of a decoder block on a device, and propose which inputs should have 4 bits there."""

import gc
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING

from agq_tvm.boards.tracker import board_features, board_is_emulated, connect
from agq_tvm.errors import AgqError
from agq_tvm.files import fresh_directory
from agq_tvm.flow.analyze import need_matplotlib
from agq_tvm.flow.packing import offsets_dtype
from agq_tvm.flow.profile_file import PROFILE, OperationTimes, Profile, Proposal, read_profile, write_profile
from agq_tvm.flow.propose_bits import PerplexityCost, none, propose, savings
from agq_tvm.progress import say
from agq_tvm.quantize.checkpoint import Checkpoint, read_checkpoint
from agq_tvm.runtime.threads import Threads, configure_board
from agq_tvm.targets import Device, detect, load_device
from agq_tvm.targets.processors import cache_bytes

if TYPE_CHECKING:
    from agq_tvm.flow.profile_kernels import Effort, Place, Timing
    from agq_tvm.flow.profile_operations import BlockOperations

PICTURE = "profile.png"
ROWS = (1, 128)
BUDGET_PERCENT = 1.0
POSITIONS = 512
"""Keys that the last row attends to."""
_CONTEXT = 2048
_SESSION_SECONDS = 3600.0


def profile(
    checkpoint: str | os.PathLike,
    target: str,
    output: str | os.PathLike,
    tracker: str | None = None,
    key: str | None = None,
    rows: tuple[int, ...] = ROWS,
    budget: float = BUDGET_PERCENT,
    effort: "Effort | None" = None,
) -> Profile:
    """Profile one block of a checkpoint's model; write ``profile.json`` and, but for emulated boards, ``profile.png``.

    Parameters
    ----------
    checkpoint : path-like
        Shapes, groups, activations and attention are as there; weights and inputs are random.
    target : str
        A device's name, its TOML file, or ``"host"``.
    output : path-like
        The directory to write; an earlier profile there is replaced.
    tracker, key : str, optional
        A board behind TVM's tracker, ``"HOST:PORT"``, and what it is registered as (by default the device's name).
        Without a tracker this machine is profiled.
    rows : tuple of int
        Rows of activations: 1 is decoding, more are prefill.
    budget : float
        Perplexity in percent that 4-bit inputs may cost.
    effort : Effort, optional
        By default that for figures to go by; emulated boards only run every kernel.

    Returns
    -------
    Profile
        What the file holds.

    Raises
    ------
    AgqError
        If the checkpoint cannot be compiled, the device is not there or not that one, or matplotlib is missing.
    """
    need_matplotlib()
    device, source = load_device(target), read_checkpoint(checkpoint)
    _check(source, rows, budget, tracker, key)
    with fresh_directory(output, "profile") as directory:
        result = _profile(source, device, tracker, key, rows, budget, effort)
        write_profile(directory / PROFILE, result)
        if not result.emulated:
            from agq_tvm.flow.profile_picture import draw

            draw(result, directory / PICTURE)
    return result


def _check(checkpoint: Checkpoint, rows: tuple[int, ...], budget: float, tracker: str | None, key: str | None) -> None:
    if checkpoint.scheme.activation == "none":
        raise AgqError(
            f"{checkpoint.path} has float activations, which have no kernels: quantize it with "
            "--activation per-token-group"
        )
    scheme = checkpoint.scheme
    if scheme.group_size == "column" or scheme.weight_bits == 8 or scheme.mixed_bits:
        raise AgqError(
            f"{checkpoint.path} cannot be profiled: give one with 4-bit weights in groups and 8-bit activations"
        )
    most = _positions(checkpoint)
    if not rows or len(set(rows)) < len(rows) or not all(1 <= count <= most for count in rows):
        raise AgqError(f"--rows takes different numbers in 1..{most}, not {','.join(map(str, rows))}")
    if not 0 <= budget <= 100:
        raise AgqError(f"--budget is a part of the perplexity in percent, 0 to 100, not {budget:g}")
    if key is not None and tracker is None:
        raise AgqError("--key names a board of a tracker: give --tracker HOST:PORT, too")


def _positions(checkpoint: Checkpoint) -> int:
    return min(POSITIONS, checkpoint.config.context_length)


def _profile(
    source: Checkpoint,
    device: Device,
    tracker: str | None,
    key: str | None,
    rows: tuple[int, ...],
    budget: float,
    effort: "Effort | None",
) -> Profile:
    from agq_tvm.flow.profile_operations import FORMS

    load = os.getloadavg()[0] if tracker is None else None
    blocks = [_block(source, device, count) for count in rows]
    emulated, timings = _timings(blocks, device, tracker, key, effort)
    gc.collect()  # of a board's session, which ends with the last thing that came from there
    times = {count: _times(block, emulated, timings) for count, block in zip(rows, blocks, strict=True)}
    return Profile(
        device=device.name,
        instruction_set=device.instruction_set,
        threads=device.threads,
        board=None if tracker is None else key or device.name,
        emulated=emulated,
        load=load,
        family=source.config.family,
        activation=source.scheme.activation,
        group_size=source.scheme.group_size,
        positions=_positions(source),
        forms=FORMS,
        blocks=times,
        proposal=_proposal(source, times, emulated, budget),
    )


def _block(source: Checkpoint, device: Device, rows: int) -> "BlockOperations":
    from agq_tvm.flow.profile_operations import BlockOperations
    from agq_tvm.kernels.instruction_sets import instruction_set

    positions = _positions(source)
    context = -(-min(_CONTEXT, source.config.context_length) // 16) * 16
    isa = instruction_set(device.instruction_set)
    return BlockOperations(source.config, source.scheme, offsets_dtype(source), isa, rows, context, positions - rows)


def _timings(
    blocks: list["BlockOperations"], device: Device, tracker: str | None, key: str | None, effort: "Effort | None"
) -> tuple[bool, dict[str, "Timing"]]:
    """Return whether the board is emulated, and the times of all kernels by name."""
    from agq_tvm.flow.profile_kernels import ONCE, Effort, time_kernels

    place, emulated = _open(device, tracker, key)
    effort = ONCE if emulated else effort or Effort(cold_bytes=_cold_bytes(tracker is None))
    where = "this machine" if tracker is None else f"{'the emulated ' if emulated else ''}board {key or device.name}"
    timings: dict[str, Timing] = {}
    with Threads(device.threads).running() if tracker is None else nullcontext():
        for block in blocks:
            say(f"timing {len(block.kernels)} kernels of {block.rows} rows on {where}")
            timings |= time_kernels(block.kernels.values(), place, effort)
    place.forget()
    return emulated, timings


def _cold_bytes(here: bool) -> int:
    from agq_tvm.flow.profile_kernels import Effort

    return max(Effort.cold_bytes, 2 * cache_bytes() if here else 0)


def _open(device: Device, tracker: str | None, key: str | None) -> tuple["Place", bool]:
    """Return where kernels run, ready for them, and whether that is emulated."""
    from agq_tvm.flow.profile_kernels import Place

    if tracker is None:
        machine, features, emulated, session = detect.machine(), detect.cpu_features(), False, None
    else:
        session = connect(tracker, key or device.name, timeout=_SESSION_SECONDS)
        features, emulated = board_features(session), board_is_emulated(session)
        machine = "aarch64" if features is None or "asimd" in features else "x86_64"
        # Threads of an emulated board would only wait for each other.
        configure_board(session.get_function, 1 if emulated else device.threads)
    missing = [] if features is None else detect.missing_features(device, features, machine)
    if missing:
        hint = "take --target host, or a board's --tracker" if tracker is None else "give the board's own --target"
        raise AgqError(f"kernels for {device.name} do not run on a processor without {', '.join(missing)}: {hint}")
    return Place(device, session), emulated


def _times(block: "BlockOperations", emulated: bool, timings: dict[str, "Timing"]) -> tuple[OperationTimes, ...]:
    if emulated:
        return tuple(OperationTimes(operation.name, operation.kind) for operation in block.operations)
    return tuple(
        OperationTimes(
            operation.name,
            operation.kind,
            {form: _seconds(parts, timings) for form, parts in operation.kernels.items()},
            {
                form: sum(abs(n) * timings[name].spread for name, n in parts)
                for form, parts in operation.kernels.items()
            },
        )
        for operation in block.operations
    )


def _seconds(parts: tuple[tuple[str, int], ...], timings: dict[str, "Timing"]) -> float:
    return max(0.0, sum(n * timings[name].seconds for name, n in parts))


def _proposal(
    source: Checkpoint, blocks: dict[int, tuple[OperationTimes, ...]], emulated: bool, budget: float
) -> Proposal:
    if emulated:
        return none(budget, "the board is emulated: its time means nothing", {})
    saved = savings(blocks)
    if source.scheme.activation == "static":
        return none(budget, "static scales were calibrated for 8 bits: 4 bits need a calibration of their own", saved)
    return propose(saved, PerplexityCost(source), budget)


def bits_from(path: str | os.PathLike) -> tuple[str, ...]:
    """Return the roles whose inputs a profile proposes 4 bits for.

    Raises
    ------
    AgqError
        If the profile cannot be read, or is of an emulated board.
    """
    read = read_profile(path)
    if read.emulated:
        raise AgqError(f"{path} is the profile of an emulated board, whose time means nothing: profile a real one")
    return read.proposal.four_bit
