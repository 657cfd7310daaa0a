"""Reads checkpoints that Flax wrote, without Flax or JAX.

    parameters = load_parameters(find_checkpoint(Path("vivit_large_factorised_encoder/")))

A file is a msgpack map, whose arrays have Flax's extension type. The parameters are `params`, or, in files of older
versions such as the released checkpoints of scenic, `target` in `optimizer`. Everything else is skipped.

Names of parameters are those of Flax, with "/" between modules.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handler.checkpoints.hub import CheckpointError, CheckpointFileError, CheckpointNotFoundError

Parameters = dict[str, NDArray[np.float32]]

# flax.serialization
ARRAY_TYPE = 1
CHUNKED_ARRAY = "__msgpack_chunked_array__"  # key of a map that has an array of more than 1 GB in several parts
FLOAT_TYPES = ("float16", "float32", "float64")
BFLOAT16 = "bfloat16"  # which NumPy does not know

MAX_LIST_LENGTH = 2**12  # msgpack allocates what a list claims; those of Flax have a few items


def find_checkpoint(path: Path) -> Path:
    """Returns the file of a checkpoint.

    Args:
        path: the file, or a folder that contains `checkpoint_STEP`, the one with the largest step counts, or
            `checkpoint`.

    Raises:
        CheckpointNotFoundError: there is no such file.
    """
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointNotFoundError(f"there is no file or folder {os.fspath(path)!r}")
        return path
    steps = {int(match[1]): file for file in path.iterdir() if (match := re.fullmatch(r"checkpoint_(\d+)", file.name))}
    found = steps[max(steps)] if steps else path / "checkpoint"
    if found.is_dir():
        raise CheckpointNotFoundError(f"{found} is a folder, as Orbax writes it; expected a file that Flax wrote")
    if not found.is_file():
        raise CheckpointNotFoundError(f"{path} has neither checkpoint_STEP nor checkpoint")
    return found


def load_parameters(path: Path) -> Parameters:
    """Reads the parameters of a checkpoint. Nothing is unpickled.

    Args:
        path: a file that `flax.training.checkpoints` wrote.

    Returns:
        float32 arrays by name.

    Raises:
        CheckpointFileError: the file is truncated, corrupt or of another format, or has no parameters.
        CheckpointError: msgpack is not installed.
        OSError: the file cannot be read.
    """
    try:
        import msgpack
    except ModuleNotFoundError as error:
        raise CheckpointError("checkpoints of Flax are read with msgpack: pip install msgpack") from error
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        unpacker = msgpack.Unpacker(
            file, read_size=2**24, max_buffer_size=2**31 - 1, max_array_len=MAX_LIST_LENGTH, strict_map_key=False
        )
        try:
            tree = _read_parameters(unpacker)
            read_bytes = unpacker.tell()
        except Exception as error:  # corrupt files raise many different exceptions
            reason = str(error) or type(error).__name__
            raise CheckpointFileError(
                f"{path}: expected a checkpoint that Flax wrote; the file is truncated, corrupt or of another format: "
                f"{reason}"
            ) from error
    if read_bytes != size_bytes:
        raise CheckpointFileError(
            f"{path}: expected a checkpoint that Flax wrote, got {size_bytes - read_bytes} more bytes after its end"
        )
    if not isinstance(tree, dict):
        raise CheckpointFileError(
            f"{path}: expected the parameters as `params`, or as `target` in `optimizer`, got neither"
        )
    try:
        return dict(_arrays(tree.get("params", tree), msgpack))
    except CheckpointFileError as error:
        raise CheckpointFileError(f"{path}: {error}") from error


def _read_parameters(unpacker: Any) -> Any:
    """Reads the parameters in the map that comes next and skips everything else. None: there are none."""
    found = None
    for _ in range(unpacker.read_map_header()):
        key = unpacker.unpack()
        if key in ("params", "target"):
            found = unpacker.unpack()
        elif key == "optimizer":
            found = _read_parameters(unpacker)
        else:
            unpacker.skip()
    return found


def _arrays(tree: Any, msgpack: Any) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yields names and arrays of nested maps, and empties these to save memory."""
    waiting = [("", tree)]  # not recursive, because a file can nest maps deeply
    while waiting:
        name, value = waiting.pop()
        if not isinstance(value, dict) or CHUNKED_ARRAY in value:
            yield name, _read_array(name, value, msgpack)
            continue
        waiting.extend((f"{name}/{key}" if name else str(key), value.pop(key)) for key in list(value))


def _read_array(name: str, value: Any, msgpack: Any) -> NDArray[np.float32]:
    try:
        if isinstance(value, dict):
            parts = [_read_array(name, part, msgpack) for part in _items(value["chunks"])]
            return np.concatenate(parts).reshape([_length(length) for length in _items(value["shape"])])
        if not isinstance(value, msgpack.ExtType) or value.code != ARRAY_TYPE:
            raise ValueError(f"got {type(value).__name__}")
        shape, dtype, content = msgpack.unpackb(value.data, max_array_len=MAX_LIST_LENGTH)
        if dtype == BFLOAT16:  # the upper half of a float32
            array = (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif dtype in FLOAT_TYPES:
            array = np.frombuffer(content, np.dtype(dtype).newbyteorder("<")).astype(np.float32)
        else:
            raise ValueError(f"got the type {dtype!r}")
        return array.reshape([_length(length) for length in shape])
    except Exception as error:  # corrupt files raise many different exceptions
        raise CheckpointFileError(f"expected {name!r} to be an array of floating-point numbers: {error}") from error


def _items(numbered: Mapping[str, Any]) -> list[Any]:
    """Returns the values of a map with the keys "0", "1", ..., by which Flax stores a tuple."""
    return [numbered[str(index)] for index in range(len(numbered))]


def _length(value: Any) -> int:
    if not isinstance(value, int) or value < 0:  # reshape would infer -1
        raise ValueError(f"got the length {value!r}")
    return value
