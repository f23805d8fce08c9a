"""The commands that work on models: each parses its options, calls one function, and prints what it returns."""

import argparse
import json
import sys

from agq_tvm.errors import AgqError
from agq_tvm.tables import as_table, megabytes


def register(subparsers) -> None:
    """Add the commands, in the order in which they are used."""
    _quickstart(subparsers)
    _quantize(subparsers)
    _compile(subparsers)
    _generate(subparsers)
    _eval(subparsers)
    _analyze(subparsers)
    _bench(subparsers)
    _targets(subparsers)
    _kernels(subparsers)


def _command(subparsers, name: str, text: str, run) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _json_option(parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _threads_option(parser) -> None:
    parser.add_argument("--threads", type=_positive, metavar="N", help="default: those of the device")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 8,16,24") from None


def _print(args, value: dict, rows: list[tuple[str, str]]) -> None:
    if args.json:
        print(json.dumps(value))
    else:
        print(as_table(rows))


def _quickstart(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.flow.quickstart import quickstart, report

        result = quickstart(args.model, args.output, args.prompt)
        print(json.dumps(result) if args.json else report(result))

    parser = _command(
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
    _json_option(parser)


def _quantize(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.flow.quantize import Calibration, quantize

        result = quantize(
            args.model,
            args.output,
            method=args.method,
            group_size=args.group_size,
            symmetric=args.symmetric,
            activation=args.activation,
            max_refine=args.max_refine,
            four_bit=tuple(filter(None, args.four_bit.split(","))),
            calibration=Calibration(args.calibration),
            pruning=_pruning(args),
            attention=args.attention,
            mixed_bits=args.activation_bits,
            fold=args.fold,
        )
        rows = [
            ("checkpoint", args.output),
            ("method", result["method"]),
            (
                "weights",
                f"4 bit, groups of {result['group_size']}, {result['bits_per_weight']:.2f} bit stored"
                + (", norms folded in" if result["fold"] else ""),
            ),
            ("activations", _activations(result)),
            ("attention", result["attention"]),
            ("pruning", _pruning_text(result["pruning"])),
            ("weight error", f"{result['relative_weight_error']:.4f}"),
            ("size", megabytes(result["bytes"])),
            ("time", f"{result['seconds']:.1f} s"),
        ]
        _print(args, result, rows)

    parser = _command(subparsers, "quantize", "make a 4-bit checkpoint of a model", run)
    parser.add_argument("model", metavar="MODEL", help="directory, GGUF file or hub id")
    parser.add_argument("-o", "--output", required=True, metavar="CKPT", help="directory to write")
    parser.add_argument(
        "--method",
        choices=("gptq", "rtn", "keep"),
        help="default: keep a model that is 4 bit already as it is, else gptq",
    )
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128), help="weights that share a scale")
    parser.add_argument("--symmetric", action="store_true", help="no group offsets: smaller, less exact")
    parser.add_argument(
        "--activation",
        choices=("per-token-group", "per-token", "static", "none"),
        default="per-token-group",
        help="scales of activations (default: %(default)s); none keeps them float",
    )
    parser.add_argument(
        "--max-refine",
        type=int,
        default=0,
        metavar="K",
        help="TRIP: divide groups of channels by up to 2^K before rounding (per-token, static; default: %(default)s)",
    )
    parser.add_argument(
        "--four-bit",
        default="",
        metavar="LINEARS",
        help="linears whose inputs get 4 bits instead of 8, e.g. o,gate_up,down (default: none)",
    )
    parser.add_argument(
        "--activation-bits",
        type=float,
        default=0,
        metavar="BITS",
        help="4 to 7 bits for each channel, on average at most this many, scales included, e.g. 5.0 "
        "(default: 8, and 4 where --four-bit says so, scales not included)",
    )
    parser.add_argument(
        "--fold", action="store_true", help="first move powers of two from the norms into the weights (not with keep)"
    )
    parser.add_argument(
        "--attention",
        choices=("float", "log2", "log2-paper"),
        default="float",
        help="log2 rounds probabilities to 15 powers of two and zero, log2-paper to 16 and zero as Agile-Quant does; "
        "both cache 8-bit values (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration", default="calibration", metavar="TEXT", help="a text file (default: a shipped one)"
    )
    parser.add_argument(
        "--prune-layers",
        type=_numbers,
        metavar="L,L,…",
        help="layers, counted from 1, after whose attention tokens of the prompt are dropped",
    )
    parser.add_argument("--prune-beta", type=float, metavar="SHARE", help="share of the tokens that is gone at the end")
    _json_option(parser)


def _pruning(args):
    """Return the schedule that the options of pruning ask for, which need each other; None without them."""
    from agq_tvm.quantize.pruning import PruningSchedule

    if (args.prune_layers is None) != (args.prune_beta is None):
        raise AgqError("pruning takes both --prune-layers and --prune-beta: give the other one, too")
    return None if args.prune_layers is None else PruningSchedule(args.prune_layers, args.prune_beta)


def _pruning_text(pruning: dict | None) -> str:
    if pruning is None:
        return "none"
    return f"{pruning['beta']:.0%} of a prompt's tokens, in layers {', '.join(map(str, pruning['layers']))}"


def _activations(result: dict) -> str:
    """Say in words how activations are quantized."""
    if result["activation"] == "none":
        return "float"
    if result["mixed_bits"]:
        return f"4 to 7 bit, {result['activation_bits']:.3f} on average with scales and zero points"
    refined = f", TRIP up to 2^{result['max_refine']}" if result["max_refine"] else ""
    four_bit = f", 4 bit at the inputs of {', '.join(result['four_bit'])}" if result["four_bit"] else ""
    return f"8 bit, {result['activation']}{refined}{four_bit}"


def _compile(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.flow.compile import compile_checkpoint

        result = compile_checkpoint(args.checkpoint, args.target, args.output, args.context, args.debug_dump)
        rows = [
            ("bundle", args.output),
            ("device", result["device"]),
            ("kernels", result["instruction_set"]),
            ("context", str(result["context"])),
            ("size", megabytes(result["bytes"])),
            ("time", f"{result['seconds']:.1f} s"),
        ]
        _print(args, result, rows)

    parser = _command(subparsers, "compile", "compile a checkpoint for a device", run)
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("--target", required=True, metavar="NAME", help="see `agq targets`; host is this machine")
    parser.add_argument("-o", "--output", required=True, metavar="BUNDLE", help="directory to write")
    parser.add_argument("--context", type=int, metavar="N", help="longest sequence (default: 2048 or the model's)")
    parser.add_argument("--debug-dump", metavar="DIR", help="write the module after each phase")
    _json_option(parser)


def _generate(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.runtime.generate import generate

        def show(piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        if args.json:
            print(json.dumps(generate(args.bundle, args.prompt, args.max_tokens, args.threads)))
        else:
            generate(args.bundle, args.prompt, args.max_tokens, args.threads, show)
            show("\n")

    parser = _command(subparsers, "generate", "continue a text", run)
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-tokens", type=_positive, default=64, metavar="N", help="default: %(default)s")
    _threads_option(parser)
    _json_option(parser)


def _eval(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.flow.evaluate_bundle import evaluate

        result = evaluate(args.model, args.data, args.window, args.max_tokens, args.protocol)
        rows = [
            ("perplexity", f"{result['perplexity']:.4f}"),
            ("nll", f"{result['nll']:.5f} ± {result['nll_stderr']:.5f} per token"),
            ("tokens", f"{result['tokens']} scored, windows of {result['window']}, protocol {result['protocol']}"),
            ("text", f"{args.data} (sha256 {result['text_sha256'][:12]})"),
        ]
        _print(args, result, rows)

    parser = _command(subparsers, "eval", "measure perplexity on a text", run)
    parser.add_argument("model", metavar="BUNDLE|CKPT|MODEL")
    parser.add_argument("--data", required=True, metavar="FILE", help="a text, or: calibration, persuasion, jargon")
    parser.add_argument("--window", type=_positive, default=512, metavar="N", help="default: %(default)s tokens")
    parser.add_argument("--max-tokens", type=_positive, metavar="N", help="only the beginning of the text")
    parser.add_argument(
        "--protocol",
        choices=("suffix", "paper-protocol"),
        help="what is scored: the last quarter of each window, before which tokens may be pruned (the default for "
        "models that prune; others score every token), or only what follows survivors of pruning",
    )
    _json_option(parser)


def _analyze(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.flow.analyze import analyze

        result = analyze(args.model, args.output, args.data)
        rows = [("INPUT OF", "LARGEST / MEDIAN", "WITHOUT FIRST TOKEN", "LAYER", "CHANNEL", "OUTLIER CHANNELS")]
        for name, most in result["inputs"].items():
            ratios = (most["ratio"], most["ratio_without_first_token"])
            numbers = (most["layer"], most["channel"], most["outlier_channels"])
            rows.append((name, *("-" if ratio is None else f"{ratio:.1f}" for ratio in ratios), *map(str, numbers)))
        _print(args, result, rows)
        if not args.json:
            start = result["attention_to_start"]
            print(
                f"\nattention to the first token: {start['mean']:.3f} on average, {start['layer_mean']:.3f} in layer "
                f"{start['layer']}; evenly spread attention gives it {start['uniform']:.3f}"
                f"\n\n{args.output}: {', '.join(result['files'])}"
            )

    parser = _command(subparsers, "analyze", "draw outlier channels and attention to the first token", run)
    parser.add_argument("model", metavar="CKPT|MODEL")
    parser.add_argument("-o", "--output", default="agq-analysis", metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--data",
        default="calibration",
        metavar="TEXT",
        help="a text file, at least 512 tokens (default: a shipped one)",
    )
    _json_option(parser)


def _bench(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.runtime.bench import bench

        result = bench(args.bundle, args.threads, args.prefill, args.decode, args.rounds)
        rows = [("device", f"{result['device']}, {result['threads']} threads")]
        for kind, short in (("prefill", "pp"), ("decode", "tg")):
            median, std = (result[f"{kind}_tokens_per_second{end}"] for end in ("", "_std"))
            rows.append((f"{short}{result[f'{kind}_tokens']}", f"{median:.1f} ± {std:.1f} tokens/s"))
        _print(args, result, [*rows, ("size", megabytes(result["bytes"]))])

    parser = _command(subparsers, "bench", "time prefill and decode", run)
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--prefill", type=_positive, default=512, metavar="N", help="default: %(default)s tokens")
    parser.add_argument("--decode", type=_positive, default=64, metavar="N", help="default: %(default)s tokens")
    parser.add_argument("--rounds", type=_positive, default=5, metavar="N", help="default: %(default)s")
    _threads_option(parser)
    _json_option(parser)


def _targets(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.targets import device_names, load_device

        devices = [load_device(name) for name in ("host", *device_names())]
        if args.json:
            names = ("name", "description", "instruction_set", "triple", "threads")
            values = [{name: getattr(device, name) for name in names} for device in devices]
            print(json.dumps({"host": values[0], "targets": values[1:]}))
            return
        rows = [(device.name, device.instruction_set, device.description) for device in devices[1:]]
        print(as_table([("TARGET", "KERNELS", "DEVICE"), *rows]))
        print(f"\nhost is {devices[0].name} with {devices[0].threads} threads")

    _json_option(_command(subparsers, "targets", "list the devices to compile for", run))


def _kernels(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.kernels.table import as_dicts

        rows = as_dicts()
        if args.json:
            print(json.dumps({"kernels": rows}))
            return
        header = tuple(name.upper().replace("_", " ") for name in rows[0])
        print(as_table([header, *(tuple(row.values()) for row in rows)]))

    _json_option(_command(subparsers, "kernels", "list the matrix-product kernels", run))
