"""Bar charts of measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.timing import Spread

if TYPE_CHECKING:
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
            whisker = [[spread.median - spread.low], [spread.high - spread.median]]
            axes.barh(
                position,
                spread.median,
                xerr=whisker,
                height=0.9,
                color=colors[name],
                ecolor=INK,
                error_kw={"linewidth": 0.8},
            )
            axes.text(spread.high, position, f" {spread.median:.3g}", va="center", fontsize=7)
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


def relative_spread(row: Mapping[str, Any]) -> Spread:
    """Returns a row's wall times relative to ours."""
    spread = Spread.from_row(row, "wall", "ms")
    return spread.times(row["wall_ratio"] / spread.median)
