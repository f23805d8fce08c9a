"""A picture of a profile: what each operation takes of a call of the decoder, in each form; needs matplotlib."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agq_tvm.flow.profile_file import SECTIONS, OperationTimes, Profile, total
from agq_tvm.flow.profile_report import choices, rows_of, title

_COLOURS = {"linear": "Blues", "attention": "Purples", "nonlinear": "Oranges", "quantization": "Greens"}
_WRITTEN_SHARE = 0.04
_SEEN_SHARE = 0.005


def draw(profile: Profile, path: Path) -> None:
    """Draw a bar for each form, its operations stacked, beside each other for each number of rows."""
    figure = Figure(figsize=(3 + 5 * len(profile.operations), 6), dpi=110, layout="constrained")
    figure.suptitle(f"{title(profile)}\n{choices(profile)}")
    colours = _colours(profile)
    shown: dict[str, object] = {}
    for axes, (rows, operations) in zip(
        figure.subplots(1, len(profile.operations), squeeze=False)[0], profile.operations.items(), strict=True
    ):
        draw_call(axes, operations, profile.forms, colours)
        stream = profile.weight_stream() if rows == 1 else {}
        note = f"\nweight stream {100 * stream[profile.own]['model']:.0f} % of {profile.own}" if stream else ""
        axes.set_title(f"{rows_of(rows, profile)}{note}")
        shown |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = [name for name in colours if name in shown][::-1]
    figure.legend([shown[name] for name in names], names, loc="outside right center")
    figure.savefig(path)


def draw_call(
    axes: Axes, operations: tuple[OperationTimes, ...], forms: tuple[str, ...], colours: dict[str, tuple]
) -> None:
    """Draw the bars of one number of rows; parts of some size tell their share, and specks are not in the legend."""
    unit, name = (1e6, "µs") if max(total(operations, form) for form in forms) < 1e-3 else (1e3, "ms")
    totals = np.array([total(operations, form) for form in forms])
    bottom = np.zeros(len(forms))
    for operation in operations:
        colour = colours[operation.name]
        seconds = np.array([operation.seconds.get(form, 0.0) for form in forms])
        label = operation.name if max(seconds / totals) >= _SEEN_SHARE else None
        axes.bar(forms, unit * seconds, bottom=unit * bottom, color=colour, edgecolor="white", label=label)
        for i, share in enumerate(seconds / totals):
            if share >= _WRITTEN_SHARE and seconds[i] >= _WRITTEN_SHARE * max(totals):
                middle = unit * (bottom[i] + seconds[i] / 2)
                dark = sum(colour[:3]) < 1.5
                axes.text(i, middle, f"{share:.0%}", ha="center", va="center", color="white" if dark else "black")
        bottom += seconds
    axes.set(ylabel=f"{name} for all blocks and the head")
    axes.set_ylim(0, 1.04 * unit * max(totals))


def _colours(profile: Profile) -> dict[str, tuple]:
    """Return a colour for each operation, by name and in order: shades of one for those of a kind."""
    every = (each for operations in profile.operations.values() for each in operations)
    kinds = {each.name: each.kind for each in sorted(every, key=lambda each: SECTIONS.index(each.section))}
    shades = {}
    for kind, colour in _COLOURS.items():
        names = [name for name, its in kinds.items() if its == kind]
        steps = np.linspace(0.45, 0.9, len(names)) if len(names) > 1 else [0.45]
        shades |= {name: colormaps[colour](step) for name, step in zip(names, steps, strict=True)}
    return {name: shades[name] for name in kinds}
