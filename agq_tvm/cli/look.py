"""The commands that look: at a model's activations, at pruning, at times, at devices and kernels."""

import json

from agq_tvm.cli.options import command, json_option, numbers, positive, print_result
from agq_tvm.cli.quantize import pruning_options, pruning_schedule
from agq_tvm.tables import as_table


def analyze(subparsers) -> None:
    """Add `agq analyze`."""

    def run(args) -> None:
        from agq_tvm.flow.analyze import analyze

        result = analyze(args.model, args.output, args.data, pruning_schedule(args))
        rows = [("INPUT OF", "LARGEST / MEDIAN", "WITHOUT FIRST TOKEN", "LAYER", "CHANNEL", "OUTLIER CHANNELS")]
        for name, most in result["inputs"].items():
            ratios = (most["ratio"], most["ratio_without_first_token"])
            where = (most["layer"], most["channel"], most["outlier_channels"])
            rows.append((name, *("-" if ratio is None else f"{ratio:.1f}" for ratio in ratios), *map(str, where)))
        print_result(args, result, rows)
        if not args.json:
            start = result["attention_to_start"]
            print(
                f"\nattention to the first token: {start['mean']:.3f} on average, {start['layer_mean']:.3f} in layer "
                f"{start['layer']}; evenly spread attention gives it {start['uniform']:.3f}"
            )
            if result["pruned"]:
                print(f"\n{_pruned_table(result['pruned'])}")
            print(f"\n{args.output}: {', '.join(result['files'])}")

    parser = command(subparsers, "analyze", "draw outlier channels and attention, before and after pruning", run)
    parser.add_argument("model", metavar="CKPT|MODEL")
    parser.add_argument("-o", "--output", default="agq-analysis", metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--data",
        default="calibration",
        metavar="TEXT",
        help="a text file, at least 512 tokens (default: a shipped one)",
    )
    pruning_options(parser)
    json_option(parser)


def _pruned_table(pruned: dict) -> str:
    """Lay out what pruning did to the layers behind it."""
    rows = [("INPUT OF", "LARGEST |x|", "PRUNED", "OUTLIER CHANNELS A LAYER", "PRUNED")]
    for name, found in pruned["inputs"].items():
        rows.append((name, *(f"{value:.1f}" for values in found.values() for value in values)))
    start = pruned["attention_to_start"]["mean"]
    return f"{as_table(rows)}\n\npruned, attention to the first token is {start:.3f} on average"


def prune_search(subparsers) -> None:
    """Add `agq prune-search`."""

    def run(args) -> None:
        from agq_tvm.flow.prune_search import prune_search

        result = prune_search(args.model, args.speedup, args.data, args.window, args.target, args.measure)
        rows = [("LAYERS", "BETA", "SPARSITY", "PREDICTED", "PERPLEXITY", "± 1 SE", "WINDOWS")]
        for each in result["candidates"][:8]:
            change = (f"{100 * each[name]:+.2f} %" for name in ("perplexity_change", "perplexity_change_stderr"))
            shares = (f"{each['beta']:.3f}", f"{each['sparsity']:.3f}", f"{each['speedup_predicted']:.2f}x")
            rows.append((",".join(map(str, each["layers"])), *shares, *change, str(each["windows"])))
        print_result(args, result, rows)
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
    parser = command(subparsers, "prune-search", text, run)
    parser.add_argument("model", metavar="MODEL|CKPT")
    parser.add_argument("--speedup", type=float, required=True, metavar="X", help="wanted, e.g. 1.3")
    parser.add_argument("--target", default="host", metavar="NAME", help="what to compile for (default: %(default)s)")
    parser.add_argument("--data", default="calibration", metavar="TEXT", help="a text file (default: a shipped one)")
    parser.add_argument("--window", type=positive, default=512, metavar="N", help="default: %(default)s tokens")
    parser.add_argument(
        "--measure", action="store_true", help="of a CKPT: compile it with the best schedule and without, and time both"
    )
    json_option(parser)


def profile(subparsers) -> None:
    """Add `agq profile`."""

    def run(args) -> None:
        from agq_tvm.flow.profile import profile
        from agq_tvm.flow.profile_report import as_text

        options = {"rows": args.rows} if args.rows else {}
        result = profile(
            args.checkpoint,
            args.target,
            args.output,
            args.tracker,
            args.key,
            budget=args.budget,
            cache=args.cache,
            **options,
        )
        print(json.dumps(result.as_dict()) if args.json else f"{as_text(result)}\n\n{args.output}")

    parser = command(
        subparsers, "profile", "time a model's operations on a device, propose which inputs get 4 bits", run
    )
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("--target", required=True, metavar="NAME", help="see `agq targets`; host is this machine")
    parser.add_argument("-o", "--output", default="agq-profile", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--tracker", metavar="HOST:PORT", help="profile a board that is registered there")
    parser.add_argument("--key", help="what the board is registered as (default: the target's name)")
    parser.add_argument("--cache", choices=("float16", "int8"), default="float16", help="as for `agq compile`")
    parser.add_argument(
        "--rows",
        type=numbers,
        metavar="M,M,…",
        help="rows of activations: 1 is decode, 8 to 128 prefill (default: 1,128)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=1.0,
        metavar="PERCENT",
        help="perplexity that 4-bit inputs may cost (default: %(default)s)",
    )
    json_option(parser)


def targets(subparsers) -> None:
    """Add `agq targets`."""

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

    json_option(command(subparsers, "targets", "list the devices to compile for", run))


def kernels(subparsers) -> None:
    """Add `agq kernels`."""

    def run(args) -> None:
        from agq_tvm.kernels.table import as_dicts, as_markdown

        if args.markdown:
            print(as_markdown(), end="")
            return
        rows = as_dicts()
        if args.json:
            print(json.dumps({"kernels": rows}))
            return
        sets = {row["instruction_set"]: tuple(", ".join(row[key]) for key in ("features", "devices")) for row in rows}
        columns = [name for name in rows[0] if name not in ("features", "devices")]
        header = tuple(name.upper().replace("_", " ") for name in columns)
        print(as_table([header, *(tuple(row[name] for name in columns) for row in rows)]))
        print()
        print(as_table([("INSTRUCTION SET", "FEATURES", "DEVICES"), *((name, *text) for name, text in sets.items())]))

    parser = command(subparsers, "kernels", "list the kernels, what they need, and which devices choose them", run)
    json_option(parser)
    parser.add_argument("--markdown", action="store_true", help="the table as it stands in docs/kernels.md")
