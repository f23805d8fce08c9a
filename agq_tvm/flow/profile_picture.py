"""A picture of a profile: what each operation takes of a block, in each form; needs matplotlib."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agq_tvm.flow.profile_file import OperationTimes, Profile, total

_COLOURS = {"linear": "Blues", "attention": "Purples", "nonlinear": "Oranges", "quantization": "Greens"}
_WRITTEN_SHARE = 0.04


def draw(profile: Profile, path: Path) -> None:
    """Draw a bar for each form, its operations stacked, beside each other for each number of rows."""
    figure = Figure(figsize=(2.5 + 5 * len(profile.blocks), 5.5), dpi=110, layout="constrained")
    threads = f"{profile.threads} thread{'s' if profile.threads > 1 else ''}"
    figure.suptitle(f"One {profile.family} block on {profile.device}, {threads} ({profile.instruction_set})")
    for axes, (rows, operations) in zip(
        figure.subplots(1, len(profile.blocks), squeeze=False)[0], profile.blocks.items(), strict=True
    ):
        draw_block(axes, operations, profile.forms)
        axes.set_title(f"{rows} row{'s' if rows > 1 else ''}, {profile.positions} positions")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center")
    figure.savefig(path)


def draw_block(axes: Axes, operations: tuple[OperationTimes, ...], forms: tuple[str, ...]) -> None:
    """Draw the bars of one number of rows; parts of some size tell their share."""
    unit, name = (1e6, "µs") if max(total(operations, form) for form in forms) < 1e-3 else (1e3, "ms")
    totals = np.array([total(operations, form) for form in forms])
    bottom = np.zeros(len(forms))
    for operation, colour in zip(operations, _colours(operations), strict=True):
        seconds = np.array([operation.seconds.get(form, 0.0) for form in forms])
        axes.bar(forms, unit * seconds, bottom=unit * bottom, color=colour, edgecolor="white", label=operation.name)
        for i, share in enumerate(seconds / totals):
            if share >= _WRITTEN_SHARE and seconds[i] >= _WRITTEN_SHARE * max(totals):
                middle = unit * (bottom[i] + seconds[i] / 2)
                dark = sum(colour[:3]) < 1.5
                axes.text(i, middle, f"{share:.0%}", ha="center", va="center", color="white" if dark else "black")
        bottom += seconds
    axes.set(ylabel=f"{name} for one block")
    axes.set_ylim(0, 1.04 * unit * max(totals))


def _colours(operations: tuple[OperationTimes, ...]) -> list[tuple]:
    """Return shades of one colour for the operations of a kind."""
    kinds = [operation.kind for operation in operations]
    places = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
    return [
        colormaps[_COLOURS[kind]](0.45 + 0.45 * place / max(1, kinds.count(kind) - 1))
        for kind, place in zip(kinds, places, strict=True)
    ]
