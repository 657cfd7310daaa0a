"""From files to a state dict and back, and between the published names and ours. No nn.Module here.

The published layout keeps query, key and value apart; ours has them as one matrix, so that they are one multiplication.
The layout is changed here, at loading and saving, and never in a forward pass.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from handler.hub import CheckpointFileError, CheckpointMismatchError, CheckpointNotFoundError, fetch, read_json

WEIGHTS_FILE = "model.safetensors"
INDEX_SUFFIX = ".index.json"
# In order of preference. An index names the shards of a checkpoint that is cut into several files.
WEIGHTS_FILES = (WEIGHTS_FILE, WEIGHTS_FILE + INDEX_SUFFIX, "pytorch_model.bin", "pytorch_model.bin" + INDEX_SUFFIX)

PREFIX = "vivit."  # stands before every published name of a classification model but the classifier's
HEADS = ("vivit.pooler.", "classifier.")  # what one model has and another on the same encoder has not

# ours: (published, in the memory of transformers 5). {} is the number of the layer; ".weight" or ".bias" may follow.
# Where several of theirs are one of ours, they lie one below the other in the order given.
NAMES = {
    "embedding.cls_token": (["embeddings.cls_token"],) * 2,
    "embedding.position_embeddings": (["embeddings.position_embeddings"],) * 2,
    "embedding.projection": (["embeddings.patch_embeddings.projection"],) * 2,
    "layers.{}.layernorm_before": (["encoder.layer.{}.layernorm_before"], ["layers.{}.layernorm_before"]),
    "layers.{}.attention.qkv": (
        [f"encoder.layer.{{}}.attention.attention.{part}" for part in ("query", "key", "value")],
        [f"layers.{{}}.attention.{part}_proj" for part in "qkv"],
    ),
    "layers.{}.attention.output": (["encoder.layer.{}.attention.output.dense"], ["layers.{}.attention.o_proj"]),
    "layers.{}.layernorm_after": (["encoder.layer.{}.layernorm_after"], ["layers.{}.layernorm_after"]),
    "layers.{}.mlp.up": (["encoder.layer.{}.intermediate.dense"], ["layers.{}.mlp.fc1"]),
    "layers.{}.mlp.down": (["encoder.layer.{}.output.dense"], ["layers.{}.mlp.fc2"]),
    "layernorm": (["layernorm"],) * 2,
    "pooler": (["pooler.dense"],) * 2,
    "classifier": (["classifier"],) * 2,
}
_OURS = {name: (ours, part) for ours, namings in NAMES.items() for names in namings for part, name in enumerate(names)}


def to_published(ours: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names to the published ones; a "vivit." prefix stays, and so does a name that is not in NAMES.

    A pure function of a dict: it serves weights, gradients and optimiser states alike. The three parts of a fused
    (3 * D, D) or (3 * D,) tensor are views of it.
    """
    published = {}
    for name, tensor in ours.items():
        prefix, pattern, layer, suffix = _parse(name)
        if pattern not in NAMES:
            published[name] = tensor
            continue
        parts = NAMES[pattern][0]
        pieces = [tensor] if len(parts) == 1 else tensor.chunk(len(parts))
        for part, piece in zip(parts, pieces):
            published[prefix + part.format(layer) + suffix] = piece
    return published


def from_published(published: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `to_published`; the names that transformers 5 has in memory are read as well.

    Raises CheckpointMismatchError where only some parts of a fused tensor are there.
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
        _, pattern, layer, suffix = _parse(own_name)
        expected = NAMES[pattern][0]
        if len(parts) < len(expected):
            missing = [name.format(layer) + suffix for part, name in enumerate(expected) if part not in parts]
            raise CheckpointMismatchError(f"missing beside the others of its layer: {', '.join(missing)}")
        in_order = [parts[part] for part in range(len(expected))]
        ours[own_name] = in_order[0] if len(in_order) == 1 else torch.cat(in_order)  # (3 * D, D) or (3 * D,)
    return ours


def match(
    published: Mapping[str, torch.Tensor], model_state: Mapping[str, torch.Tensor], *, source: Any
) -> dict[str, torch.Tensor]:
    """What `load_state_dict` below read, under the names of a model whose state dict is `model_state`.

    Of `model_state` only names and shapes count, so it may be on the "meta" device. A pooler or a classifier that the
    model does not have is left out. Everything else is strict: one CheckpointMismatchError lists all that is missing,
    unexpected, of the wrong shape or not of floating point, by published names. `source` tells it where they are from.
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
    """The weights of a checkpoint, as stored, on the CPU, under the published names with the "vivit." prefix.

    Reads the first there is of WEIGHTS_FILES; `hub` is the options of `hub.fetch`. Names in the files may be the
    published ones or those that transformers 5 has in memory, with or without the prefix.

    Raises CheckpointError: what `hub.fetch` raises, and CheckpointFileError for a file that cannot be read, a pickle
    that holds anything but tensors, an index that leads out of the directory, or two tensors of one name.
    """
    path = fetch(name_or_path, WEIGHTS_FILES, **hub)
    paths = _fetch_shards(name_or_path, path, **hub) if path.name.endswith(INDEX_SUFFIX) else [path]
    state, stored_as = {}, {}
    for path in paths:
        for name, tensor in _read_tensors(path).items():
            published = _canonical(name)
            if published in state:
                raise CheckpointFileError(
                    f"{path}: {published} is there twice, as {stored_as[published]} and as {name}"
                )
            state[published], stored_as[published] = tensor, name
    return state


def save_state_dict(ours: Mapping[str, torch.Tensor], directory: str | os.PathLike) -> None:
    """Write weights under our names as model.safetensors, with the published names, into `directory`."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    published = {name: tensor.contiguous() for name, tensor in to_published(ours).items()}
    save_file(published, Path(directory, WEIGHTS_FILE), metadata={"format": "pt"})  # transformers asks for the format


def _parse(name: str) -> tuple[str, str, str, str]:
    """"vivit.layers.7.mlp.up.bias" -> ("vivit.", "layers.{}.mlp.up", "7", ".bias")."""
    prefix, module, suffix = re.fullmatch(r"(vivit\.)?(.*?)(\.weight|\.bias)?", name, re.DOTALL).groups(default="")
    before, layer, after = re.fullmatch(r"(.*?layers?\.)?(\d*)(.*)", module, re.DOTALL).groups(default="")
    return prefix, f"{before}{{}}{after}" if layer else module, layer, suffix


def _canonical(name: str) -> str:
    """The published name, with the prefix, of a name in any naming; an unknown name is returned as it is."""
    _, pattern, layer, suffix = _parse(name)
    if pattern not in _OURS:
        return name
    ours, part = _OURS[pattern]
    prefix = "" if ours == "classifier" else PREFIX
    return prefix + NAMES[ours][0][part].format(layer) + suffix


def _fetch_shards(name_or_path: str | os.PathLike, index_path: Path, **hub: Any) -> list[Path]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFileError(f"{index_path}: expected a weight_map of tensor names to file names")
    shards, missing = [], []
    for shard in sorted(set(map(str, weight_map.values()))):
        # An index is data from elsewhere: a name such as ../../x must not lead out of the checkpoint.
        if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", shard):
            raise CheckpointFileError(f"{index_path}: expected names of files beside it, got {shard!r}")
        try:
            shards.append(fetch(name_or_path, shard, **hub))
        except CheckpointNotFoundError:
            missing.append(shard)
    if missing:
        raise CheckpointNotFoundError(f"{name_or_path} has no {' and no '.join(missing)}, named by {index_path.name}")
    return shards


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)  # weights_only: a pickle may run anything
    except Exception as error:  # a broken file fails in as many ways as there are places to break it
        raise CheckpointFileError(f"{path}: cannot read it, truncated, corrupt or unsafe: {error}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointFileError(f"{path}: expected a dict of tensors by name")
    return tensors
