"""Running TVM's tracker in the foreground."""

import ipaddress
import signal
import time

from agq_tvm.boards import emulate, processes
from agq_tvm.errors import AgqError
from agq_tvm.progress import say


def run_tracker(host: str, port: int) -> int:
    """Run a tracker until it is told to end, or ends; return the exit code.

    Parameters
    ----------
    host : str
        Address to listen on.
    port : int
        0 for any that is free.

    Raises
    ------
    AgqError
        If it does not come up, for example because the port is taken, or ends by itself.
    """
    signal.signal(signal.SIGTERM, _stop)  # an end as Ctrl-C makes it: what was started ends, too
    if not _is_loopback(host):
        place = f"{host}:{port}" if port else host
        say(
            f"WARNING: whoever reaches {place} runs code here and on every board: neither tracker nor boards ask "
            "for a password. Listen on 127.0.0.1 and let boards come through ssh -R, or close the network to others."
        )
    tracker = emulate.start_tracker(host, port)
    try:
        print(f"tracker at {tracker.tracker}", flush=True)
        # What listens everywhere is reached by other machines under an address that only they know.
        reached = f"ADDRESS:{tracker.tracker.rpartition(':')[2]}" if host in emulate.EVERYWHERE else tracker.tracker
        where = ", ADDRESS being this machine's" if reached != tracker.tracker else ""
        print(f"  boards register with   board-server --key KEY --tracker {reached}{where}", flush=True)
        print(f"  look at them with      agq doctor --tracker {tracker.tracker}", flush=True)
        while tracker.alive():
            time.sleep(0.2)
        raise AgqError(f"the tracker at {tracker.tracker} ended: {processes.last_line(tracker.log)}")
    except _Stopped:
        return 0
    finally:
        processes.stop(tracker)


class _Stopped(Exception):
    """The process was told to end."""


def _stop(_number, _frame) -> None:
    raise _Stopped


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
