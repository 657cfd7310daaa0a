"""Bar charts of measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.timing import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which is distinguishable with any type of color vision.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
INK = "#333333"
Groups = Mapping[str, Mapping[str, Spread]]  # {group: {bar: spread}}


def bar_chart(groups: Groups, *, title: str, unit: str, reference: float | None = None) -> Figure:
    """Draws groups of horizontal bars; whiskers reach from the minimum to the maximum.

    Args:
        groups: Bars by name, by group.
        title: The chart's title.
        unit: The axis label.
        reference: Where to draw a dotted line across all groups.
    """
    # Imported here because benchmarks run without matplotlib; only --plot needs it.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    colors = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}
    height = 0.22 * sum(len(group) + 1 for group in groups.values())
    figure = Figure(figsize=(9, max(2.5, 1.2 + height)), layout="constrained")
    axes = figure.subplots()
    position, ticks = 0.0, []
    for label, group in groups.items():
        ticks.append((position + (len(group) - 1) / 2, label))
        for name, spread in group.items():
            _draw_bar(axes, position, spread, color=colors[name])
            position += 1
        position += 1
    if reference is not None:
        axes.axvline(reference, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.1)
    axes.legend(handles=[Patch(color=colors[name], label=name) for name in names], fontsize=8, loc="best")
    return figure


def panels(groups: Groups, *, title: str, unit: str, reference: float | None = None) -> Figure:
    """Draws a panel with its own scale for each group, for bars with different names. The arguments are bar_chart's."""
    from matplotlib.figure import Figure

    heights = [len(group) + 2 for group in groups.values()]
    figure = Figure(figsize=(9, 1 + 0.24 * sum(heights)), layout="constrained")
    rows = figure.subplots(len(groups), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (label, group) in zip(rows, groups.items()):
        for position, spread in enumerate(group.values()):
            _draw_bar(axes, position, spread, color=PALETTE[0])
        if reference is not None:
            axes.axvline(reference, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(group)), list(group), fontsize=8)
        axes.invert_yaxis()
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(label, fontsize=9, loc="left")
        axes.set_xlim(0, 1.12 * max([reference or 0, *(spread.high for spread in group.values())]) or 1)
    rows[-1].set_xlabel(unit)
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_bar(axes: Axes, position: float, spread: Spread, *, color: str) -> None:
    whisker = [[spread.median - spread.low], [spread.high - spread.median]]
    style = {"ecolor": INK, "error_kw": {"linewidth": 0.8}}
    axes.barh(position, spread.median, xerr=whisker, height=0.9, color=color, **style)
    number = f"{spread.median:,.0f}" if spread.median >= 100 else f"{spread.median:.3g}"
    axes.text(spread.high, position, f" {number}", va="center", fontsize=7)


def relative_spread(row: Mapping[str, Any]) -> Spread:
    """Returns a row's wall times relative to ours."""
    spread = Spread.from_row(row, "wall", "ms")
    return spread.times(row["wall_ratio"] / spread.median)
