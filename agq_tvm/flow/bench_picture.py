"""A picture of a bench: the speed of every round, and where the time goes; needs matplotlib."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agq_tvm.errors import AgqError
from agq_tvm.flow.bench_report import REST, shares, speed_of, title

_MOST_KERNELS = 12
_COLOURS = {"linear": "tab:blue", "attention": "tab:purple", REST: "tab:gray"}
_OTHER = "tab:orange"


def draw(result: dict, path: Path) -> None:
    """Draw a column for each test: above its rounds, below its kernels by their share of the time.

    Raises
    ------
    AgqError
        If the file cannot be written, or its ending is none of a picture.
    """
    tests = result["tests"]
    figure = Figure(figsize=(1 + 7.5 * len(tests), 7.5), dpi=110, layout="constrained")
    figure.suptitle(title(result))
    rows = figure.subplots(2, len(tests), squeeze=False, height_ratios=(1, 2))
    for (name, test), rounds, kernels in zip(tests.items(), *rows, strict=True):
        draw_rounds(rounds, test)
        rounds.set_title(f"{name}: {speed_of(test)} tokens/s")
        if test["operations"]:
            draw_kernels(kernels, test)
        else:
            kernels.set_axis_off()
    try:
        figure.savefig(path)
    except OSError as error:
        raise AgqError(f"cannot write {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise AgqError(f"cannot draw {path}: {error}") from error


def draw_rounds(axes: Axes, test: dict) -> None:
    """Draw the tokens per second of each round, their mean and one standard deviation around it."""
    rounds = range(1, len(test["samples"]) + 1)
    axes.plot(rounds, test["samples"], marker="o", linewidth=1)
    axes.axhline(test["mean"], color="gray", linewidth=1)
    if test["std"] is not None:
        axes.axhspan(test["mean"] - test["std"], test["mean"] + test["std"], color="gray", alpha=0.2, linewidth=0)
    axes.set(xlabel="round", ylabel="tokens/s", ylim=(0, 1.15 * max(test["samples"])))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_kernels(axes: Axes, test: dict) -> None:
    """Draw the kernels that take most of the time, and the rest, as bars."""
    listed = shares(test)
    shown, small = listed[:-1][:_MOST_KERNELS], listed[:-1][_MOST_KERNELS:]
    bars = [(name, share) for name, _, _, share in shown]
    if small:
        bars.append((f"smaller kernels ({len(small)})", sum(share for *_, share in small)))
    bars.append((REST, listed[-1][3]))
    colours = [_COLOURS.get(name if name == REST else name.split("_")[0], _OTHER) for name, _ in bars]
    drawn = axes.barh([name for name, _ in bars], [100 * share for _, share in bars], color=colours)
    axes.bar_label(drawn, [f"{share:.1%}" for _, share in bars], padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="% of the time", xlim=(0, 115 * max(share for _, share in bars)))
    axes.tick_params(axis="y", labelsize=8)
