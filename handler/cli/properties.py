"""Reads, writes and changes TorchServe's config.properties.

    properties = on_free_ports(read_properties(SERVER_CONFIG))
    write_properties(path, with_model_settings(properties, minWorkers=1))
    add_model(path, name="other", version="1.0")      # keeps comments and everything else

A file is a dictionary of strings. `models` is JSON: batching and workers by model name and version.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handler.assets import SERVER_CONFIG
from handler.cli.command import CommandError
from handler.cli.ports import LOOPBACK, find_free_ports

Properties = dict[str, str]

PORT_KEYS = (
    "inference_address",
    "management_address",
    "metrics_address",
    "grpc_inference_port",
    "grpc_management_port",
)
LOADS_ALL = "all"
LOADS_NONE = ("", "none", "N/A")


class PropertiesError(CommandError):
    """A config.properties file has an invalid value."""


def read_properties(path: Path) -> Properties:
    """Reads a .properties file; continued lines are joined."""
    text = re.sub(r"\\\n\s*", "", path.read_text())
    lines = [line.strip() for line in text.splitlines()]
    pairs = [line.split("=", 1) for line in lines if "=" in line and not line.startswith("#")]
    return {key.strip(): _unescape(value.strip()) for key, value in pairs}


def write_properties(path: Path, properties: Mapping[str, str]) -> Path:
    """Writes a .properties file without comments and returns its path."""
    path.write_text("".join(f"{key}={_escape(value)}\n" for key, value in properties.items()))
    return path


def on_free_ports(properties: Mapping[str, str]) -> Properties:
    """Returns the properties with ports that no program uses, so several servers can run at the same time."""
    return on_ports(properties, find_free_ports(len(PORT_KEYS)))


def on_ports(properties: Mapping[str, str], ports: list[int]) -> Properties:
    """Returns the properties with these ports of the loopback interface, in the order of PORT_KEYS."""
    addresses = {
        key: str(port) if key.endswith("port") else f"http://{LOOPBACK}:{port}" for key, port in zip(PORT_KEYS, ports)
    }
    return {**properties, **addresses}


def with_model_settings(properties: Mapping[str, str], **settings: int) -> Properties:
    """Returns the properties with settings such as minWorkers=1 changed for every model and version."""
    models = read_models(properties)
    for versions in models.values():
        for version in versions.values():
            version.update(settings)
    return {**properties, "models": json.dumps(models)}


def read_models(properties: Mapping[str, str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the entry `models`: settings by model name and version.

    Raises:
        PropertiesError: the entry is not a JSON object of objects of objects.
    """
    try:
        models = json.loads(properties.get("models") or "{}")
    except ValueError as error:
        raise PropertiesError(f"`models` in config.properties must be JSON: {error}") from error
    if not isinstance(models, dict) or not all(
        isinstance(versions, dict) and all(isinstance(settings, dict) for settings in versions.values())
        for versions in models.values()
    ):
        raise PropertiesError('`models` in config.properties must look like {"NAME": {"VERSION": {...}}}')
    return models


def has_model(properties: Mapping[str, str], *, name: str, version: str) -> bool:
    """Returns whether TorchServe would load NAME.mar at its start and find batching settings for this version."""
    return version in read_models(properties).get(name, {}) and _loads(properties, archive=f"{name}.mar")


def model_entries(properties: Mapping[str, str], *, name: str, version: str) -> Properties:
    """Returns `models` and `load_models` with the model added.

    Args:
        properties: of the server; settings that it already has for this version stay as they are.
        name: of the model; its archive is NAME.mar.
        version: of the model. A new one gets the batching and worker settings of the shipped config.properties.
    """
    models = read_models(properties)
    versions = models.setdefault(name, {})
    if version not in versions:
        is_first = not any(settings.get("defaultVersion") for settings in versions.values())
        versions[version] = {**default_settings(), "defaultVersion": is_first, "marName": f"{name}.mar"}
    loaded = properties.get("load_models", "").strip()
    if not _loads(properties, archive=f"{name}.mar"):
        loaded = f"{name}.mar" if loaded in LOADS_NONE else f"{loaded},{name}.mar"
    return {"load_models": loaded, "models": json.dumps(models, indent=2)}


def default_settings() -> dict[str, Any]:
    """Returns the batching and worker settings of the model in the shipped config.properties."""
    (versions,) = read_models(read_properties(SERVER_CONFIG)).values()
    (settings,) = versions.values()
    return settings


def add_model(path: Path, *, name: str, version: str) -> bool:
    """Adds a model to `models` and `load_models` of a config.properties file.

    Comments and all other entries stay as they are, and a second call changes nothing.

    Returns:
        Whether the file has changed.

    Raises:
        PropertiesError: the `models` entry of the file is invalid.
        OSError: the file cannot be read or written.
    """
    properties = read_properties(path)
    if has_model(properties, name=name, version=version):
        return False
    text = path.read_text()
    for key, value in model_entries(properties, name=name, version=version).items():
        text = _replace_entry(text, key, value)
    path.write_text(text)
    return True


def format_entry(key: str, value: str) -> str:
    """Returns an entry as written in the file: lines of a value end with a backslash where the next line continues."""
    continued = "\\\n".join(_escape(line) for line in value.split("\n"))
    return f"{key}={continued}"


def _replace_entry(text: str, key: str, value: str) -> str:
    """Replaces the last entry for a key, which is the one that counts, with its continuation lines, or appends it."""
    entry = format_entry(key, value)
    pattern = re.compile(rf"^[ \t]*{re.escape(key)}[ \t]*=(?:[^\n]*\\\n)*[^\n]*$", re.MULTILINE)
    if matches := list(pattern.finditer(text)):
        return text[: matches[-1].start()] + entry + text[matches[-1].end() :]
    return f"{text}{'' if text.endswith(chr(10)) or not text else chr(10)}{entry}\n"


def _loads(properties: Mapping[str, str], *, archive: str) -> bool:
    """Whether `load_models`, a list of FILE or NAME=FILE, has the archive."""
    entries = [entry.strip() for entry in properties.get("load_models", "").split(",")]
    return entries == [LOADS_ALL] or archive in [entry.split("=")[-1].strip() for entry in entries]


def _unescape(value: str) -> str:
    """Undoes Java's escapes: TorchServe writes `http\\://` to its snapshots."""
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "t": "\t"}.get(match[1], match[1]), value)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
