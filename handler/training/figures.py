"""Figures of a training run: curves over epochs, and confusion matrices.

Requires matplotlib, which the extra `train` installs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

INK, GRAY, PALE, BLUE, ORANGE = "#1f2328", "#8c959f", "#e6e9ed", "#1f6feb", "#d9622b"
COLOR_MAP = "Blues"

MAX_LABELS = 30  # of a confusion matrix whose labels are readable
MAX_PAIRS = 20  # in the list beside the matrix of many labels
MAX_LABEL_LENGTH = 28

Log = Sequence[Mapping[str, Any]]


def draw_curves(log: Log) -> Figure:
    """Draws loss, accuracy and learning rate over the epochs.

    Args:
        log: one entry per epoch, at least one: epoch, train_loss, train_accuracy, eval_loss, eval_top1, eval_top5 and
            learning_rate. Values that are missing, None or nan are left out.
    """
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    _draw_lines(loss, log, {"train_loss": ("training", BLUE, "-"), "eval_loss": ("evaluation", ORANGE, "-")})
    loss.set_title("Loss", loc="left", color=INK)
    _start_at_zero(loss)
    lines = {"train_accuracy": ("training", BLUE, "-"), "eval_top1": ("evaluation, top-1", ORANGE, "-")}
    if any(_is_number(entry.get("eval_top5")) and entry["eval_top5"] < 1 for entry in log):  # there are enough labels
        lines["eval_top5"] = ("evaluation, top-5", ORANGE, ":")
    _draw_lines(accuracy, log, lines)
    accuracy.set_ylim(0, 1.05)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    accuracy.set_title("Accuracy" + _mark_best(accuracy, log), loc="left", color=INK)
    _draw_lines(rate, log, {"learning_rate": ("", BLUE, "-")})
    rate.set_title("Learning rate", loc="left", color=INK)
    _start_at_zero(rate)
    rate.yaxis.set_major_formatter("{x:g}")
    for axes in (loss, accuracy, rate):
        _style(axes)
        axes.set_xlabel("epoch", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(log[0]["epoch"] - 0.5, log[-1]["epoch"] + 0.5)
    return figure


def draw_confusion(confusion: NDArray[np.int64], labels: Sequence[str]) -> Figure:
    """Draws a confusion matrix: numbers of videos, and as colors their shares of the true label's videos.

    Of more than MAX_LABELS labels, those with the most confusions are shown, beside a list of the most frequent ones.

    Args:
        confusion: int64 (labels, labels), rows are true labels.
        labels: in this order.
    """
    if len(labels) <= MAX_LABELS:
        side, label_side = max(3.0, 0.42 * len(labels)), 0.07 * min(MAX_LABEL_LENGTH, max(map(len, labels)))
        figure = Figure(figsize=(side + label_side + 2.4, side + 0.7 * label_side + 1), layout="constrained")
        _draw_matrix(figure, figure.subplots(), confusion, labels, shown=np.arange(len(labels)))
        return figure
    shown = _most_confused(confusion)
    figure = Figure(figsize=(19, 13), layout="constrained")
    matrix, pairs = figure.subplots(1, 2, width_ratios=(3.2, 1))
    _draw_matrix(figure, matrix, confusion, labels, shown=shown)
    _draw_pairs(pairs, confusion, labels)
    return figure


def _draw_lines(axes: Axes, log: Log, lines: Mapping[str, tuple[str, str, str]]) -> None:
    """Draws the values with the keys of `lines`, each with (name, color, line style)."""
    for key, (name, color, style) in lines.items():
        points = [(entry["epoch"], entry[key]) for entry in log if _is_number(entry.get(key))]
        if points:
            marker = "o" if len(points) < 25 else ""
            axes.plot(*zip(*points), style, color=color, label=name, linewidth=1.8, marker=marker, markersize=3.5)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _mark_best(axes: Axes, log: Log) -> str:
    """Marks the epoch with the best evaluation and returns its description, empty if nothing was evaluated."""
    evaluated = [entry for entry in log if all(_is_number(entry.get(key)) for key in ("eval_top1", "eval_loss"))]
    if not evaluated:
        return ""
    # The epoch whose weights training keeps.
    best = max(evaluated, key=lambda entry: (entry["eval_top1"], -entry["eval_loss"]))
    axes.plot(best["epoch"], best["eval_top1"], "o", markersize=10, markerfacecolor="none", markeredgecolor=ORANGE)
    return f", best {best['eval_top1']:.1%} after epoch {best['epoch']}"


def _start_at_zero(axes: Axes) -> None:
    """Sets the limits of the vertical axis, with the margin above that belongs to the whole range."""
    axes.update_datalim([(axes.dataLim.x0, 0)], updatex=False)
    axes.autoscale_view()
    axes.set_ylim(bottom=0)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRAY)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color=PALE)
    axes.set_axisbelow(True)


def _draw_matrix(
    figure: Figure, axes: Axes, confusion: NDArray[np.int64], labels: Sequence[str], *, shown: NDArray[np.intp]
) -> None:
    """Draws the rows and columns `shown`. Shares are of all videos of a label, also those in other columns."""
    counts = confusion.sum(1)[shown]
    values = confusion[np.ix_(shown, shown)]
    shares = values / np.maximum(counts, 1)[:, None]
    image = axes.imshow(shares, cmap=COLOR_MAP, vmin=0, vmax=1)
    names = [_shorten(labels[index]) for index in shown]
    axes.set_xticks(range(len(shown)), names, rotation=45 if len(shown) > 2 else 0, rotation_mode="anchor")
    for text in axes.get_xticklabels():
        text.set_horizontalalignment("right" if len(shown) > 2 else "center")
        text.set_verticalalignment("top" if len(shown) <= 2 else "center_baseline")
    axes.set_yticks(range(len(shown)), [f"{name}  ({count})" for name, count in zip(names, counts)])
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.spines[:].set_visible(False)
    edges = np.arange(len(shown) + 1) - 0.5
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true (videos)", color=INK)
    title = f"Top-1 accuracy {confusion.trace() / max(confusion.sum(), 1):.1%} of {confusion.sum():,} videos"
    if len(shown) < len(labels):
        title += f"; the {len(shown)} of {len(labels)} labels with the most confusions"
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    for row, column in zip(*np.nonzero(values)):
        color = "white" if shares[row, column] > 0.5 else INK
        number = axes.text(column, row, f"{values[row, column]}", ha="center", va="center", fontsize=8, color=color)
        number.set_in_layout(False)  # the layout takes seconds if it measures all numbers
    bar = figure.colorbar(image, ax=axes, shrink=0.5, format=PercentFormatter(1, decimals=0))
    bar.set_label("share of the true label's videos", color=INK, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=INK, labelsize=9)


def _draw_pairs(axes: Axes, confusion: NDArray[np.int64], labels: Sequence[str]) -> None:
    """Lists the most frequent confusions as bars."""
    errors = _errors(confusion)
    order = np.argsort(-errors, axis=None, kind="stable")[:MAX_PAIRS]
    rows, columns = np.unravel_index(order, errors.shape)
    pairs = [(row, column) for row, column in zip(rows, columns) if errors[row, column]]
    for position, (row, column) in enumerate(pairs):
        axes.barh(position, errors[row, column], height=0.3, color=BLUE)
        text = f"{_shorten(labels[row])} → {_shorten(labels[column])}"
        axes.text(0, position - 0.22, text, fontsize=9, color=INK, va="bottom")
        axes.text(errors[row, column], position, f" {errors[row, column]}", fontsize=9, color=INK, va="center")
    axes.set_ylim(MAX_PAIRS - 0.5, -0.8)
    axes.set_axis_off()
    axes.set_title("Most frequent confusions, true → predicted", loc="left", color=INK, fontsize=11)


def _most_confused(confusion: NDArray[np.int64]) -> NDArray[np.intp]:
    """Returns the indices of MAX_LABELS labels, ascending, that take part in the most frequent confusions."""
    errors = _errors(confusion)
    chosen: dict[int, None] = {}
    for index in np.argsort(-errors, axis=None, kind="stable"):
        for label in np.unravel_index(index, errors.shape):
            if len(chosen) < MAX_LABELS:
                chosen[int(label)] = None
        if len(chosen) == MAX_LABELS:
            break
    return np.array(sorted(chosen))


def _errors(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """The confusion matrix without its diagonal."""
    errors: NDArray[np.int64] = confusion.copy()
    np.fill_diagonal(errors, 0)
    return errors


def _shorten(label: str) -> str:
    return label if len(label) <= MAX_LABEL_LENGTH else label[: MAX_LABEL_LENGTH - 1].rstrip() + "…"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
