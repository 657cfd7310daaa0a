"""What the README says of options and defaults is what the code has."""

import argparse
import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from handler import sandbox  # noqa: F401  (its errors count, too)
from handler.cli import build as build_archive
from handler.cli import classify
from handler.cli.properties import read_properties
from handler.options import HandlerOptions
from handler.video import VideoError

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def table_rows(first_cell):
    """The cells of the README's table rows whose first cell holds `first_cell`."""
    rows = [line.strip("|").split(" | ") for line in README.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in row] for row in rows if first_cell in row[0]]


@pytest.mark.parametrize("field", dataclasses.fields(HandlerOptions), ids=lambda field: field.name)
def test_every_option_stands_there_with_its_default(field):
    assert [row[1] for row in table_rows(f"`{field.name}`")] == [str(field.default)]


@pytest.mark.parametrize("module", [build_archive, classify])
def test_every_flag_of_the_scripts_stands_there(module, monkeypatch):
    flags = set()
    monkeypatch.setattr(
        argparse.ArgumentParser,
        "parse_args",
        lambda parser, *_: flags.update(
            option for action in parser._actions for option in action.option_strings if option.startswith("--")
        ),
    )
    module.parse_arguments()
    flags.discard("--help")
    assert flags and not [flag for flag in flags if not table_rows(flag)]


def test_every_error_code_stands_there():
    codes = {error.code for error in all_subclasses(VideoError)}
    # An index is ours to choose, never a client's.
    codes -= {"frame_index", "decoder_error"}
    codes |= set(re.findall(r'code="(\w+)"', (ROOT / "handler" / "protocol" / "api.py").read_text()))
    assert codes and not [code for code in codes if f"`{code}`" not in README]


def all_subclasses(cls):
    return {cls}.union(*map(all_subclasses, cls.__subclasses__())) - {VideoError}


def test_batching_and_timeouts_stand_there_as_they_are_set():
    models = yaml.safe_load(read_properties(ROOT / "config.properties")["models"])
    settings = models["vivit"]["1.0"]
    for key in ("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay"):
        assert f'"{key}": {settings[key]}' in README
    config = yaml.safe_load((ROOT / "handler" / "assets" / "model-config.yaml").read_text())
    assert config["responseTimeout"] == config["startupTimeout"] == 300
    assert "(both 300 s)" in README


def test_every_file_that_it_links_to_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    headings = ["#" + title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", README, re.MULTILINE)]
    assert links and not [link for link in links if link not in headings and not (ROOT / link).exists()]
