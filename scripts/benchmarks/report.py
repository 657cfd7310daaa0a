"""What a run prints, and what it writes: machine, versions, settings, tables, notes."""

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import psutil
import torch

from handler.threads import available_cores

# Where numbers come from: ours first, then the peers'.
PACKAGES = (
    "torch",
    "av",
    "numpy",
    "Pillow",
    "torchserve",
    "transformers",
    "torchcodec",
    "decord",
    "opencv-python-headless",
)
BUSY_LOAD_PER_CORE = 0.3  # of what is available, before the run has started anything


class Report:
    """Collects and prints. Rows are dictionaries of raw numbers, units in their names; JSON gets all of them.

    Args:
        command: the sub-command.
        settings: what it was asked to do.
    """

    def __init__(self, command: str, *, settings: Mapping[str, Any]):
        self.command = command
        self.machine = machine()
        self.versions = versions()
        self.settings = dict(settings)
        self.tables: dict[str, list[dict]] = {}
        self.notes: list[str] = []
        print(f"benchmark {command}")
        print(f"machine   {_describe_machine(self.machine)}")
        print("versions  " + ", ".join(f"{name} {version}" for name, version in self.versions.items()))
        print(f"settings  {_describe_settings(settings)}", flush=True)
        if self.settings.get("quick"):
            self.note("--quick: this shows that it works; the numbers mean nothing")
        load, cores = self.machine["load_average"], self.machine["cores_available"]
        if load > BUSY_LOAD_PER_CORE * cores:
            self.note(
                f"the machine was busy before the start (load {load:.1f} on {cores} cores): trust CPU "
                "milliseconds and ratios, not the clock"
            )

    def choose(self, settings: Mapping[str, Any]) -> None:
        """Settings that were left open until the device was known."""
        self.settings.update(settings)
        print(f"          {_describe_settings(settings)}", flush=True)

    def table(
        self, name: str, columns: Sequence[tuple[str, str]], rows: Sequence[dict], *, title: str | None = None
    ) -> None:
        """Adds rows to the table `name`, and prints them.

        columns  (heading, template of str.format over a row); what a row lacks is a dash
        """
        self.tables.setdefault(name, []).extend(rows)
        cells = [[heading for heading, _ in columns]]
        cells += [[_fill(template, row) for _, template in columns] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells)]
        print(f"\n{title or name}")
        for number, line in enumerate(cells):
            print("  ".join(_align(cell, width) for cell, width in zip(line, widths)).rstrip())
            if number == 0:
                print("  ".join("-" * width for width in widths), flush=True)

    def note(self, text: str) -> None:
        """Something that a reader must know; printed once, at the end."""
        if text not in self.notes:
            self.notes.append(text)

    def progress(self, text: str) -> None:
        """For whoever waits: on standard error, so that the tables stay clean."""
        print(f"... {text}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        print()
        for note in self.notes:
            print(f"note: {note}")

    def write_json(self, path: Path) -> None:
        keys = ("command", "machine", "versions", "settings", "tables", "notes")
        path.write_text(json.dumps({key: getattr(self, key) for key in keys}, indent=2, default=str) + "\n")


def machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores_available": available_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus,
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["FFmpeg in av"] = "libavcodec " + ".".join(map(str, av.library_versions["libavcodec"]))
    if torch.cuda.is_available():
        found["CUDA in torch"] = torch.version.cuda
    return found


def bars(groups: Mapping[str, Mapping[str, Any]], *, title: str, unit: str, reference: float | None = None):
    """A matplotlib figure: a group of horizontal bars for each key, a bar for each contestant.

    groups     {group: {contestant: Spread}}; the whisker is lowest to highest
    reference  where to draw a line across all groups
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    # Okabe and Ito's colours, which people with any colour vision tell apart.
    palette = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
    colours = {name: palette[index % len(palette)] for index, name in enumerate(names)}
    height = 0.22 * sum(len(group) + 1 for group in groups.values())
    figure, axes = pyplot.subplots(figsize=(9, max(2.5, 1.2 + height)), layout="constrained")
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
                color=colours[name],
                ecolor="#333333",
                error_kw={"linewidth": 0.8},
            )
            axes.text(spread.high, position, f" {spread.median:.3g}", va="center", fontsize=7)
            position += 1
        position += 1
    if reference is not None:
        axes.axvline(reference, color="#333333", linewidth=0.8, linestyle=":")
    axes.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.1)
    keys = [pyplot.Rectangle((0, 0), 1, 1, color=colours[name], label=name) for name in names]
    axes.legend(handles=keys, fontsize=8, loc="best")
    return figure


def _describe_machine(found: Mapping[str, Any]) -> str:
    gpus = ", ".join(found["gpus"]) or "no GPU"
    return (
        f"{found['cpu']}, {found['cores_available']} cores available, {found['memory_gb']} GB; {gpus}; "
        f"load {found['load_average']:.1f} before the start"
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _describe_settings(settings: Mapping[str, Any]) -> str:
    """Those that are set: "threads 1 3, repetitions 5"."""
    texts = {
        name: " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        for name, value in settings.items()
        if value is not None
    }
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def _fill(template: str, row: Mapping[str, Any]) -> str:
    try:
        return template.format(**row)
    except (KeyError, TypeError):  # not measured: missing, or None where a number is formatted
        return "-"


def _align(cell: str, width: int) -> str:
    is_number = cell[:1].isdigit() or cell[:1] in "-+."
    return cell.rjust(width) if is_number else cell.ljust(width)
