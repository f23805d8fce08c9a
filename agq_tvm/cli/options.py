"""What several commands share: options, how they are read, and how results are printed."""

import argparse
import json

from agq_tvm.tables import as_table


def command(subparsers, name: str, text: str, run) -> argparse.ArgumentParser:
    """Add a command that calls ``run(args)``."""
    parser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def json_option(parser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def threads_option(parser) -> None:
    """Add ``--threads``."""
    parser.add_argument("--threads", type=positive, metavar="N", help="of a bundle (default: those of its device)")


def board_options(parser) -> None:
    """Add ``--tracker`` and ``--key``, for commands that run a bundle."""
    parser.add_argument("--tracker", metavar="HOST:PORT", help="run the bundle on a board that is registered there")
    parser.add_argument("--key", help="what the board is registered as (default: the name of the bundle's device)")


def positive(text: str) -> int:
    """Read an integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def seconds(text: str) -> float:
    """Read seconds: 0 or more, and not for ever."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time: give seconds, 0 or more")
    return value


def some_seconds(text: str) -> float:
    """Read seconds, more than 0."""
    value = seconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is no time: give seconds, more than 0")
    return value


def numbers(text: str) -> tuple[int, ...]:
    """Read numbers between commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 8,16,24") from None


def names(text: str) -> tuple[str, ...]:
    """Read names between commas."""
    return tuple(filter(None, text.split(",")))


def print_result(args, value: dict, rows: list[tuple[str, str]]) -> None:
    """Print a result as one JSON object, or as a table."""
    if args.json:
        print(json.dumps(value))
    else:
        print(as_table(rows))


def with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + (" (one window: no error)" if error is None else f" ± {error:.{digits}f}")
