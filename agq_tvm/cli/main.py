"""The command `agq`: parses, calls, prints."""

import argparse
import os
import select
import sys

from agq_tvm import __version__, interrupt
from agq_tvm.cli import boards, commands, doctor, tune
from agq_tvm.errors import AgqError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="agq",
        description="4-bit LLMs on the edge: quantize a model, compile it for a device, run it.",
        epilog="Begin with `agq quickstart`. Progress goes to standard error, results to standard output.",
    )
    parser.add_argument("--version", action="version", version=f"agq {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands.register(subparsers)
    tune.register(subparsers)
    boards.register(subparsers)
    doctor.register(subparsers)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 after one sentence about what is wrong."""
    args = build_parser().parse_args(arguments)
    interrupt.watch()
    try:
        with interrupt.kept():
            code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _output_has_gone():
            raise
        return 141  # as a shell says of what SIGPIPE ended
    except AgqError as error:
        _say_why(str(error))
        return 2
    except KeyboardInterrupt:
        _say_why("interrupted")
        return 130
    except MemoryError:
        _say_why("out of memory: take a smaller model or a shorter --context")
        return 2


def _say_why(text: str) -> None:
    from agq_tvm.progress import say_why  # not every command shows progress

    say_why(text)


def _output_has_gone() -> bool:
    """Tell whether nobody reads standard output any more, as after `| head`; if so, what remains goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors and hang-ups are always told
    gone = bool(poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


if __name__ == "__main__":
    sys.exit(main())
