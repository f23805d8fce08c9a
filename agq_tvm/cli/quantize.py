"""`agq quantize`, and how it says what it did."""

from agq_tvm.cli.options import command, json_option, names, numbers, positive, print_result
from agq_tvm.errors import AgqError
from agq_tvm.quantize.variants import VARIANTS, variant_settings
from agq_tvm.tables import megabytes

_MANY_COARSE = 0.01


def register(subparsers) -> None:
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
            "head_bits",
            "integer_grid",
        )
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        if args.bits_from:
            given["four_bit"] = _bits_from(args)
        settings = variant_settings(args.variant) | given
        calibration = Calibration(args.calibration, args.calibration_samples, args.calibration_length, args.seed)
        pruning = pruning_schedule(args)
        result = quantize(args.model, args.output, calibration=calibration, pruning=pruning, **settings)
        rows = [
            ("checkpoint", args.output),
            ("method", result["method"]),
            (
                "weights",
                f"{result['weight_bits']} bit, group size {result['group_size']}, "
                f"{result['bits_per_weight']:.2f} bit stored"
                + (", integer grid" if result["integer_grid"] else "")
                + (", norms folded in" if result["fold"] else ""),
            ),
            ("embedding, head", f"{result['head_bits']} bit"),
            ("activations", _activations(result)),
            ("attention", result["attention"]),
            ("pruning", _pruning_text(result["pruning"])),
            ("calibration", _calibration_text(result["calibration"])),
            ("weight error", f"{result['relative_weight_error']:.4f}"),
            *_coarse(result["coarse_groups"]),
            *_clipped(result["clipped"] or {}),
            ("size", megabytes(result["bytes"])),
            ("time", f"{result['seconds']:.1f} s"),
        ]
        print_result(args, result, rows)

    parser = command(subparsers, "quantize", "make a quantized checkpoint of a model", run)
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
        help="default: keep a model that is 4 bit already as it is, unless --fold or --integer-grid; else gptq",
    )
    parser.add_argument(
        "--group-size",
        type=lambda text: int(text) if text.isdecimal() else text,
        choices=(32, 64, 128, "column"),
        help="weights that share a scale; column: all of an output column",
    )
    parser.add_argument("--symmetric", action="store_true", default=None, help="no group offsets: smaller, less exact")
    parser.add_argument(
        "--integer-grid",
        action="store_true",
        default=None,
        help="scales and offsets that are whole multiples of one unit of their column: smaller, about as exact, and "
        "prefill sums in integers on processors with VNNI or dot products (per-token, static; groups of 32, 64 or 128)",
    )
    parser.add_argument("--weight-bits", type=int, choices=(4, 8), help="default: 4; 8 is rounded to nearest")
    parser.add_argument(
        "--head-bits", type=int, choices=(4, 8, 16), help="of embedding and lm_head, 16 is float16 (default: 8)"
    )
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
        type=names,
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
        "--calibration-samples", type=positive, default=64, metavar="N", help="windows of it (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration-length", type=positive, default=512, metavar="N", help="their tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="draw the windows at random (default: they are evenly spread)"
    )
    pruning_options(parser)
    json_option(parser)


def pruning_options(parser) -> None:
    parser.add_argument(
        "--prune-layers",
        type=numbers,
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


def pruning_schedule(args):
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


def _coarse(share: float) -> list[tuple[str, str]]:
    """Say how many groups an integer grid leaves few codes, if these are not very few."""
    text = f"{share:.1%} have fewer than 8 codes, as far larger weights set their columns' units: try no --integer-grid"
    return [("groups", text)] if share >= _MANY_COARSE else []


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
