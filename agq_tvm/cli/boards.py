"""`agq boards`: the boards that models run on."""

import argparse

from agq_tvm.boards.commands import add_arguments


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the parser of `agq`."""
    add_arguments(subparsers.add_parser("boards", help="start, list and stop boards"))
