"""Messages between a worker and its decoder processes: framing and serialization.

A message is a JSON header and a binary payload, each preceded by its length:

    header bytes (8) | payload bytes (8) | header | payload

    worker -> process    {"threads": 4, ...}                  the video file
    process -> worker    {"ready": {"active": [...], ...}}    none; sent once, after the start
                         {"received": true}                   none; the file has arrived
                         {"clip": {...}}                      the clip's pixels
                         {"error": {"code": ..., ...}}        none; a VideoError
                         {"failure": "Traceback ..."}         none; any other exception

A crafted video could take over a decoder process. Therefore nothing that a process sends is unpickled, the receiver
limits lengths before it allocates memory, and replies.py checks every value.

multiprocessing.connection has no timeout within a message. It is also slower, because it allocates an object of the
payload's full size for each read from the socket: a 1 MB video took 3 times as long, and a 100 MB video 1.4 times as
long with 18 % more memory.
"""

import dataclasses
import json
import socket
import struct
import time
import types
import typing
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

Bytes = bytes | bytearray | memoryview

MAX_HEADER_BYTES = 2**20
OUT_OF_MEMORY_STATUS = 12  # exit status (ENOMEM) of a process that has no memory for the file, sent instead of a reply

_LENGTHS = struct.Struct(">QQ")


class MessageError(Exception):
    """A message is longer than allowed, or its content is not what the receiver expects."""


def send_message(
    connection: socket.socket, header: Mapping[str, Any], payload: Bytes = b"", *, deadline_s: float | None = None
) -> None:
    """Sends a message.

    Args:
        connection: A stream socket.
        header: An object that `to_json` can serialize.
        payload: The bytes that follow.
        deadline_s: A `time.monotonic()` time to give up. Waits indefinitely by default.

    Raises:
        TimeoutError: The deadline has passed.
        OSError: The receiver has closed the connection.
    """
    text = to_json(header).encode()
    payload = memoryview(payload).cast("B")
    for data in (_LENGTHS.pack(len(text), len(payload)) + text, payload):
        view = memoryview(data)
        while view:
            connection.settimeout(_remaining_s(deadline_s))
            view = view[connection.send(view) :]


def receive_message(
    connection: socket.socket, *, max_payload_bytes: int, deadline_s: float | None = None
) -> tuple[dict[str, Any], bytearray]:
    """Receives a message.

    Args:
        connection: A stream socket.
        max_payload_bytes: Maximum length of the payload.
        deadline_s: A `time.monotonic()` time to give up. Waits indefinitely by default.

    Returns:
        The header and the payload.

    Raises:
        TimeoutError: The deadline has passed.
        EOFError: The sender has closed the connection.
        OSError: The connection is broken.
        MessageError: The message is longer than allowed, or its header is not a JSON object.
    """
    header_bytes, payload_bytes = _LENGTHS.unpack(_receive_bytes(connection, _LENGTHS.size, deadline_s))
    if header_bytes > MAX_HEADER_BYTES or payload_bytes > max_payload_bytes:
        raise MessageError(
            f"expected at most {MAX_HEADER_BYTES} header bytes and {max_payload_bytes} payload bytes, "
            f"got {header_bytes} and {payload_bytes}"
        )
    try:
        header = json.loads(_receive_bytes(connection, header_bytes, deadline_s), parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"expected a JSON header: {error}") from error
    if not isinstance(header, dict):
        raise MessageError(f"expected a JSON object as the header, got {type(header).__name__}")
    return header, _receive_bytes(connection, payload_bytes, deadline_s)


def to_json(value: object) -> str:
    """Serializes JSON types, dataclasses and arrays, nested in any way."""
    return json.dumps(value, default=_to_plain)


def rebuild(annotation: Any, value: Any) -> Any:
    """Rebuilds a value from what `json.loads` returns for the output of `to_json`.

    Args:
        annotation: The type of the value. A dataclass is rebuilt field by field, each by its own annotation. Supports
            bool, int, float, str, None, tuples, unions, and one-dimensional arrays of numbers, which become float64.
        value: The output of `json.loads`.

    Raises:
        TypeError, ValueError: The value does not have this type.
    """
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        annotations = typing.get_type_hints(annotation)
        if not isinstance(value, dict) or not value.keys() <= annotations.keys():
            raise ValueError(f"expected the fields of {annotation.__name__}, got {value!r:.200}")
        return annotation(**{name: rebuild(annotations[name], field) for name, field in value.items()})
    if typing.get_origin(annotation) in (np.ndarray, NDArray):  # numpy 2.5 made NDArray[...] an alias of its own
        return np.array(rebuild(tuple[float, ...], value), np.float64)
    if isinstance(value, list):  # JSON has no tuples
        value = tuple(value)
    if not _has_type(value, annotation):
        raise ValueError(f"expected {annotation}, got {value!r:.200}")
    return value


def _has_type(value: Any, annotation: Any) -> bool:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_has_type(value, argument) for argument in arguments)
    if typing.get_origin(annotation) is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        return len(value) == len(arguments) and all(map(_has_type, value, arguments))
    return type(value) in ((int, float) if annotation is float else (annotation,))  # bool is not an int here


def _receive_bytes(connection: socket.socket, size: int, deadline_s: float | None) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        connection.settimeout(_remaining_s(deadline_s))
        count = connection.recv_into(view)
        if not count:
            raise EOFError("the sender has closed the connection")
        view = view[count:]
    return buffer


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _remaining_s(deadline_s: float | None) -> float | None:
    if deadline_s is None:
        return None
    remaining_s = deadline_s - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError("the deadline has passed")
    return remaining_s


def _to_plain(value: object) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"cannot serialize a {type(value).__name__}")
