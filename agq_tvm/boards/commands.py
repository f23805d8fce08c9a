"""What the `agq boards` commands do."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from agq_tvm.targets import load_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands of `agq boards`; each sets ``run`` to a function of the arguments."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    emulate = commands.add_parser("emulate", help="boards under QEMU on this machine, without hardware")
    actions = emulate.add_subparsers(title="commands", required=True, metavar="COMMAND")

    start = actions.add_parser("start", help="start an emulated board (and a tracker, if there is none)")
    start.add_argument("device", metavar="DEVICE", help="for example raspberry-pi-4")
    start.add_argument("--tracker", metavar="HOST:PORT", help="register there (default: a tracker of our own)")
    start.add_argument("--key", help="what to register as (default: the device's name)")
    start.set_defaults(run=start_command)

    listing = actions.add_parser("list", help="list the emulated boards and trackers that run")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=list_command)

    stop = actions.add_parser("stop", help="stop emulated boards and trackers")
    stop.add_argument("name", metavar="NAME|all", help="a name from the list, or all")
    stop.set_defaults(run=stop_command)

    server = commands.add_parser("server", help="write the folder that a real board needs to be registered")
    server.add_argument("device", metavar="DEVICE", help="for example raspberry-pi-4")
    server.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    server.set_defaults(run=server_command)


def start_command(arguments: argparse.Namespace) -> int:
    """Start an emulated board; with it a tracker, unless one is named or already runs."""
    from agq_tvm.boards import emulate

    device = load_device(arguments.device)
    emulate.find_emulator()
    tracker, own = arguments.tracker, None
    if tracker is None:
        running = next((process for process in emulate.list_boards() if process.kind == "tracker"), None)
        own = None if running else emulate.start_tracker()
        tracker = (running or own).tracker
    try:
        board = emulate.start_board(device, tracker, arguments.key)
    except BaseException:
        if own:
            emulate.stop_board(own.name)
        raise
    print(f"{board.name}: an emulated {device.emulator} is registered")
    print(f"  use it with   --tracker {board.tracker} --key {board.key}")
    print(f"  its log       {board.log}")
    print(f"  stop it with  agq boards emulate stop {board.name}")
    return 0


def list_command(arguments: argparse.Namespace) -> int:
    """Print the emulated boards and trackers that run."""
    from agq_tvm.boards import emulate

    running = emulate.list_boards()
    registered = {process.name: process.kind == "tracker" or emulate.is_registered(process) for process in running}
    if arguments.json:
        print(json.dumps([asdict(process) | {"registered": registered[process.name]} for process in running], indent=1))
        return 0
    if not running:
        print("no emulated board runs: start one with `agq boards emulate start raspberry-pi-4`")
        return 0
    rows = [("NAME", "DEVICE", "TRACKER", "KEY", "PROCESS", "STATE")]
    for process in running:
        state = "runs" if process.kind == "tracker" else "registered" if registered[process.name] else "not registered"
        row = (
            process.name,
            process.device or "-",
            process.tracker,
            process.key or "-",
            str(process.pid),
            state,
        )
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def stop_command(arguments: argparse.Namespace) -> int:
    """Stop one emulated board or tracker, or all."""
    from agq_tvm.boards import emulate

    stopped = emulate.stop_board(arguments.name)
    print("stopped " + ", ".join(process.name for process in stopped) if stopped else "nothing was running")
    return 0


def server_command(arguments: argparse.Namespace) -> int:
    """Write the board server and its libraries for a device."""
    from agq_tvm.boards.server_build import SERVER, copy_server

    device = load_device(arguments.device)
    copy_server(device, arguments.output)
    print(f"{arguments.output}: the board server for {device.machine}; copy the folder to the board, run there")
    print(f"  ./{SERVER} --key {device.name} --tracker HOST:PORT")
    print("It listens on 127.0.0.1 unless --host says otherwise: whoever reaches its port owns the board.")
    return 0
