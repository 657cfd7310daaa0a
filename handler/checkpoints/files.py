"""From files to a state dict and back, and between the published names and ours. No nn.Module here.

The published layout keeps query, key and value apart; ours has them in one matrix, for one multiplication.
The layout is changed here, when weights are loaded and saved, and never in a forward pass.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from handler.checkpoints.hub import (
    CheckpointFileError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    fetch,
    read_json,
)

WEIGHTS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
INDEX = ".index.json"  # names the shards of a checkpoint that is cut into several files
# In order of preference.
WEIGHTS_FILES = (WEIGHTS_FILE, WEIGHTS_FILE + INDEX, PICKLE_FILE, PICKLE_FILE + INDEX)

PREFIX = "vivit."  # before every published name of a classification model, the classifier's excepted
HEADS = ("vivit.pooler.", "classifier.")  # what only one of two models on the same encoder has

# Ours, published, and what transformers 5 has in memory. {} is the number of the layer; ".weight" or ".bias"
# may follow. Rows with one name of ours are parts of one tensor, stacked in this order into (3 * D, D).
NAMES = (
    ("embedding.cls_token", "embeddings.cls_token", "embeddings.cls_token"),
    ("embedding.position_embeddings", "embeddings.position_embeddings", "embeddings.position_embeddings"),
    (
        "embedding.projection",
        "embeddings.patch_embeddings.projection",
        "embeddings.patch_embeddings.projection",
    ),
    ("layers.{}.layernorm_before", "encoder.layer.{}.layernorm_before", "layers.{}.layernorm_before"),
    ("layers.{}.attention.qkv", "encoder.layer.{}.attention.attention.query", "layers.{}.attention.q_proj"),
    ("layers.{}.attention.qkv", "encoder.layer.{}.attention.attention.key", "layers.{}.attention.k_proj"),
    ("layers.{}.attention.qkv", "encoder.layer.{}.attention.attention.value", "layers.{}.attention.v_proj"),
    ("layers.{}.attention.output", "encoder.layer.{}.attention.output.dense", "layers.{}.attention.o_proj"),
    ("layers.{}.layernorm_after", "encoder.layer.{}.layernorm_after", "layers.{}.layernorm_after"),
    ("layers.{}.mlp.up", "encoder.layer.{}.intermediate.dense", "layers.{}.mlp.fc1"),
    ("layers.{}.mlp.down", "encoder.layer.{}.output.dense", "layers.{}.mlp.fc2"),
    ("layernorm", "layernorm", "layernorm"),
    ("pooler", "pooler.dense", "pooler.dense"),
    ("classifier", "classifier", "classifier"),
)
_PUBLISHED = {ours: [row[1] for row in NAMES if row[0] == ours] for ours, _, _ in NAMES}
_OURS = {
    name: (ours, _PUBLISHED[ours].index(published))
    for ours, published, in_memory in NAMES
    for name in (published, in_memory)
}


def to_published(ours: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From our names to the published ones; the "vivit." prefix is kept where it is.

    A pure function of a dict: it serves weights, gradients and optimiser states alike. Parts of a fused
    tensor are views of it. Names that are not in NAMES stay as they are.
    """
    published = {}
    for name, tensor in ours.items():
        prefix, pattern, layer, suffix = _parse(name)
        if pattern not in _PUBLISHED:
            published[name] = tensor
            continue
        parts = _PUBLISHED[pattern]
        pieces = [tensor] if len(parts) == 1 else tensor.chunk(len(parts))
        for part, piece in zip(parts, pieces):
            published[prefix + part.format(layer) + suffix] = piece
    return published


def from_published(published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `to_published`, which also reads the names that transformers 5 has in memory.

    Raises CheckpointMismatchError where a fused tensor is there in part only.
    """
    ours, pieces = {}, {}
    for name, tensor in published.items():
        prefix, pattern, layer, suffix = _parse(name)
        if pattern not in _OURS:
            ours[name] = tensor
            continue
        own_pattern, part = _OURS[pattern]
        own_name = prefix + own_pattern.format(layer) + suffix
        pieces.setdefault(own_name, {})[part] = tensor
    for own_name, parts in pieces.items():
        prefix, pattern, layer, suffix = _parse(own_name)
        names = [prefix + part.format(layer) + suffix for part in _PUBLISHED[pattern]]
        if missing := [name for part, name in enumerate(names) if part not in parts]:
            raise CheckpointMismatchError(f"parts of {own_name} are missing: {', '.join(missing)}")
        in_order = [parts[part] for part in range(len(names))]
        ours[own_name] = in_order[0] if len(in_order) == 1 else torch.cat(in_order)  # (3 * D, D) or (3 * D,)
    return ours


def match(
    published: Mapping[str, torch.Tensor], model_state: Mapping[str, torch.Tensor], *, source: Any
) -> dict[str, torch.Tensor]:
    """What `load_state_dict` has read, under the names of the model whose state dict is `model_state`.

    Of `model_state` only names and shapes count, so it may be on the "meta" device. A pooler or a classifier
    that the model does not have is left out. Everything else is strict: one CheckpointMismatchError lists all
    that is missing, unexpected, of the wrong shape or not of floating point, by published names and with
    `source`, where they are from.
    """
    expected = {_canonical(name): tensor for name, tensor in to_published(model_state).items()}
    for head in HEADS:
        if not any(name.startswith(head) for name in expected):
            published = {name: tensor for name, tensor in published.items() if not name.startswith(head)}
    problems = [f"missing: {name}" for name in expected if name not in published]
    problems += [f"unexpected: {name}" for name in published if name not in expected]
    for name, tensor in published.items():
        shape, wanted = tuple(tensor.shape), tuple(expected.get(name, tensor).shape)
        if shape != wanted:
            problems.append(f"wrong shape: {name}: expected {wanted}, got {shape}")
        if not tensor.is_floating_point():
            problems.append(f"wrong type: {name}: expected floating point, got {tensor.dtype}")
    if problems:
        lines = "\n  ".join(problems)
        raise CheckpointMismatchError(f"the weights of {source} are not those of the model:\n  {lines}")
    ours = from_published(published)
    return {name: ours[name if name in ours else PREFIX + name] for name in model_state}


def load_state_dict(name_or_path: str | os.PathLike, **hub: Any) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, of the dtype they are stored in, on the CPU.

    Reads the first of WEIGHTS_FILES that is there; `hub` is the options of `hub.fetch`. The files may have
    either naming in NAMES, with the prefix or without; what is returned is published names with it.

    Raises CheckpointError: those of `hub.fetch`, and CheckpointFileError for a file that cannot be read, a
    pickle of anything but tensors, an index that leads elsewhere, and two tensors of one name.
    """
    path = fetch(name_or_path, WEIGHTS_FILES, **hub)
    paths = _fetch_shards(name_or_path, path, **hub) if path.name.endswith(INDEX) else [path]
    state, names = {}, {}
    for path in paths:
        for name, tensor in _read_tensors(path).items():
            published = _canonical(name)
            if published in state:
                also = names[published]
                raise CheckpointFileError(f"{path}: {published} is there twice, as {also} and as {name}")
            state[published], names[published] = tensor, name
    return state


def save_state_dict(ours: Mapping[str, torch.Tensor], directory: str | os.PathLike) -> None:
    """Write weights under our names as the model.safetensors of `directory`, with the published names."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    published = {name: tensor.contiguous() for name, tensor in to_published(ours).items()}
    # Some versions of transformers refuse a file that does not say whose tensors it holds.
    save_file(published, Path(directory, WEIGHTS_FILE), metadata={"format": "pt"})


def _parse(name: str) -> tuple[str, str, str, str]:
    """From "vivit.layers.7.mlp.up.bias" to ("vivit.", "layers.{}.mlp.up", "7", ".bias")."""
    prefix, module, suffix = re.fullmatch(r"(vivit\.)?(.*?)(\.weight|\.bias)?", name, re.DOTALL).groups("")
    before, layer, after = re.fullmatch(r"(.*?layers?\.)?(\d*)(.*)", module, re.DOTALL).groups("")
    return prefix, f"{before}{{}}{after}" if layer else module, layer, suffix


def _canonical(name: str) -> str:
    """The published name, prefix included, for a name of any naming; an unknown name stays as it is."""
    _, pattern, layer, suffix = _parse(name)
    if pattern not in _OURS:
        return name
    ours, part = _OURS[pattern]
    published = _PUBLISHED[ours][part].format(layer) + suffix
    return published if ours == "classifier" else PREFIX + published


def _fetch_shards(name_or_path: str | os.PathLike, index: Path, **hub: Any) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFileError(f"{index}: expected a weight_map from names of tensors to names of files")
    shards, missing = [], []
    for shard in sorted(set(map(str, weight_map.values()))):
        # An index comes from elsewhere: a name such as ../../x must not lead out of the checkpoint.
        if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", shard):
            raise CheckpointFileError(f"{index}: expected names of files beside it, got {shard!r}")
        try:
            shards.append(fetch(name_or_path, shard, **hub))
        except CheckpointNotFoundError:
            missing.append(shard)
    if missing:
        wanted = " and no ".join(missing)
        raise CheckpointNotFoundError(f"{name_or_path} has no {wanted}, named by {index.name}")
    return shards


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)  # any other pickle may run code
    except Exception as error:  # a broken file fails in as many ways as there are places to break it
        raise CheckpointFileError(f"{path}: cannot read it, truncated, corrupt or unsafe: {error}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointFileError(f"{path}: expected a dict of tensors by name")
    return tensors
