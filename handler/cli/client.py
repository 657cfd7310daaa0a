"""The client of a running server: classifies one video over REST or gRPC.

    answer = classify_rest(Path("clip.mp4"), url="http://127.0.0.1:8080", parameters={"top_k": 3}, token=key)
    answer = classify_grpc(Path("clip.mp4"), address="127.0.0.1:7070", token=key)

Both return an Answer even on failure: a file that cannot be read, a connection that cannot be made and TorchServe's
own errors all become `{"error": {"code", "message"}}`.
"""

import base64
import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from handler.assets import ASSETS

DEFAULT_URL = "http://127.0.0.1:8080"
DEFAULT_MODEL = "vivit"
DEFAULT_TIMEOUT_S = 300.0
UNLIMITED = -1
# HTTP statuses of errors on the server's side: of the handler, of TorchServe, and of a proxy that limits the rate or
# whose server restarts.
TRANSIENT_STATUSES = (429, 500, 502, 503, 507)
# gRPC has no HTTP status. These are the handler's codes for 500 and 507, and what TorchServe 0.12 reports as INTERNAL
# or RESOURCE_EXHAUSTED when a worker exits, and as INTERNAL when the queue is full.
TRANSIENT_CODES = ("internal_error", "decoders_busy", "out_of_memory")
TRANSIENT_MESSAGES = ("Worker died.", "has no worker to serve inference request")

SendAs = Literal["raw", "multipart", "json"]
Call = Literal["predictions", "explanations"]
Parameters = Mapping[str, str | int | bytes]


class MissingPackageError(ImportError):
    """A package that the client needs is not installed."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """The response to one request.

    Attributes:
        body: `{"predictions", "video", "warnings"}`, with several label heads also `"heads"`, with an
            explanation also `"explanation"`, or `{"error": {"code", "message"}}`.
        status: HTTP status; None over gRPC and if no response arrived.
        is_from_handler: whether the handler produced the body. False for TorchServe's own errors and for failures on
            the client's side.
    """

    body: dict[str, Any]
    status: int | None = None
    is_from_handler: bool = False

    @property
    def error(self) -> dict[str, str] | None:
        """`{"code", "message"}`, or None if the video was classified."""
        return self.body.get("error")

    @property
    def is_transient(self) -> bool:
        """Whether the same request may succeed a moment later, because the server failed and not the request.

        Includes `out_of_memory`: other workers on the same device free their memory after each batch. Does not include
        failed connections, whose most frequent cause is a wrong address.
        """
        error = self.error
        return error is not None and (
            self.status in TRANSIENT_STATUSES
            or error["code"] in TRANSIENT_CODES
            or any(part in error["message"] for part in TRANSIENT_MESSAGES)
        )


def classify_rest(
    video: bytes | str | Path,
    *,
    url: str = DEFAULT_URL,
    model: str = DEFAULT_MODEL,
    parameters: Parameters | None = None,
    send_as: SendAs = "raw",
    call: Call = "predictions",
    headers: Mapping[str, str | bytes] | None = None,
    token: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Answer:
    """Classifies one video over REST.

    Args:
        video: bytes of a file, or its path.
        url: the server's inference address; `http://` is assumed if it has no scheme.
        model: name of the model, or `NAME/VERSION`.
        parameters: sent as headers with a raw body, otherwise as fields.
        send_as: `raw`: the file is the body. `multipart`: a form with the part `video`. `json`: an object with base64.
        call: TorchServe's API; "explanations" adds an explanation to the answer.
        headers: additional HTTP headers; they replace the client's own.
        token: the server's inference key.
        timeout_s: seconds without a byte from the server before giving up.

    Raises:
        MissingPackageError: requests is not installed.
    """
    requests = require("requests")
    try:
        data = _read(video)
    except OSError as error:
        return _unreadable_file(video, error)
    fields = dict(parameters or {})
    content: dict[str, Any] = {}
    all_headers: dict[str, str | bytes] = {**authorization(token)}
    if send_as == "raw":
        # A form's content type, which is what curl and others assume, would make TorchServe look for fields.
        all_headers["Content-Type"] = "application/octet-stream"
        for name, value in fields.items():
            all_headers[f"X-{name}".replace("_", "-").title()] = value if isinstance(value, bytes) else str(value)
        content["data"] = data
    elif send_as == "multipart":
        content.update(data=fields, files={"video": data})
    else:
        content["json"] = {"video": base64.b64encode(data).decode(), **fields}
    all_headers.update(headers or {})
    address = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        response = requests.post(f"{address}/{call}/{model}", headers=all_headers, timeout=timeout_s, **content)
    # All exceptions of requests are OSErrors. urllib3 and http.client raise a ValueError for an invalid host or header.
    except (OSError, ValueError) as error:
        return failure("no_answer", f"{type(error).__name__}: {error}")
    return read_answer(response.content, status=response.status_code)


def classify_grpc(
    video: bytes | str | Path,
    *,
    address: str,
    model: str = DEFAULT_MODEL,
    parameters: Parameters | None = None,
    token: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Answer:
    """Classifies one video over gRPC.

    Args:
        video: bytes of a file, or its path.
        address: the server's gRPC inference address, e.g. `127.0.0.1:7070`.
        model: name of the model, or `NAME/VERSION`.
        parameters: further entries of the input map.
        token: the server's inference key.
        timeout_s: seconds until the call is cancelled.

    Raises:
        MissingPackageError: grpcio or grpcio-tools is not installed.
    """
    grpc = require("grpc")
    messages, services = load_proto("inference.proto")
    try:
        inputs = {"data": _read(video)}
    except OSError as error:
        return _unreadable_file(video, error)
    for name, value in (parameters or {}).items():
        inputs[name] = value if isinstance(value, bytes) else str(value).encode()
    name, _, version = model.partition("/")
    request = messages.PredictionsRequest(model_name=name, model_version=version, input=inputs)
    try:
        with open_channel(address) as channel:
            stub = services.InferenceAPIsServiceStub(channel)
            response = stub.Predictions(request, metadata=authorization_metadata(token), timeout=timeout_s)
    except grpc.RpcError as error:
        return failure(error.code().name.lower(), error.details())
    return read_answer(response.prediction)


def with_retries(ask: Callable[[], Answer], *, retries: int) -> Answer:
    """Calls `ask` until its answer is not a transient error, at most `retries` times more, after 1 s, 2 s, 4 s, ..."""
    answer = ask()
    for retry in range(retries):
        if not answer.is_transient:
            break
        time.sleep(2**retry)
        answer = ask()
    return answer


def authorization(token: str | None) -> dict[str, str]:
    """The HTTP header that carries the token; empty without a token."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def authorization_metadata(token: str | None) -> list[tuple[str, str]]:
    """The gRPC metadata that carries the token; empty without a token."""
    return [(name.lower(), value) for name, value in authorization(token).items()]


def load_proto(name: str) -> tuple[Any, Any]:
    """Returns (messages, services) of `inference.proto` or `management.proto`, without generated files.

    Raises:
        MissingPackageError: grpcio or grpcio-tools is not installed.
    """
    grpc = require("grpc")
    require("grpc_tools")
    if str(ASSETS) not in sys.path:  # grpc searches it for .proto files
        sys.path.append(str(ASSETS))
    messages, services = grpc.protos_and_services(name)
    return messages, services


def open_channel(address: str) -> Any:
    """Returns a grpc.Channel without gRPC's limit of 4 MB per response."""
    return require("grpc").insecure_channel(address, options=[("grpc.max_receive_message_length", UNLIMITED)])


def read_answer(body: bytes, *, status: int | None = None) -> Answer:
    """Parses the body of a response.

    TorchServe's own errors (no such model, missing token, full queue), `{"code", "type", "message"}`, become
    `{"error": {"code": TYPE, "message": "HTTP STATUS: MESSAGE"}}`.

    Args:
        body: the response as received.
        status: its HTTP status; None over gRPC.
    """
    prefix = "gRPC" if status is None else f"HTTP {status}"
    try:
        answer = json.loads(body)
    except ValueError:
        text = body[:200].decode(errors="replace")
        return failure("no_answer", f"{prefix}: expected JSON, got {text!r}", status=status)
    if not isinstance(answer, dict):
        return failure("no_answer", f"{prefix}: expected a JSON object, got {str(answer)[:200]}", status=status)
    error = answer.get("error")
    if "predictions" in answer or (isinstance(error, dict) and error.keys() >= {"code", "message"}):
        return Answer(answer, status=status, is_from_handler=True)
    return failure(
        str(answer.get("type", "no_answer")), f"{prefix}: {answer.get('message', str(answer)[:200])}", status=status
    )


def failure(code: str, message: str, *, status: int | None = None) -> Answer:
    """An Answer for an error that the handler did not report."""
    return Answer({"error": {"code": code, "message": message}}, status=status)


def require(name: str) -> Any:
    """Imports a package that only the client needs.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{name} is missing: run `pip install .` in the checkout, which installs all dependencies"
        ) from error


def _read(video: bytes | str | Path) -> bytes:
    return video if isinstance(video, bytes) else Path(video).read_bytes()


def _unreadable_file(video: bytes | str | Path, error: OSError) -> Answer:
    return failure("no_file", f"{error.strerror}: {video!s}")
