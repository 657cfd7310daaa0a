"""What a benchmark prints and writes: machine, versions, settings, tables and notes."""

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
from tables import Columns, format_table

from handler.threads import available_cores

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
BUSY_LOAD_PER_CORE = 0.3  # load average before the run, per available core


class Report:
    """Collects measurements and prints them.

    Args:
        command: The sub-command.
        settings: Its arguments.
        json_path: Where to write the measurements after each table, so that an interrupted run keeps them.

    Attributes:
        tables: Rows by table name. A row maps names with units, such as "wall_ms", to unrounded numbers.
        notes: Facts that affect the measurements.
    """

    def __init__(self, command: str, *, settings: Mapping[str, Any], json_path: Path | None = None):
        self.json_path = json_path
        self.command = command
        self.machine = describe_machine()
        self.versions = list_versions()
        self.settings = dict(settings)
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.notes: list[str] = []
        print(f"benchmark {command}")
        print(f"machine   {_machine_line(self.machine)}")
        print("versions  " + ", ".join(f"{name} {version}" for name, version in self.versions.items()))
        print(f"settings  {_settings_line(settings)}", flush=True)
        if self.settings.get("quick"):
            self.note("--quick only checks that the benchmark works; its numbers are meaningless")
        load, cores = self.machine["load_average"], self.machine["cores_available"]
        if load > BUSY_LOAD_PER_CORE * cores:
            self.note(
                f"the machine was busy before the start (load average {load:.1f} on {cores} cores): "
                "wall-clock times are unreliable; compare CPU times and ratios"
            )

    def add_settings(self, settings: Mapping[str, Any]) -> None:
        """Adds settings whose defaults depend on the device."""
        self.settings.update(settings)
        print(f"          {_settings_line(settings)}", flush=True)

    def table(self, name: str, columns: Columns, rows: Sequence[dict[str, Any]], *, title: str | None = None) -> None:
        """Adds rows to a table and prints them.

        Args:
            name: The table's key in the JSON file.
            columns: (heading, template) pairs, see `tables.format_table`.
            rows: Values by name; the JSON file has all of them.
            title: A heading for these rows; the table's name by default.
        """
        self.tables.setdefault(name, []).extend(rows)
        print(f"\n{title or name}\n{format_table(columns, rows)}", flush=True)
        self._write()

    def note(self, text: str) -> None:
        """Adds a note, printed once at the end."""
        if text not in self.notes:
            self.notes.append(text)

    def progress(self, text: str) -> None:
        """Prints a line on standard error; standard output is for the tables."""
        print(f"... {text}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        print()
        for note in self.notes:
            print(f"note: {note}")
        self._write()

    def _write(self) -> None:
        if self.json_path is None:
            return
        keys = ("command", "machine", "versions", "settings", "tables", "notes")
        unfinished = self.json_path.with_suffix(".part")  # the file is complete whenever the process is killed
        unfinished.write_text(json.dumps({key: getattr(self, key) for key in keys}, indent=2, default=str) + "\n")
        unfinished.replace(self.json_path)


def describe_machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores_available": available_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
    }


def list_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["FFmpeg in av"] = "libavcodec " + ".".join(map(str, av.library_versions["libavcodec"]))
    if torch.version.cuda is not None and torch.cuda.is_available():
        found["CUDA in torch"] = torch.version.cuda
    return found


def _machine_line(machine: Mapping[str, Any]) -> str:
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    return (
        f"{machine['cpu']}, {machine['cores_available']} cores available, {machine['memory_gb']} GB; {gpus}; "
        f"load average {machine['load_average']:.1f} before the start"
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _settings_line(settings: Mapping[str, Any]) -> str:
    """Formats the settings that have a value, such as "threads 1 3, repetitions 5"."""
    texts = {
        name: " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        for name, value in settings.items()
        if value is not None
    }
    return ", ".join(f"{name} {text}" for name, text in texts.items())
