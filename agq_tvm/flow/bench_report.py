"""What `agq bench` found, as text or Markdown."""

from agq_tvm.tables import as_markdown_table, as_table, megabytes

EMULATED = "emulated: time means nothing"
REST = "the rest"
_WRITTEN_SHARE = 0.005


def as_text(result: dict) -> str:
    """Lay out speeds, memory, the board's state and the kernels as text."""
    speeds = [("TEST", "TOKENS/S"), *((name, speed_of(test)) for name, test in result["tests"].items())]
    kernels = [f"{heading(name, test)}\n{as_table(rows)}" for name, test, rows in _kernel_tables(result)]
    return "\n\n".join([title(result), as_table(speeds), as_table(_facts(result)), *kernels])


def as_markdown(result: dict) -> str:
    """Lay out the same in Markdown, speeds in the columns of llama-bench."""
    first = ("model", "size", "device", "threads", "test", "t/s")
    about = (result["model"]["name"], megabytes(result["memory"]["weights"]), place(result), str(result["threads"]))
    speeds = [first, *((*about, name, speed_of(test)) for name, test in result["tests"].items())]
    parts = [as_markdown_table(speeds), as_markdown_table([("", ""), *_facts(result)])]
    for name, test, rows in _kernel_tables(result):
        parts.append(f"{heading(name, test)}\n\n{as_markdown_table([tuple(c.lower() for c in rows[0]), *rows[1:]])}")
    return "\n\n".join(parts)


def title(result: dict) -> str:
    """Say what was timed where."""
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    return f"{result['model']['name']} on {place(result)}, {threads} ({result['instruction_set']})"


def place(result: dict) -> str:
    """Name the device, and the board if it is called otherwise."""
    board = result["board"]
    emulated = "the emulated " if result["emulated"] else ""
    return emulated + result["device"] + ("" if board in (None, result["device"]) else f", board {board}")


def speed_of(test: dict) -> str:
    """Write the tokens per second of a test, mean and standard deviation of its rounds."""
    if test["mean"] is None:
        return EMULATED
    digits = 2 if test["mean"] < 100 else 1
    spread = "" if test["std"] is None else f" ± {test['std']:.{digits}f}"
    return f"{test['mean']:.{digits}f}{spread}"


def heading(name: str, test: dict) -> str:
    """Say what the table of a test's kernels shows."""
    calls = sum(each["calls"] for each in test["operations"])
    if test["mean"] is None:
        return f"{name}: {len(test['operations'])} kernels ran, {calls} calls"
    return f"{name}: time by kernel"


def shares(test: dict) -> list[tuple[str, int | None, float, float]]:
    """Return (kernel, calls, seconds, share of the test's time), and at last what no kernel takes.

    The whole is the time of the rounds in which nothing else was timed, if kernels do not take more by themselves.
    """
    rows = [(each["name"], each["calls"], each["seconds"]) for each in test["operations"]]
    kernels = sum(seconds for _, _, seconds in rows)
    whole = max(test["tokens"] / test["mean"], kernels)
    rest = whole - kernels
    return [(name, calls, seconds, seconds / whole) for name, calls, seconds in [*rows, (REST, None, rest)]]


def _kernel_tables(result: dict) -> list[tuple[str, dict, list[tuple[str, ...]]]]:
    return [
        (name, test, _emulated_rows(test) if test["mean"] is None else _timed_rows(test))
        for name, test in result["tests"].items()
        if test["operations"]
    ]


def _emulated_rows(test: dict) -> list[tuple[str, ...]]:
    return [("KERNEL", "CALLS"), *((each["name"], str(each["calls"])) for each in test["operations"])]


def _timed_rows(test: dict) -> list[tuple[str, ...]]:
    *kernels, rest = shares(test)
    small = [each[1:] for each in kernels if each[3] < _WRITTEN_SHARE]
    shown = kernels[: len(kernels) - len(small)]
    if small:
        shown.append((f"smaller kernels ({len(small)})", *map(sum, zip(*small, strict=True))))
    rows = [(name, *_cells(calls, seconds, share)) for name, calls, seconds, share in [*shown, rest]]
    return [("KERNEL", "CALLS", "µS A CALL", "SHARE"), *rows]


def _cells(calls: int | None, seconds: float, share: float) -> tuple[str, str, str]:
    if calls is None:
        return "", "", f"{share:.1%}"
    return str(calls), f"{1e6 * seconds / calls:.1f}", f"{share:.1%}"


def _facts(result: dict) -> list[tuple[str, str]]:
    memory = result["memory"]
    sizes = [f"{name} {megabytes(memory[name])}" for name in ("weights", "caches", "library")]
    if memory["peak"] is not None:
        sizes.append(f"process at most {megabytes(memory['peak'])}")
    rows = [("memory", ", ".join(sizes))]
    if result["uploaded_bytes"] is not None:
        sent = result["uploaded_bytes"]
        rows.append(("upload", megabytes(sent) if sent else "nothing: the board has the bundle"))
    if not result["emulated"]:
        rows.append(("state", _state(result["status"])))
    if result["load"] is not None and result["load"] > result["threads"] / 2:
        rows.append(("load", f"{result['load']:.1f}: the machine was busy, these speeds are too low"))
    if any(test["operations"] is None for test in result["tests"].values()):
        rows.append(("kernels", "not timed: TVM's own Python server has no clock around them"))
    return rows


def _state(status: dict) -> str:
    """Write temperature and clock before and after."""
    units = {"temperature_celsius": (1, "°C", 1), "clock_hertz": (1e-9, "GHz", 2)}
    told = []
    for name, (factor, unit, digits) in units.items():
        values = [(status[when] or {}).get(name) for when in ("before", "after")]
        if None not in values:
            told.append(f"{factor * values[0]:.{digits}f} {unit} before, {factor * values[1]:.{digits}f} {unit} after")
    return "; ".join(told) or "temperature and clock are not told"
