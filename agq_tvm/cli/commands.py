"""The commands that work on models: each parses its options, calls one function, and prints what it returns."""

import argparse
import json
import sys

from agq_tvm.errors import AgqError
from agq_tvm.quantize.variants import VARIANTS, variant_settings
from agq_tvm.tables import as_table, megabytes


def register(subparsers) -> None:
    """Add the commands, in the order in which they are used."""
    _quickstart(subparsers)
    _quantize(subparsers)
    _compile(subparsers)
    _generate(subparsers)
    _eval(subparsers)
    _lm_eval(subparsers)
    _analyze(subparsers)
    _prune_search(subparsers)
    _profile(subparsers)
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


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


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

        names = (
            "method",
            "group_size",
            "symmetric",
            "weight_bits",
            "activation",
            "max_refine",
            "shifts",
            "four_bit",
            "attention",
            "mixed_bits",
            "fold",
        )
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        if args.bits_from:
            given["four_bit"] = _bits_from(args)
        settings = variant_settings(args.variant) | given
        calibration = Calibration(args.calibration, args.calibration_samples, args.calibration_length, args.seed)
        pruning = _pruning(args)
        result = quantize(args.model, args.output, calibration=calibration, pruning=pruning, **settings)
        rows = [
            ("checkpoint", args.output),
            ("method", result["method"]),
            (
                "weights",
                f"{result['weight_bits']} bit, group size {result['group_size']}, "
                f"{result['bits_per_weight']:.2f} bit stored" + (", norms folded in" if result["fold"] else ""),
            ),
            ("activations", _activations(result)),
            ("attention", result["attention"]),
            ("pruning", _pruning_text(result["pruning"])),
            ("calibration", _calibration_text(result["calibration"])),
            ("weight error", f"{result['relative_weight_error']:.4f}"),
            *_clipped(result["clipped"] or {}),
            ("size", megabytes(result["bytes"])),
            ("time", f"{result['seconds']:.1f} s"),
        ]
        _print(args, result, rows)

    parser = _command(subparsers, "quantize", "make a quantized checkpoint of a model", run)
    parser.add_argument("model", metavar="MODEL", help="directory, GGUF file or hub id")
    parser.add_argument("-o", "--output", required=True, metavar="CKPT", help="directory to write")
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help=f"settings that have a name: {', '.join(VARIANTS)}; options given beside it take precedence",
    )
    parser.add_argument(
        "--method",
        choices=("gptq", "rtn", "keep"),
        help="default: keep a model that is 4 bit already as it is, else gptq",
    )
    parser.add_argument(
        "--group-size",
        type=lambda text: int(text) if text.isdecimal() else text,
        choices=(32, 64, 128, "column"),
        help="weights that share a scale; column: all of an output column",
    )
    parser.add_argument("--symmetric", action="store_true", default=None, help="no group offsets: smaller, less exact")
    parser.add_argument("--weight-bits", type=int, choices=(4, 8), help="default: 4; 8 is rounded to nearest")
    parser.add_argument(
        "--activation",
        choices=("per-token-group", "per-token", "static", "none"),
        help="scales of activations (default: per-token-group); none keeps them float",
    )
    parser.add_argument(
        "--max-refine",
        type=int,
        metavar="K",
        help="TRIP: divide groups of channels by up to 2^K before rounding (per-token, static; default: 0)",
    )
    parser.add_argument(
        "--shifts",
        action="store_true",
        default=None,
        help="TRIP for channels, in integers only (needs --group-size column, --activation static, --max-refine)",
    )
    parser.add_argument(
        "--four-bit",
        type=_names,
        metavar="LINEARS",
        help="linears whose inputs get 4 bits instead of 8, e.g. o,gate_up,down (default: none)",
    )
    parser.add_argument("--bits-from", metavar="PROFILE", help="take them from what `agq profile` proposed")
    parser.add_argument(
        "--activation-bits",
        dest="mixed_bits",
        type=float,
        metavar="BITS",
        help="4 to 7 bits for each channel, on average at most this many, scales included, e.g. 5.0 "
        "(default: 8, and 4 where --four-bit says so, scales not included)",
    )
    parser.add_argument(
        "--fold",
        action="store_true",
        default=None,
        help="first move powers of two from the norms into the weights (not with keep)",
    )
    parser.add_argument(
        "--attention",
        choices=("float", "log2", "log2-paper"),
        help="log2 rounds probabilities to 15 powers of two and zero, log2-paper to 16 and zero as Agile-Quant does; "
        "both cache 8-bit values (default: float)",
    )
    parser.add_argument(
        "--calibration",
        default="calibration",
        metavar="TEXT",
        help="a text file, or wikitext2, c4 or ptb, see `agq eval --help` (default: a shipped one)",
    )
    parser.add_argument(
        "--calibration-samples", type=_positive, default=64, metavar="N", help="windows of it (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration-length", type=_positive, default=512, metavar="N", help="their tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="draw the windows at random (default: they are evenly spread)"
    )
    _pruning_options(parser)
    _json_option(parser)


def _pruning_options(parser) -> None:
    parser.add_argument(
        "--prune-layers",
        type=_numbers,
        metavar="L,L,…",
        help="layers, counted from 1, after whose attention tokens of the prompt are dropped",
    )
    parser.add_argument("--prune-beta", type=float, metavar="SHARE", help="share of the tokens that is gone at the end")
    parser.add_argument(
        "--prune-renumber",
        action="store_true",
        help="count the positions of tokens that are left anew (default: they keep theirs)",
    )


def _bits_from(args) -> tuple[str, ...]:
    """Return the linears that get 4-bit inputs as a profile proposes."""
    if args.four_bit:
        raise AgqError("--bits-from and --four-bit both name linears: give one of them")
    from agq_tvm.flow.profile import bits_from

    return bits_from(args.bits_from)


def _pruning(args):
    """Return the schedule that the options of pruning ask for, which need each other; None without them."""
    from agq_tvm.quantize.pruning import PruningSchedule

    if (args.prune_layers is None) != (args.prune_beta is None):
        raise AgqError("pruning takes both --prune-layers and --prune-beta: give the other one, too")
    if args.prune_layers is None:
        if args.prune_renumber:
            raise AgqError("--prune-renumber prunes nothing by itself: give --prune-layers and --prune-beta, too")
        return None
    return PruningSchedule(args.prune_layers, args.prune_beta, args.prune_renumber)


def _pruning_text(pruning: dict | None) -> str:
    if pruning is None:
        return "none"
    renumbered = ", positions counted anew" if pruning["renumber"] else ""
    return f"{pruning['beta']:.0%} of a prompt's tokens, in layers {', '.join(map(str, pruning['layers']))}{renumbered}"


def _clipped(shares: dict) -> list[tuple[str, str]]:
    """Say for the input of each linear how much of it static scales do not reach."""
    return [
        (f"clipped, {role}", f"{share['mean']:.4%} of all values, {share['largest']:.2%} of the worst channel's")
        for role, share in shares.items()
    ]


def _calibration_text(calibration: dict | None) -> str:
    if calibration is None:
        return "none"
    drawn = "evenly spread" if calibration["seed"] is None else f"seed {calibration['seed']}"
    size = f"{calibration['samples']} windows of {calibration['length']}, {drawn}"
    return f"{size}, of {calibration['text']} (sha256 {calibration['sha256'][:12]})"


def _activations(result: dict) -> str:
    """Say in words how activations are quantized."""
    if result["activation"] == "none":
        return "float"
    if result["mixed_bits"]:
        return f"4 to 7 bit, {result['activation_bits']:.3f} on average with scales and zero points"
    refined = f", TRIP up to 2^{result['max_refine']}" if result["max_refine"] else ""
    refined += " by shifts" if result["shifts"] else ""
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


_DATA_HELP = (
    "a text file; a shipped text: calibration, persuasion, jargon; or a data set: wikitext2, c4, ptb, from the "
    "directory that AGQ_DATA names (wiki.test.raw, ptb.test.txt, the hub's files, or wikitext2/test*.jsonl and so on) "
    "or else from the Hugging Face hub"
)


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + (" (one window: no error)" if error is None else f" ± {error:.{digits}f}")


def _eval(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.flow.evaluate_bundle import evaluate

        result = evaluate(args.model, args.data, args.window, args.max_tokens, args.protocol, args.prune_selection)
        rows = [
            ("perplexity", _with_error(result["perplexity"], result["perplexity_stderr"], 4)),
            ("nll", _with_error(result["nll"], result["nll_stderr"], 5) + " per token"),
            ("tokens", f"{result['tokens']} scored, windows of {result['window']}, protocol {result['protocol']}"),
            ("text", f"{result['text']} (sha256 {result['text_sha256'][:12]})"),
        ]
        _print(args, result, rows)

    parser = _command(subparsers, "eval", "measure perplexity on a text", run)
    parser.add_argument("model", metavar="BUNDLE|CKPT|MODEL")
    parser.add_argument("--data", required=True, metavar="FILE", help=_DATA_HELP)
    parser.add_argument("--window", type=_positive, default=512, metavar="N", help="default: %(default)s tokens")
    parser.add_argument("--max-tokens", type=_positive, metavar="N", help="only the beginning of the text")
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
    _json_option(parser)


def _lm_eval(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.flow.harness import run_tasks

        result = run_tasks(args.model, args.tasks.split(","), args.limit, args.examples, args.threads)
        rows = [("TASK", "DOCUMENTS", "METRIC", "VALUE")]
        for task, found in result["tasks"].items():
            for metric, (value, error) in found["metrics"].items():
                shown = f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
                rows.append((task, str(found["documents"] or "-"), metric, shown))
        _print(args, result, rows)

    parser = _command(subparsers, "lm-eval", "run tasks of the lm-eval harness", run)
    parser.add_argument("model", metavar="BUNDLE|CKPT|MODEL")
    parser.add_argument("--tasks", required=True, metavar="T,T,…", help="names that lm-eval knows, or YAML files")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only so many documents of each task")
    parser.add_argument("--examples", type=int, metavar="N", help="solved ones before each (default: the task's own)")
    _threads_option(parser)
    _json_option(parser)


def _analyze(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.flow.analyze import analyze

        result = analyze(args.model, args.output, args.data, _pruning(args))
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
            )
            if result["pruned"]:
                print(f"\n{_pruned_table(result['pruned'])}")
            print(f"\n{args.output}: {', '.join(result['files'])}")

    parser = _command(subparsers, "analyze", "draw outlier channels and attention, before and after pruning", run)
    parser.add_argument("model", metavar="CKPT|MODEL")
    parser.add_argument("-o", "--output", default="agq-analysis", metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--data",
        default="calibration",
        metavar="TEXT",
        help="a text file, at least 512 tokens (default: a shipped one)",
    )
    _pruning_options(parser)
    _json_option(parser)


def _pruned_table(pruned: dict) -> str:
    """Lay out what pruning did to the layers behind it."""
    rows = [("INPUT OF", "LARGEST |x|", "PRUNED", "OUTLIER CHANNELS A LAYER", "PRUNED")]
    for name, found in pruned["inputs"].items():
        rows.append((name, *(f"{value:.1f}" for values in found.values() for value in values)))
    start = pruned["attention_to_start"]["mean"]
    return f"{as_table(rows)}\n\npruned, attention to the first token is {start:.3f} on average"


def _prune_search(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.flow.prune_search import prune_search

        result = prune_search(args.model, args.speedup, args.data, args.window, args.target, args.measure)
        rows = [("LAYERS", "BETA", "SPARSITY", "PREDICTED", "PERPLEXITY", "± 1 SE", "WINDOWS")]
        for each in result["candidates"][:8]:
            change = (f"{100 * each[name]:+.2f} %" for name in ("perplexity_change", "perplexity_change_stderr"))
            shares = (f"{each['beta']:.3f}", f"{each['sparsity']:.3f}", f"{each['speedup_predicted']:.2f}x")
            rows.append((",".join(map(str, each["layers"])), *shares, *change, str(each["windows"])))
        _print(args, result, rows)
        if args.json:
            return
        if result["measured"]:
            dense, pruned, speedup = (result["measured"][name] for name in ("dense", "pruned", "speedup"))
            print(f"\nmeasured: {dense:.0f} tokens/s without pruning, {pruned:.0f} with the first: {speedup:.2f}x")
        print(
            f"\npredicted for prompts of {result['prompt_tokens']} tokens, from multiply-accumulates; perplexity of "
            f"the {args.window - result['prompt_tokens']} tokens after them\n\n{result['command']}"
            f"\nagq compile CKPT --target {args.target} -o BUNDLE"
        )

    text = "find the layers and the share of tokens to prune that cost least perplexity at a speed-up of prefill"
    parser = _command(subparsers, "prune-search", text, run)
    parser.add_argument("model", metavar="MODEL|CKPT")
    parser.add_argument("--speedup", type=float, required=True, metavar="X", help="wanted, e.g. 1.3")
    parser.add_argument("--target", default="host", metavar="NAME", help="what to compile for (default: %(default)s)")
    parser.add_argument("--data", default="calibration", metavar="TEXT", help="a text file (default: a shipped one)")
    parser.add_argument("--window", type=_positive, default=512, metavar="N", help="default: %(default)s tokens")
    parser.add_argument(
        "--measure", action="store_true", help="of a CKPT: compile it with the best schedule and without, and time both"
    )
    _json_option(parser)


def _profile(subparsers) -> None:
    def run(args) -> None:
        from agq_tvm.flow.profile import profile
        from agq_tvm.flow.profile_report import as_text

        options = {"rows": args.rows} if args.rows else {}
        result = profile(
            args.checkpoint, args.target, args.output, args.tracker, args.key, budget=args.budget, **options
        )
        print(json.dumps(result.as_dict()) if args.json else f"{as_text(result)}\n\n{args.output}")

    parser = _command(
        subparsers, "profile", "time a block's operations on a device, propose which inputs get 4 bits", run
    )
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("--target", required=True, metavar="NAME", help="see `agq targets`; host is this machine")
    parser.add_argument("-o", "--output", default="agq-profile", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--tracker", metavar="HOST:PORT", help="profile a board that is registered there")
    parser.add_argument("--key", help="what the board is registered as (default: the target's name)")
    parser.add_argument("--rows", type=_numbers, metavar="M,M,…", help="rows of activations (default: 1,128)")
    parser.add_argument(
        "--budget",
        type=float,
        default=1.0,
        metavar="PERCENT",
        help="perplexity that 4-bit inputs may cost (default: %(default)s)",
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
