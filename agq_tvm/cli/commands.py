"""The commands that make and run models: each parses its options, calls one function, prints what it returns."""

import json
import sys

from agq_tvm.cli import bench, look, quantize
from agq_tvm.cli.options import board_options, command, json_option, positive, print_result, threads_option, with_error
from agq_tvm.tables import megabytes

_DATA_HELP = (
    "a text file; a shipped text: calibration, persuasion, jargon; or a data set: wikitext2, c4, ptb, from the "
    "directory that AGQ_DATA names (wiki.test.raw, ptb.test.txt, the hub's files, or wikitext2/test*.jsonl and so on) "
    "or else from the Hugging Face hub"
)


def register(subparsers) -> None:
    """Add the commands, in the order in which they are used."""
    _quickstart(subparsers)
    quantize.register(subparsers)
    _compile(subparsers)
    _generate(subparsers)
    _eval(subparsers)
    _lm_eval(subparsers)
    look.analyze(subparsers)
    look.prune_search(subparsers)
    look.profile(subparsers)
    bench.register(subparsers)
    look.targets(subparsers)
    look.kernels(subparsers)


def _quickstart(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.flow.quickstart import quickstart, report

        result = quickstart(args.model, args.output, args.prompt)
        print(json.dumps(result) if args.json else report(result))

    parser = command(
        subparsers, "quickstart", "do the whole job: quantize, compile, measure, generate, cross-compile", run
    )
    parser.add_argument(
        "model",
        nargs="?",
        default="smollm2-135m-instruct",
        help="directory, GGUF file, hub id, or the default, which comes from the package registry",
    )
    parser.add_argument("-o", "--output", default="agq-quickstart", help="default: %(default)s")
    parser.add_argument("--prompt", default="Photosynthesis is the process by which plants")
    json_option(parser)


def _compile(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.flow.compile import compile_checkpoint
        from agq_tvm.flow.schedules import summary

        result = compile_checkpoint(
            args.checkpoint, args.target, args.output, args.context, args.debug_dump, args.cache, args.library
        )
        rows = [
            ("bundle", args.output),
            ("device", result["device"]),
            ("kernels", result["instruction_set"]),
            ("schedules", summary(result["schedules"])),
            ("context", str(result["context"])),
            ("size", megabytes(result["bytes"])),
            ("time", f"{result['seconds']:.1f} s"),
        ]
        print_result(args, result, rows)

    parser = command(subparsers, "compile", "compile a checkpoint for a device", run)
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("--target", required=True, metavar="NAME", help="see `agq targets`; host is this machine")
    parser.add_argument("-o", "--output", required=True, metavar="BUNDLE", help="directory to write")
    parser.add_argument("--context", type=int, metavar="N", help="longest sequence (default: 2048 or the model's)")
    parser.add_argument(
        "--cache",
        choices=("float16", "int8"),
        default="float16",
        help="what keys and values are stored as (default: %(default)s)",
    )
    parser.add_argument("--library", metavar="DIR", help="tuned schedules (default: your own library)")
    parser.add_argument("--debug-dump", metavar="DIR", help="write the module after each phase")
    json_option(parser)


def _generate(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.runtime.generate import generate

        def show(piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        shown = None if args.json else show
        result = generate(args.bundle, args.prompt, args.max_tokens, args.threads, shown, args.tracker, args.key)
        show(json.dumps(result) + "\n" if args.json else "\n")

    parser = command(subparsers, "generate", "continue a text", run)
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-tokens", type=positive, default=64, metavar="N", help="default: %(default)s")
    threads_option(parser)
    board_options(parser)
    json_option(parser)


def _eval(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.flow.evaluate_bundle import evaluate

        settings = (args.window, args.max_tokens, args.protocol, args.prune_selection, args.threads)
        result = evaluate(args.model, args.data, *settings, args.tracker, args.key)
        chosen = f", tokens chosen by {result['selection']}" if result["selection"] else ""
        scored = f"{result['tokens']} scored, windows of {result['window']}, protocol {result['protocol']}{chosen}"
        rows = [
            ("perplexity", with_error(result["perplexity"], result["perplexity_stderr"], 4)),
            ("nll", with_error(result["nll"], result["nll_stderr"], 5) + " per token"),
            ("tokens", scored),
            ("text", f"{result['text']} (sha256 {result['text_sha256'][:12]})"),
        ]
        print_result(args, result, rows)

    parser = command(subparsers, "eval", "measure perplexity on a text", run)
    parser.add_argument("model", metavar="BUNDLE|CKPT|MODEL")
    parser.add_argument("--data", required=True, metavar="FILE", help=_DATA_HELP)
    parser.add_argument("--window", type=positive, default=512, metavar="N", help="default: %(default)s tokens")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="only the beginning of the text")
    parser.add_argument(
        "--protocol",
        choices=("suffix", "paper-protocol"),
        help="what is scored: the last quarter of each window, before which tokens may be pruned (the default for "
        "models that prune; others score every token), or only what follows survivors of pruning",
    )
    parser.add_argument(
        "--prune-selection",
        choices=("chunk", "prompt"),
        help="choose the tokens that stay in each chunk of a prompt, as compiled (the default), or in all of it",
    )
    threads_option(parser)
    board_options(parser)
    json_option(parser)


def _lm_eval(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.flow.harness import run_tasks

        result = run_tasks(args.model, args.tasks.split(","), args.limit, args.examples, args.threads)
        rows = [("TASK", "DOCUMENTS", "METRIC", "VALUE")]
        for task, found in result["tasks"].items():
            for metric, (value, error) in found["metrics"].items():
                shown = f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
                rows.append((task, str(found["documents"] or "-"), metric, shown))
        print_result(args, result, rows)

    parser = command(subparsers, "lm-eval", "run tasks of the lm-eval harness", run)
    parser.add_argument("model", metavar="BUNDLE|CKPT|MODEL")
    parser.add_argument("--tasks", required=True, metavar="T,T,…", help="names that lm-eval knows, or YAML files")
    parser.add_argument("--limit", type=positive, metavar="N", help="only so many documents of each task")
    parser.add_argument("--examples", type=int, metavar="N", help="solved ones before each (default: the task's own)")
    threads_option(parser)
    json_option(parser)
