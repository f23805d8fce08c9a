"""Time the operations of a decoder on a device, and propose which inputs should have 4 bits there."""

import gc
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

from agq_tvm.boards.tracker import board_features, board_is_emulated, connect
from agq_tvm.errors import AgqError
from agq_tvm.files import fresh_directory
from agq_tvm.flow.analyze import need_matplotlib
from agq_tvm.flow.compile import cache_length
from agq_tvm.flow.profile_file import PROFILE, OperationTimes, Profile, Proposal, read_profile, write_profile
from agq_tvm.flow.propose_bits import PerplexityCost, none, propose, savings
from agq_tvm.kernels.attention_form import CACHES
from agq_tvm.models.decoder import PREFILL_BUCKETS
from agq_tvm.progress import say
from agq_tvm.quantize.checkpoint import Checkpoint, read_checkpoint
from agq_tvm.runtime.threads import Threads, configure_board
from agq_tvm.targets import Device, detect, load_device
from agq_tvm.targets.processors import cache_bytes

if TYPE_CHECKING:
    from agq_tvm.flow.profile_forms import Form
    from agq_tvm.flow.profile_kernels import Effort, Place, Timing
    from agq_tvm.flow.profile_operations import DecoderOperations

PICTURE = "profile.png"
ROWS = (1, 128)
BUDGET_PERCENT = 1.0
POSITIONS = 512
"""Keys that the last row attends to."""
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
    cache: str = CACHES[0],
) -> Profile:
    """Profile a checkpoint's decoder; write ``profile.json`` and, but for emulated boards, ``profile.png``.

    Parameters
    ----------
    checkpoint : path-like
        Operations are those of its compiled decoder, with the schedules that the user's library and the shipped one
        have for them; weights and inputs are random.
    target : str
        A device's name, its TOML file, or ``"host"``.
    output : path-like
        The directory to write; an earlier profile there is replaced.
    tracker, key : str, optional
        A board behind TVM's tracker, ``"HOST:PORT"``, and what it is registered as (by default the device's name).
        Without a tracker this machine is profiled.
    rows : tuple of int
        Rows of activations: 1 is decoding, those of a bucket are prefill.
    budget : float
        Perplexity in percent that 4-bit inputs may cost.
    effort : Effort, optional
        By default that for figures to go by; emulated boards only run every kernel.
    cache : str
        What keys and values are stored as, as for `agq_tvm.flow.compile.compile_checkpoint`.

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
    _check(source, rows, budget, tracker, key, cache)
    with fresh_directory(output, "profile") as directory:
        result = _profile(source, device, tracker, key, rows, budget, effort, cache)
        write_profile(directory / PROFILE, result)
        if not result.emulated:
            from agq_tvm.flow.profile_picture import draw

            draw(result, directory / PICTURE)
    return result


def _check(
    checkpoint: Checkpoint, rows: tuple[int, ...], budget: float, tracker: str | None, key: str | None, cache: str
) -> None:
    possible = [count for count in (1, *PREFILL_BUCKETS) if count <= _positions(checkpoint)]
    if not rows or len(set(rows)) < len(rows) or not set(rows) <= set(possible):
        choice = ", ".join(map(str, possible))
        raise AgqError(f"--rows takes different ones of {choice}, which models are compiled for, not {_joined(rows)}")
    if cache not in CACHES:
        raise AgqError(f"unknown cache {cache!r}: choose one of {', '.join(CACHES)}")
    if not 0 <= budget <= 100:
        raise AgqError(f"--budget is a part of the perplexity in percent, 0 to 100, not {budget:g}")
    if key is not None and tracker is None:
        raise AgqError("--key names a board of a tracker: give --tracker HOST:PORT, too")


def _joined(rows: tuple[int, ...]) -> str:
    return ",".join(map(str, rows)) or "none"


def _positions(checkpoint: Checkpoint) -> int:
    return min(POSITIONS, cache_length(checkpoint, None))


def _profile(
    source: Checkpoint,
    device: Device,
    tracker: str | None,
    key: str | None,
    rows: tuple[int, ...],
    budget: float,
    effort: "Effort | None",
    cache: str,
) -> Profile:
    from agq_tvm.flow.profile_forms import forms_of

    load = os.getloadavg()[0] if tracker is None else None
    forms, own = forms_of(source, device.instruction_set, cache)
    emulated, times = _timed(lambda: _decoders(source, device, forms, rows), device, tracker, key, effort)
    gc.collect()  # of a board's session, which ends with the last thing that came from there
    return Profile(
        device=device.name,
        instruction_set=device.instruction_set,
        threads=device.threads,
        board=None if tracker is None else key or device.name,
        emulated=emulated,
        load=load,
        family=source.config.family,
        layers=source.config.num_layers,
        activation=source.scheme.activation,
        group_size=source.scheme.group_size,
        head_bits=source.scheme.head_bits,
        cache=cache,
        positions=_positions(source),
        forms=tuple(form.name for form in forms),
        own=own,
        operations=times,
        proposal=_proposal(source, times, emulated, budget),
    )


def _decoders(
    source: Checkpoint, device: Device, forms: tuple["Form", ...], rows: tuple[int, ...]
) -> list["DecoderOperations"]:
    """Return the operations for each number of rows, with the schedules that compiling would choose."""
    from agq_tvm.flow.profile_operations import DecoderOperations
    from agq_tvm.flow.schedules import Chooser
    from agq_tvm.kernels.record_library import open_library
    from agq_tvm.tvm_seam import Target

    library, context = open_library(device.name), cache_length(source, None)

    def choose(form: "Form") -> Chooser:
        return Chooser(library, form.isa, device.threads)

    with Target(device.tvm_target()):
        return [DecoderOperations(source, forms, count, context, _positions(source) - count, choose) for count in rows]


def _timed(
    decoders: Callable[[], list["DecoderOperations"]],
    device: Device,
    tracker: str | None,
    key: str | None,
    effort: "Effort | None",
) -> tuple[bool, dict[int, tuple[OperationTimes, ...]]]:
    """Return whether the board is emulated, and by rows the times of all operations."""
    from agq_tvm.flow.profile_kernels import ONCE, Effort, time_kernels

    place, emulated = _open(device, tracker, key)
    effort = ONCE if emulated else effort or Effort(cold_bytes=_cold_bytes(tracker is None))
    where = "this machine" if tracker is None else f"{'the emulated ' if emulated else ''}board {key or device.name}"
    times: dict[int, tuple[OperationTimes, ...]] = {}
    for decoder in decoders():
        say(f"timing {len(decoder.kernels)} kernels of {decoder.rows} rows on {where}")
        with Threads(device.threads).running() if tracker is None else nullcontext():
            timings = time_kernels(decoder.kernels.values(), place, effort)
        times[decoder.rows] = _times(decoder, emulated, timings)
    place.forget()
    return emulated, times


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


def _times(decoder: "DecoderOperations", emulated: bool, timings: dict[str, "Timing"]) -> tuple[OperationTimes, ...]:
    def seconds(kernels: Mapping[str, int]) -> float:
        return max(0.0, sum(times * timings[name].seconds for name, times in kernels.items()))

    def spread(kernels: Mapping[str, int]) -> float:
        return sum(abs(times) * timings[name].spread for name, times in kernels.items())

    times = []
    for each in decoder.operations:
        kernels = {} if emulated else each.kernels
        by_form = ({form: value(runs) for form, runs in kernels.items()} for value in (seconds, spread))
        times.append(OperationTimes(each.name, each.section, each.kind, *by_form))
    return tuple(times)


def _proposal(
    source: Checkpoint, times: dict[int, tuple[OperationTimes, ...]], emulated: bool, budget: float
) -> Proposal:
    if emulated:
        return none(budget, "the board is emulated: its time means nothing", {})
    saved, scheme = savings(times), source.scheme
    if scheme.activation == "static":
        return none(budget, "static scales were calibrated for 8 bits: 4 bits need a calibration of their own", saved)
    if scheme.activation == "none" or scheme.mixed_bits or scheme.weight_bits == 8:
        reason = "they are for 4-bit weights and 8-bit activations, and this checkpoint has others"
        return none(budget, reason, saved)
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
