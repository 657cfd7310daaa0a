"""Finds a checkpoint's files in a local directory or a repository on the Hugging Face Hub.

All checkpoint errors derive from CheckpointError. Each also has a standard exception as a parent, so that code written
for `transformers` (`except OSError`, `except ValueError`) works unchanged:

    CheckpointError
    ├── CheckpointNotFoundError (FileNotFoundError)   no such directory, repository, revision or file
    ├── CheckpointAccessError (PermissionError)       gated repository, or rejected token
    ├── CheckpointConnectionError (ConnectionError)   hub unreachable, and file not cached
    ├── CheckpointFileError (ValueError)              truncated, corrupt or invalid file
    └── CheckpointMismatchError (ValueError)          weights do not fit the model
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

# "name" or "owner/name". A leading dot, a "~" or a second slash makes it a path.
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class CheckpointError(Exception):
    """A checkpoint cannot be used."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The directory, repository, revision or file does not exist."""


class CheckpointAccessError(CheckpointError, PermissionError):
    """The repository is gated, or the hub rejected the token."""


class CheckpointConnectionError(CheckpointError, ConnectionError):
    """The hub is unreachable, and the file is not in the cache."""


class CheckpointFileError(CheckpointError, ValueError):
    """A file is truncated, corrupt or invalid."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """Names, shapes or dtypes of the weights do not fit the model."""


class HubOptions(TypedDict, total=False):
    """The options of `fetch`, for the signatures of functions that pass them on.

    Attributes:
        revision: branch, tag or commit of the repository. Default: the main branch.
        cache_dir: download directory. Default: that of the hub library (HF_HUB_CACHE, HF_HOME).
        token: access token; True or None: HF_TOKEN or the token of `hf auth login`; False: none.
        local_files_only: use only the cache, never the network. HF_HUB_OFFLINE=1 has the same effect.
    """

    revision: str | None
    cache_dir: str | os.PathLike[str] | None
    token: str | bool | None
    local_files_only: bool


def fetch(
    name_or_path: str | os.PathLike[str],
    filenames: str | Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Returns the local path of the first of `filenames` that the checkpoint has, downloading it if needed.

    Args:
        name_or_path: a local directory, or a hub id such as "google/vivit-b-16x2-kinetics400". An existing directory
            takes precedence.
        filenames: one file name, or several in order of preference.
        revision: see HubOptions, also for the other options. They have no effect on a local directory.

    Raises:
        CheckpointNotFoundError: The directory, repository, revision or file does not exist.
        CheckpointAccessError: The repository is gated, or the hub rejected the token.
        CheckpointConnectionError: The hub is unreachable, and no such file is in the cache.
    """
    filenames = [filenames] if isinstance(filenames, str) else list(filenames)
    if os.path.isdir(name_or_path):
        return _find(Path(name_or_path), filenames)
    if os.path.exists(name_or_path):
        raise CheckpointNotFoundError(f"{name_or_path} is a file, expected a directory")
    if isinstance(name_or_path, os.PathLike) or not HUB_ID.fullmatch(name_or_path):
        raise CheckpointNotFoundError(f"there is no directory {os.fspath(name_or_path)!r}")
    return _download(
        name_or_path,
        filenames,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        CheckpointFileError: The file is unreadable or holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointFileError(f"{path}: expected a JSON object, cannot read it: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointFileError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object with sorted keys to a file, and creates its directory if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _find(directory: Path, filenames: list[str]) -> Path:
    for filename in filenames:
        if (directory / filename).is_file():
            return directory / filename
    hint = ": save_pretrained of the image processor writes it" if "preprocessor_config.json" in filenames else ""
    raise CheckpointNotFoundError(f"{directory} has no {' or '.join(filenames)}{hint}")


def _download(
    repository: str,
    filenames: list[str],
    *,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    # Imported here because a serving worker reads a local directory and never needs the hub library.
    from huggingface_hub import errors, hf_hub_download

    unreachable = None
    for filename in filenames:
        try:
            path = hf_hub_download(
                repository,
                filename,
                revision=revision,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                token=token,
                local_files_only=local_files_only,
            )
            return Path(path)
        except errors.LocalEntryNotFoundError as error:
            # Look for the other names in the cache only: another attempt to connect would take half a minute.
            unreachable, local_files_only = unreachable or error, True
        except errors.EntryNotFoundError:
            continue
        # Versions of the library use different HTTP clients (requests, httpx), which raise different errors.
        except Exception as error:
            raise _translate(error, repository, revision) from error
    wanted = " or ".join(filenames)
    if unreachable is not None:
        raise CheckpointConnectionError(
            f"{repository} is not a local directory, the cache does not contain its {wanted}, and the hub cannot be "
            f"reached: {unreachable.__cause__ or unreachable}"
        ) from unreachable
    raise CheckpointNotFoundError(f"{repository} has no {wanted}")


def _translate(error: Exception, repository: str, revision: str | None) -> CheckpointError:
    """Returns our error for an exception of the hub library."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):  # a subclass of RepositoryNotFoundError
        return CheckpointAccessError(
            f"{repository} is a gated repository: request access on its page, then pass a token of that account "
            "(token=..., or HF_TOKEN in the environment)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointNotFoundError(
            f"{repository} is neither a local directory nor a visible repository on the hub "
            "(a private one needs token=..., or HF_TOKEN in the environment)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointNotFoundError(f"{repository} has no revision {revision!r}")
    if isinstance(error, errors.HFValidationError):
        return CheckpointNotFoundError(f"{repository!r} is neither a local directory nor a valid hub id: {error}")
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        return CheckpointAccessError(f"the hub rejected the token for {repository}: {error}")
    return CheckpointConnectionError(f"{repository} could not be downloaded: {error}")
