"""Where a checkpoint's files come from: a local directory, or a repository of the Hugging Face hub.

Every error about a checkpoint, wherever it is raised, is one of these. The parents from the standard library
let `except OSError` and `except ValueError`, as users of `transformers` write them, go on working.

    CheckpointError
    ├── CheckpointNotFoundError (FileNotFoundError)   no such directory, repository, revision or file
    ├── CheckpointAccessError (PermissionError)       a gated repository, or a token that is not accepted
    ├── CheckpointConnectionError (ConnectionError)   the hub cannot be asked, nor the cache help
    ├── CheckpointFileError (ValueError)              a file is there and is not what it should be
    └── CheckpointMismatchError (ValueError)          the weights are not those of the model (checkpoint.py)
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# "name" or "owner/name", as the hub spells them. A leading dot, a "~" or a second slash makes it a path.
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class CheckpointError(Exception):
    """A checkpoint cannot be used."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such directory, repository, revision or file."""


class CheckpointAccessError(CheckpointError, PermissionError):
    """The repository is gated, or the token is not accepted."""


class CheckpointConnectionError(CheckpointError, ConnectionError):
    """The hub cannot be asked, and the cache does not have the file."""


class CheckpointFileError(CheckpointError, ValueError):
    """A file is there and is not what it should be: truncated, corrupt, or of another kind."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """The weights are not those of the model: names or shapes differ."""


def fetch(
    name_or_path: str | os.PathLike,
    filenames: str | Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local path of the first of `filenames` that the checkpoint has.

    name_or_path      a local directory, or a hub id such as "google/vivit-b-16x2-kinetics400"
    filenames         one file name, or several in order of preference
    revision          branch, tag or commit of the hub repository; None: its main branch. Not for a directory
    cache_dir         where downloads are kept; None: the hub library's own place (HF_HUB_CACHE, HF_HOME)
    token             of an account that may read the repository; None: HF_TOKEN, or that of the login
    local_files_only  never ask the hub, use what the cache has. HF_HUB_OFFLINE=1 does the same

    Raises CheckpointNotFoundError, CheckpointAccessError or CheckpointConnectionError.
    """
    filenames = [filenames] if isinstance(filenames, str) else list(filenames)
    if os.path.isdir(name_or_path):
        return _find(Path(name_or_path), filenames)
    if os.path.exists(name_or_path):
        raise CheckpointNotFoundError(f"{name_or_path} is a file: expected the directory that holds it")
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
    """The JSON object that the file at `path` holds. Raises CheckpointFileError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointFileError(f"{path}: expected a JSON object, cannot read it: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointFileError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _find(directory: Path, filenames: list[str]) -> Path:
    for filename in filenames:
        if (directory / filename).is_file():
            return directory / filename
    hint = ": the image processor's save_pretrained writes it" if "preprocessor_config.json" in filenames else ""
    raise CheckpointNotFoundError(f"{directory} has no {' or '.join(filenames)}{hint}")


def _download(repository: str, filenames: list[str], *, local_files_only: bool, **options: Any) -> Path:
    # Imported here: a serving worker reads a directory and never needs the hub's library.
    from huggingface_hub import errors, hf_hub_download

    unreachable = None
    for filename in filenames:
        try:
            return Path(hf_hub_download(repository, filename, local_files_only=local_files_only, **options))
        except errors.LocalEntryNotFoundError as error:
            # The cache may have one of the next names. The hub is not asked again: that takes half a minute.
            unreachable, local_files_only = unreachable or error, True
        except errors.EntryNotFoundError:
            continue
        # The library's HTTP client differs between versions (requests, httpx, httpx2), and so do its errors.
        except Exception as error:
            raise _ours(error, repository, options["revision"]) from error
    wanted = " or ".join(filenames)
    if unreachable is not None:
        raise CheckpointConnectionError(
            f"{repository} is no local directory, the cache has no {wanted} of it, and the hub cannot be "
            f"asked: {unreachable.__cause__ or unreachable}"
        ) from unreachable
    raise CheckpointNotFoundError(f"{repository} has no {wanted}")


def _ours(error: Exception, repository: str, revision: str | None) -> CheckpointError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):  # before RepositoryNotFoundError, its parent
        return CheckpointAccessError(
            f"{repository} is a gated repository: ask for access on its page, then give a token of that "
            "account (token=..., or HF_TOKEN in the environment)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointNotFoundError(
            f"{repository} is no local directory, and no repository of the hub that can be seen from here "
            "(a private one needs token=..., or HF_TOKEN in the environment)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointNotFoundError(f"{repository} has no revision {revision!r}")
    if isinstance(error, errors.HFValidationError):
        return CheckpointNotFoundError(f"{repository!r} is no local directory and no hub id: {error}")
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        return CheckpointAccessError(f"the hub does not accept the token given for {repository}: {error}")
    return CheckpointConnectionError(f"{repository} could not be downloaded: {error}")
