"""Reads and writes weight files: safetensors or PyTorch pickles, whole or sharded."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from handler.checkpoints.hub import CheckpointFileError, CheckpointNotFoundError, HubOptions, fetch, read_json
from handler.checkpoints.names import canonical_name, to_published

if TYPE_CHECKING:
    from typing_extensions import Unpack

WEIGHTS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"  # of the file that lists the shards of a checkpoint
# In order of preference.
WEIGHTS_FILES = (WEIGHTS_FILE, WEIGHTS_FILE + INDEX_SUFFIX, PICKLE_FILE, PICKLE_FILE + INDEX_SUFFIX)


def load_state_dict(name_or_path: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> dict[str, torch.Tensor]:
    """Loads the weights of a checkpoint from the first of WEIGHTS_FILES that it has.

    Args:
        name_or_path: a local directory or a hub id.
        **hub: see `handler.checkpoints.hub.fetch`.

    Returns:
        Tensors on the CPU, in their stored dtype, by their published names with the "vivit." prefix. The files may use
        either foreign naming of `names.NAMES`, with or without the prefix.

    Raises:
        CheckpointError: The errors of `fetch`; CheckpointFileError for an unreadable file, a pickle that holds anything
            but tensors, an index that points outside the checkpoint, or two tensors of the same name.
    """
    path = fetch(name_or_path, WEIGHTS_FILES, **hub)
    paths = _fetch_shards(name_or_path, path, **hub) if path.name.endswith(INDEX_SUFFIX) else [path]
    state: dict[str, torch.Tensor] = {}
    stored_names: dict[str, str] = {}
    for path in paths:
        for name, tensor in read_tensors(path).items():
            canonical = canonical_name(name)
            if canonical in state:
                first = stored_names[canonical]
                raise CheckpointFileError(f"{path}: {canonical} occurs twice, as {first} and as {name}")
            state[canonical], stored_names[canonical] = tensor, name
    return state


def save_state_dict(ours: Mapping[str, torch.Tensor], directory: str | os.PathLike[str]) -> None:
    """Writes weights, given by our names, to model.safetensors in `directory`, by their published names."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    published = {name: tensor.contiguous() for name, tensor in to_published(ours).items()}
    path = Path(directory, WEIGHTS_FILE)
    path.touch()
    mode = path.stat().st_mode
    # Some versions of transformers reject a file without this entry.
    save_file(published, path, metadata={"format": "pt"})
    path.chmod(mode)  # some versions of safetensors write a file that only its owner can read


def weights_sha256(name_or_path: str | os.PathLike[str]) -> str:
    """Returns the SHA-256 of the file that `load_weights` reads; for several shards, of their contents in order."""
    path = fetch(name_or_path, WEIGHTS_FILES)
    digest = hashlib.sha256()
    for shard in _fetch_shards(name_or_path, path) if path.name.endswith(INDEX_SUFFIX) else [path]:
        with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as weights:
            digest.update(weights)
    return digest.hexdigest()


def _fetch_shards(name_or_path: str | os.PathLike[str], index: Path, **hub: Unpack[HubOptions]) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFileError(f"{index}: expected a weight_map from tensor names to file names")
    shards, missing = [], []
    for shard in sorted(set(map(str, weight_map.values()))):
        # The index is untrusted: a name such as ../../x must not refer to a file outside the checkpoint.
        if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", shard):
            raise CheckpointFileError(f"{index}: expected names of files in the same directory, got {shard!r}")
        try:
            shards.append(fetch(name_or_path, shard, **hub))
        except CheckpointNotFoundError:
            missing.append(shard)
    if missing:
        raise CheckpointNotFoundError(f"{name_or_path} has no {' and no '.join(missing)}, listed in {index.name}")
    return shards


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads one file, safetensors or a PyTorch pickle, with the names that it has.

    Raises:
        CheckpointFileError: the file is unreadable, or a pickle that holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Without weights_only, unpickling runs arbitrary code.
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt files raise many different exceptions
        raise CheckpointFileError(f"{path}: cannot read it, truncated, corrupt or unsafe: {error}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointFileError(f"{path}: expected a dict of tensors by name")
    return tensors
