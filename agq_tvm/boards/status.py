"""What a board tells of itself: memory, disk, clock, temperature; and whether code for a device runs there."""

import json
from typing import TYPE_CHECKING

from agq_tvm.boards.tracker import board_features
from agq_tvm.targets import Device, detect

if TYPE_CHECKING:
    from tvm.rpc import RPCSession


def board_status(session: "RPCSession") -> dict | None:
    """Return what a board says of itself now, None if its server cannot tell.

    Parameters
    ----------
    session : RPCSession
        An open session with the board server of this package.

    Returns
    -------
    dict
        ``time`` (seconds since 1970, by the board's clock), ``memory_bytes`` and ``memory_free_bytes``,
        ``disk_bytes`` and ``disk_free_bytes`` of the folder of its sessions, ``load`` (processes that wait for a
        processor, in the last minute), ``kilohertz`` (now, by processor) and ``millidegrees`` (by thermal zone); what
        it cannot tell is left out.
    """
    try:
        status = json.loads(str(session.get_function("agq.board.status")()))
    except (AttributeError, RuntimeError, ValueError):
        return None
    return status if isinstance(status, dict) else None


def unfit(session: "RPCSession", device: Device) -> str | None:
    """Say why a board cannot run what is compiled for a device; None if it can, or its server cannot tell."""
    features = board_features(session)
    if features is None:
        return None
    machine = "aarch64" if "asimd" in features else "x86_64"
    missing = detect.missing_features(device, features, machine)
    if not missing:
        return None
    if missing == [device.machine]:
        return f"is a board of another architecture: code for {device.name} does not run there"
    return f"lacks {', '.join(missing)}, which code for {device.name} needs"
