"""Workarounds for bugs and limitations of TorchServe 0.12.0.

Each docstring states the problem and how to find out that the workaround is no longer needed.
"""

import atexit
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ts.service import Service
from ts.torch_handler.base_handler import BaseHandler

from handler.threads import count_workers

logger = logging.getLogger(__name__)

WORKER_SCRIPT = "model_service_worker.py"
SEQUENCE_HEADER_PREFIX = "ts_request_sequence_"


class Context(Protocol):
    """The part of ts.context.Context that the handler uses; TorchServe has no type hints."""

    model_name: str
    manifest: dict[str, Any]
    model_yaml_config: dict[str, Any] | None
    system_properties: dict[str, Any]
    request_ids: dict[int, str]
    metrics: Any

    def get_request_id(self, idx: int) -> str | None: ...

    def get_all_request_header(self, idx: int) -> dict[str, Any]: ...

    def set_response_content_type(self, idx: int, value: str) -> None: ...

    def set_response_header(self, idx: int, key: str, value: str) -> None: ...

    def set_response_status(self, code: int, phrase: str, idx: int) -> None: ...


class PerRequestHandler(BaseHandler):  # type: ignore[misc]  # TorchServe has no type hints
    """A BaseHandler whose `handle` always runs the three hooks.

    Problem: BaseHandler reads the headers `describe` and `explain` of the first request, which any client can send, and
        answers the whole batch accordingly. The hooks must check each request's headers instead.
    Obsolete when: BaseHandler.handle no longer calls `_is_describe` and `_is_explain`.
    """

    def _is_describe(self) -> bool:
        return False

    def _is_explain(self) -> bool:
        return False


def request_headers(context: Context, index: int) -> dict[str, str]:
    """Returns the HTTP headers of one request; a gRPC request has none.

    Problem: TorchServe mixes them with dictionaries that contain the content type of each part of a form.
    Obsolete when: ts.service.Service.retrieve_data_for_inference keeps the two apart.
    """
    headers = context.get_all_request_header(index)
    return {name: value for name, value in headers.items() if not isinstance(value, dict)}


def repair_rows() -> None:
    """Makes TorchServe pass on repeated parts of a request, and keep no second reference to its content.

    Problem: the worker puts the parts of a form or query string into a dictionary by name, so that the last one
        silently replaces the others with its name. With this function the row gets a tuple of all values.
    Obsolete when: a form with two parts named `video` gets `several_videos` without this function.

    Problem: the worker keeps the message with all uploads of a batch until it has received the next batch.
    Obsolete when: ts.model_service_worker deletes `msg` before it waits for the next one.
    """
    if Service.retrieve_data_for_inference is not _retrieve_data_and_empty_message:
        Service.retrieve_data_for_inference = staticmethod(_retrieve_data_and_empty_message)


_retrieve_data = Service.retrieve_data_for_inference


def _retrieve_data_and_empty_message(batch: Sequence[Mapping[str, Any]]) -> tuple[Any, list[dict[str, Any]], Any]:
    processors, rows, request_ids = _retrieve_data(batch)
    for request, row in zip(batch, rows):
        counts = Counter(parameter["name"] for parameter in request["parameters"])
        for name in [name for name, count in counts.items() if count > 1]:
            row[name] = tuple(each["value"] for each in request["parameters"] if each["name"] == name)
        request["parameters"].clear()
    return processors, rows, request_ids


def end_grpc_stream(context: Context, index: int) -> None:
    """Marks the response as the last one of its stream, if the request came over gRPC.

    Problem: without the header TorchServe fails to answer StreamPredictions, and the worker exits.
    Obsolete when: tests/server pass a StreamPredictions call without this function.
    """
    if not request_headers(context, index):
        context.set_response_header(index, "ts_stream_next", "false")


def is_closed_stream(context: Context, index: int) -> bool:
    """Returns whether a request is a StreamPredictions2 call, whose response must be withheld.

    Problem: TorchServe closes such a call immediately for a model without sequences, but still passes the request on.
        Answering it fails, and the worker exits and is not restarted.
    Obsolete when: a StreamPredictions2 call reaches no worker of a model without sequence batching.
    """
    headers = request_headers(context, index)
    return bool(headers) and all(name.startswith(SEQUENCE_HEADER_PREFIX) for name in headers)


def withhold_response(context: Context, index: int) -> None:
    """Prevents TorchServe from sending the response of one request; see `is_closed_stream`."""
    del context.request_ids[index]  # TorchServe sends no response without a request id


def stop_server_after_lost_worker() -> None:
    """Registers `stop_server_without_workers` to run when this worker exits. Does nothing outside a worker."""
    if Path(sys.argv[0]).name == WORKER_SCRIPT:
        atexit.register(stop_server_without_workers)


def stop_server_without_workers(*, patience_s: float = 20) -> None:
    """Stops the server if this worker exits without being noticed and was the last one.

    Problem: if a gRPC client cancels a call at the moment of its answer, the front end's thread for this worker dies,
        and the worker is not replaced. The server still reports that it is healthy and accepts requests, but never
        answers them. If the server stops instead, its process supervisor can restart it. In all other cases TorchServe
        kills the worker before `patience_s` has passed.
    Obsolete when: cancelling many gRPC calls no longer reduces the number of workers in the model's description.

    Args:
        patience_s: seconds to wait for TorchServe to kill this worker, which it normally does.
    """
    server_pid = os.getppid()
    deadline_s = time.monotonic() + patience_s
    while time.monotonic() < deadline_s:
        if os.getppid() != server_pid:  # the server has exited
            return
        time.sleep(0.1)
    logger.critical("TorchServe has lost a worker and does not replace it")
    if count_workers() == 1:  # only this one
        logger.critical("no worker is left: stopping the server, so that its supervisor can restart it")
        os.kill(server_pid, signal.SIGTERM)
