"""`agq tune` and `agq schedules`."""

from agq_tvm.cli.options import command, json_option, positive, print_result, seconds, some_seconds
from agq_tvm.progress import say


def register(subparsers) -> None:
    """Add the commands."""
    _tune(subparsers)
    _schedules(subparsers)


def _tune(subparsers) -> None:
    def run(args) -> None:
        say(f"tuning {args.checkpoint} for {args.target}")  # before TVM is loaded, which takes seconds
        from agq_tvm.flow.tune import TuneRequest, tune
        from agq_tvm.tuning.display import clock, readable

        result = tune(
            TuneRequest(
                args.checkpoint,
                args.target,
                args.trials,
                args.tracker,
                args.key,
                args.simulate,
                args.only,
                args.strategy,
                args.time_limit,
                args.library,
                args.context,
                args.cache,
                args.timeout,
                args.cooldown,
            )
        )
        rows = [("TASK", "TRIALS", "FAILED", "BEST", "DEFAULT", "SPEED-UP")]
        for task in result["tasks"]:
            times = (readable(task[name]) if task[name] else "-" for name in ("best", "default"))
            speedup = f"{task['speedup']:.2f}x" if task["speedup"] else "-"
            trials = f"{task['trials']}/{task['wanted']}"
            rows.append((task["task"], trials, str(task["failures"]), *times, speedup))
        print_result(args, result, rows)
        if not args.json:
            print(f"\n{result['measured']} {result['how']} in {clock(result['seconds'])}; records: {result['library']}")

    parser = command(subparsers, "tune", "look for faster schedules of a checkpoint's kernels", run)
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("--target", required=True, metavar="NAME", help="see `agq targets`; host is this machine")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--tracker", metavar="HOST:PORT", help="measure on boards behind this tracker, with --key")
    where.add_argument("--local", action="store_true", help="measure on this machine (the default)")
    where.add_argument("--simulate", action="store_true", help="rank by simulated cycles; real measurements always win")
    parser.add_argument("--key", metavar="KEY", help="what the boards are called at the tracker; all of them measure")
    parser.add_argument(
        "--trials", type=positive, default=200, metavar="N", help="for all kernels together (default: %(default)s)"
    )
    parser.add_argument("--only", metavar="KERNEL", help="only tasks with this in their name")
    parser.add_argument("--strategy", choices=("evolutionary", "random"), default="evolutionary")
    parser.add_argument("--time-limit", type=some_seconds, metavar="S", help="stop after so many seconds")
    parser.add_argument("--library", metavar="DIR", help="where records go (default: your own library)")
    parser.add_argument("--context", type=int, metavar="N", help="as for `agq compile`")
    parser.add_argument("--cache", choices=("float16", "int8"), default="float16", help="as for `agq compile`")
    parser.add_argument(
        "--timeout", type=some_seconds, default=30.0, metavar="S", help="seconds for a candidate (default: %(default)g)"
    )
    parser.add_argument(
        "--cooldown", type=seconds, default=0.0, metavar="S", help="rest before each candidate (default: %(default)g s)"
    )
    json_option(parser)


def _schedules(subparsers) -> None:
    parser = subparsers.add_parser(
        "schedules",
        help="look into libraries of tuned schedules",
        description="Look into libraries of tuned schedules.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _list(actions)
    _merge(actions)
    _prune(actions)
    _export(actions)


def _library_option(parser) -> None:
    parser.add_argument("--library", metavar="DIR", help="default: your own library")


def _list(actions) -> None:
    def run(args) -> None:
        from agq_tvm.flow.schedule_library import list_schedules
        from agq_tvm.tuning.display import readable

        result = list_schedules(args.library, args.device)
        rows = [("DEVICE", "TASK", "BEST", "HOW", "WHEN")]
        for device, found in result["devices"].items():
            for task in found["tasks"]:
                how = task["how"] + (", confirmed" if task["confirmed"] else "")
                when = str(task["provenance"].get("when", "-"))
                rows.append((device, task["task"], readable(task["seconds"]), how, when))
        print_result(args, result, rows)
        if args.json:
            return
        for device, found in result["devices"].items():
            if found["emulated"]:
                count = "a record" if found["emulated"] == 1 else f"{found['emulated']} records"
                print(f"\n{device} has {count} of emulated boards, whose times mean nothing: never used, not shown")
        if result["left_out"]:
            print("\nleft out:\n  " + "\n  ".join(result["left_out"]))

    parser = command(actions, "list", "show the best record of each task", run)
    parser.add_argument("device", nargs="?", metavar="DEVICE", help="only this one")
    parser.add_argument("--library", metavar="DIR", help="default: your own library and the shipped one")
    json_option(parser)


def _merge(actions) -> None:
    def run(args) -> None:
        from agq_tvm.flow.schedule_library import merge_schedules

        result = merge_schedules(args.source, args.library)
        rows = [(name, str(result[name])) for name in ("library", "added", "replaced")]
        print_result(args, result, [*rows, ("left out", str(len(result["left_out"])))])

    parser = command(actions, "merge", "add the records of other libraries; the better of each stays", run)
    parser.add_argument("source", nargs="+", metavar="DIR")
    _library_option(parser)
    json_option(parser)


def _prune(actions) -> None:
    def run(args) -> None:
        from agq_tvm.flow.schedule_library import prune_schedules

        result = prune_schedules(args.library, args.keep)
        rows = [(name, str(result[name])) for name in ("library", "kept", "removed")]
        print_result(args, result, [*rows, ("left out", str(len(result["left_out"])))])

    parser = command(actions, "prune", "leave only the best records of each task", run)
    parser.add_argument("--keep", type=positive, default=1, metavar="N", help="of each task (default: %(default)s)")
    _library_option(parser)
    json_option(parser)


def _export(actions) -> None:
    def run(args) -> None:
        from agq_tvm.flow.schedule_library import export_schedules

        result = export_schedules(args.library, args.device, args.output)
        print_result(args, result, [(name.replace("_", " "), str(value)) for name, value in result.items()])

    parser = command(actions, "export", "write MetaSchedule's own database files", run)
    parser.add_argument("device", metavar="DEVICE")
    parser.add_argument("-o", "--output", required=True, metavar="DIR")
    _library_option(parser)
    json_option(parser)
