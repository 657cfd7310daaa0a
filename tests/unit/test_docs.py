"""The documentation agrees with the code: options, defaults, flags, error codes, settings, links."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from handler import sandbox  # noqa: F401  (defines errors)
from handler.assets import MODEL_CONFIG, SERVER_CONFIG
from handler.cli import main as cli
from handler.cli.properties import read_properties
from handler.options import HandlerOptions
from handler.video import VideoError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    *(path for folder in ("handler", "scripts", "tests") for path in (ROOT / folder).rglob("*.md")),
]
MANUAL = (ROOT / "scripts" / "README.md").read_text()
INTERNAL_CODES = {"video_error", "decoder_error", "frame_index"}  # base classes, and errors that no client can cause


def table_rows(first_cell):
    """The cells of the manual's table rows whose first cell contains `first_cell`."""
    rows = [line.strip("|").split(" | ") for line in MANUAL.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in row] for row in rows if first_cell in row[0]]


def anchors_of(document):
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}


def subclasses_of(cls):
    return {cls}.union(*map(subclasses_of, cls.__subclasses__()))


@pytest.mark.parametrize("field", dataclasses.fields(HandlerOptions), ids=lambda field: field.name)
def test_option_documented_with_default(field):
    assert [row[1] for row in table_rows(f"`{field.name}`")] == [str(field.default)]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_flags_documented(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    flags = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert flags and not [flag for flag in flags if not table_rows(flag)]


@pytest.mark.parametrize("name", ["vivit.service", "compose.yaml", "Dockerfile"])
def test_deployment_files_use_existing_flags(name):
    text = (ROOT / "scripts" / "deployment" / name).read_text()
    (arguments,) = re.findall(r"(?:vivit serve|^CMD .*serve) ?(.*--directory.*)$", text, re.MULTILINE)
    assert all(table_rows(flag) for flag in re.findall(r"--[a-z][a-z-]+", arguments))


def test_error_codes_documented():
    codes = {error.code for error in subclasses_of(VideoError)}
    sources = [*(ROOT / "handler" / "protocol").glob("*.py"), ROOT / "handler" / "vivit_handler.py"]
    codes |= {code for source in sources for code in re.findall(r'code="(\w+)"', source.read_text())}
    assert len(codes) > 20 and not [code for code in codes - INTERNAL_CODES if f"`{code}`" not in MANUAL]


def test_batching_and_timeouts_documented_as_shipped():
    settings = yaml.safe_load(read_properties(SERVER_CONFIG)["models"])["vivit"]["1.0"]
    for key in ("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay"):
        assert f'"{key}": {settings[key]}' in MANUAL
    config = yaml.safe_load(MODEL_CONFIG.read_text())
    assert config["responseTimeout"] == config["startupTimeout"] == 300
    assert "(both 300 s)" in MANUAL


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document):
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link
