"""The archive that `vivit serve` uses: reads its name and version, and builds it if it is missing or outdated.

build.py decides what an archive contains.
"""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handler import __version__
from handler.assets import MODEL_CONFIG
from handler.cli.build import HANDLER, NOT_ARCHIVED, build_archive
from handler.cli.command import CommandError

MANIFEST = "MAR-INF/MANIFEST.json"


class ArchiveError(CommandError):
    """An archive is missing or invalid."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """An archive and the name under which it is served.

    Attributes:
        path: of the .mar.
        name: of the model in URLs.
        version: of the model.
        load_entry: its entry in `load_models` of config.properties.
    """

    path: Path
    name: str
    version: str
    load_entry: str


def read_archive(path: Path, *, name: str | None = None) -> Archive:
    """Reads name and version from the manifest of an archive.

    Args:
        path: of the .mar.
        name: to serve it under; None: the name in the manifest.

    Raises:
        ArchiveError: the file does not exist or is not an archive.
    """
    if not path.is_file():
        raise ArchiveError(f"there is no archive {path}: build one with `vivit build`, or serve a checkpoint")
    try:
        with zipfile.ZipFile(path) as file:
            model = json.loads(file.read(MANIFEST))["model"]
        own_name, version = str(model["modelName"]), str(model["modelVersion"])
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise ArchiveError(f"{path} is not an archive of `vivit build`: no valid {MANIFEST}") from error
    load_entry = path.name if name in (None, own_name) else f"{name}={path.name}"
    return Archive(path=path, name=name or own_name, version=version, load_entry=load_entry)


def build_if_outdated(
    *,
    checkpoint: str,
    name: str,
    version: str,
    model_store: Path,
    config: Path = MODEL_CONFIG,
    labels: str | None = None,
    revision: str | None = None,
    rebuild: bool = False,
) -> Archive:
    """Builds NAME.mar unless it is newer than everything it was built from.

    Args:
        checkpoint: see `build_archive`, like all others.
        name: of the model.
        version: of the model.
        model_store: directory of the archive.
        config: a model-config.yaml.
        labels: names of the classes.
        revision: of a repository on the hub.
        rebuild: whether it is built in any case, e.g. because a repository on the hub has changed.

    Raises:
        CommandError, CheckpointError, ValueError, OSError: see `build_archive`.
    """
    arguments: dict[str, str | Path | None] = {
        "checkpoint": checkpoint,
        "version": version,
        "config": config,
        "labels": labels,
        "revision": revision,
    }
    inputs = {key: _absolute(value) for key, value in arguments.items() if value is not None}
    path, record_path = model_store / f"{name}.mar", model_store / f"{name}.build.json"
    if rebuild or not _is_up_to_date(path, record_path, inputs=inputs):
        build_archive(
            checkpoint=checkpoint,
            name=name,
            version=version,
            export_path=model_store,
            config=config,
            labels=labels,
            revision=revision,
            force=True,
        )
        record_path.write_text(json.dumps(_record(path, inputs=inputs), indent=2))
    return read_archive(path)


def _is_up_to_date(archive: Path, record_path: Path, *, inputs: dict[str, str]) -> bool:
    """Whether the archive was built by this version from the same inputs, and none of them has changed since."""
    try:
        record = json.loads(record_path.read_text())
        built_s = archive.stat().st_mtime
        if record != _record(archive, inputs=inputs):
            return False
    except (OSError, ValueError):
        return False
    return all(source.stat().st_mtime < built_s for source in _sources(inputs))


def _record(archive: Path, *, inputs: dict[str, str]) -> dict[str, Any]:
    return {"package": __version__, "archive_mtime_ns": archive.stat().st_mtime_ns, **inputs}


def _sources(inputs: dict[str, str]) -> Iterator[Path]:
    """Yields the files that go into an archive: those of the package, and inputs that are files or directories."""
    for file in HANDLER.rglob("*.py"):
        if not set(file.relative_to(HANDLER).parts[:-1]) & set(NOT_ARCHIVED):
            yield file
    for value in inputs.values():
        path = Path(value)
        if path.is_dir():
            yield from (file for file in path.rglob("*") if file.is_file())
        elif path.is_file():
            yield path


def _absolute(value: str | Path) -> str:
    """Makes the path of an existing file absolute; hub ids, versions and names of label lists stay as they are."""
    return str(Path(value).resolve()) if Path(value).exists() else str(value)
