"""`agq bench`: how fast a bundle is, here or on a board, and what of two is faster."""

import argparse
import json
from pathlib import Path

from agq_tvm.cli.options import board_options, command, json_option, positive, threads_option
from agq_tvm.errors import AgqError

_BESIDE = "beside the JSON"


def register(subparsers) -> None:
    """Add the command."""
    parser = command(
        subparsers, "bench", "time prefill, decode and every kernel of a bundle, or compare two results", _run
    )
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE")
    parser.add_argument(
        "--prefill", type=positive, default=512, metavar="N", help="default: %(default)s tokens (pp512)"
    )
    parser.add_argument("--decode", type=positive, default=64, metavar="N", help="default: %(default)s tokens (tg64)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="default: %(default)s")
    threads_option(parser)
    board_options(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the result there, too, as JSON")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument(
        "--picture",
        nargs="?",
        const=_BESIDE,
        metavar="FILE",
        help="draw speeds and kernels (default FILE: that of -o, with .png at its end)",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A.json", "B.json"),
        help="print how much faster B is than A, two results of -o for one model and device",
    )
    json_option(parser)


def _run(args: argparse.Namespace) -> None:
    if (args.bundle is None) == (args.compare is None):
        raise AgqError("give a BUNDLE to time, or --compare A.json B.json")
    if args.json and args.markdown:
        raise AgqError("--json and --markdown are two ways to print: choose one")
    if args.compare is None:
        _bench(args)
    else:
        _compare(args)


def _bench(args: argparse.Namespace) -> None:
    from agq_tvm.files import check_writable, write_json
    from agq_tvm.flow.analyze import need_matplotlib
    from agq_tvm.flow.bench_report import as_markdown, as_text
    from agq_tvm.progress import say
    from agq_tvm.runtime.bench import bench

    picture = _picture(args)
    if picture is not None:
        need_matplotlib()
    for path in (args.output, picture):
        if path is not None:
            check_writable(path)
    result = bench(args.bundle, args.threads, args.prefill, args.decode, args.rounds, args.tracker, args.key)
    if args.output is not None:
        write_json(args.output, result)
    if picture is not None and result["emulated"]:
        say(f"no {picture}: the board is emulated, its time means nothing")
    elif picture is not None:
        from agq_tvm.flow.bench_picture import draw

        draw(result, picture)
    print(json.dumps(result) if args.json else as_markdown(result) if args.markdown else as_text(result))


def _picture(args: argparse.Namespace) -> Path | None:
    if args.picture != _BESIDE:
        return None if args.picture is None else Path(args.picture)
    if args.output is None:
        raise AgqError("--picture lies beside the JSON: give -o FILE, or name the picture")
    return args.output.with_suffix(".png")


def _compare(args: argparse.Namespace) -> None:
    from agq_tvm.flow.bench_compare import as_table, compare, read_result

    given = [name for name in ("output", "picture", "tracker", "key", "threads") if getattr(args, name) is not None]
    if given:
        raise AgqError(f"--compare times nothing and takes no --{given[0]}: leave it out")
    found = compare(*(read_result(path) for path in args.compare))
    print(json.dumps(found) if args.json else as_table(found, args.markdown))
