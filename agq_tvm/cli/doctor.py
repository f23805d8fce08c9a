"""`agq doctor` and `agq tracker`."""

import argparse
import json

from agq_tvm.cli.options import command, json_option

_LOOPBACK = "127.0.0.1"


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add both commands."""
    _doctor(subparsers)
    _tracker(subparsers)


def _doctor(subparsers) -> None:
    def run(args) -> int:
        from agq_tvm.flow.doctor import diagnose, summary_of

        checks = []
        for check in diagnose(args.tracker, args.key, args.target):
            checks.append(check)
            if not args.json:
                print(f"{check.state:8}{check.name}: {check.found}", flush=True)
                if check.state == "wrong":
                    print(f"        {'do:':>4} {check.advice}", flush=True)
        result = summary_of(checks)
        if args.json:
            print(json.dumps(result))
        else:
            wrong = sum(check.state == "wrong" for check in checks)
            verb = "is" if wrong == 1 else "are"
            print(f"{wrong} of {len(checks)} {verb} wrong" if wrong else "nothing is wrong")
        return 0 if result["ok"] else 2

    parser = command(subparsers, "doctor", "look for what is wrong, here and on the way to boards", run)
    parser.add_argument("--tracker", metavar="HOST:PORT", help="look at the way to its boards, too")
    parser.add_argument("--key", metavar="KEY", help="what the boards are registered as")
    parser.add_argument(
        "--target", metavar="NAME", help="the device that they should be (default: the key, if it is one)"
    )
    json_option(parser)


def _tracker(subparsers) -> None:
    def run(args) -> int:
        from agq_tvm.boards.tracker_command import run_tracker

        return run_tracker(args.host, args.port)

    parser = command(subparsers, "tracker", "run a tracker, where boards register and clients find them", run)
    parser.add_argument(
        "--host", default=_LOOPBACK, help="address to listen on (default: %(default)s, which only this machine reaches)"
    )
    parser.add_argument(
        "--port", type=_port, default=9190, metavar="N", help="default: %(default)s; 0: any that is free"
    )


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"{text} is not a port")
    return value
