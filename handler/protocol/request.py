"""Parses one row of a TorchServe batch into a Request.

A new request parameter needs an entry in `RequestLimits.parameters` and a field of the same name in `Request`.
"""

import base64
import binascii
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from handler.protocol.errors import ApiError, BadRequest, UploadTooLarge
from handler.validation import check_integer, describe_unknown

# TorchServe calls a raw body `body`; its own gRPC clients use `data`; `video` is this API's name.
VIDEO_KEYS = ("video", "data", "body")
DOCUMENTED_VIDEO_KEYS = ("video", "data")
NUMBERED_VIDEO_KEY = re.compile(r"(video|data|body)s?[\W_]*\d*[\W_]*", re.IGNORECASE)  # video2, video[1], videos
# TorchServe passes these on from the query string of /invocations.
TORCHSERVE_KEYS = ("model_name", "model_version")

# A request needs two values. Python's objects for a JSON text can take tens of times as much memory as the text.
MAX_JSON_VALUES = 64
MAX_INTEGER_DIGITS = 18  # int() takes time quadratic in the number of digits
MAX_ECHOED_CHARACTERS = 40
ASCII_WHITESPACE = b" \t\r\n"
URL_SCHEME = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]{0,20}://")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What a deployment accepts in a request.

    Attributes:
        max_upload_bytes: largest size of the video file, however it is encoded in the request.
        max_top_k: largest number of predictions, the model's number of labels.
        default_top_k: number of predictions if the request does not ask for one; limited to `max_top_k`.

    Raises:
        ConfigError: a limit is not an integer >= 1.
    """

    max_upload_bytes: int
    max_top_k: int
    default_top_k: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_integer(field.name, getattr(self, field.name), minimum=1)

    @property
    def parameters(self) -> dict[str, "IntegerParameter"]:
        """Every parameter that a request may set besides the video."""
        top_k = IntegerParameter(default=min(self.default_top_k, self.max_top_k), minimum=1, maximum=self.max_top_k)
        return {"top_k": top_k}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerParameter:
    """An optional integer of a request.

    Attributes:
        default: value if the request does not set it.
        minimum: smallest valid value.
        maximum: largest valid value.
    """

    default: int
    minimum: int
    maximum: int

    def parse(self, name: str, value: object) -> int:
        """Converts what a request contains: a JSON number, or decimal digits as text or bytes.

        Raises:
            BadRequest: it is not an integer in the range.
        """
        text = value.decode(errors="replace") if isinstance(value, (bytes, bytearray)) else str(value)
        is_number = text.isascii() and text.isdigit() and len(text) <= MAX_INTEGER_DIGITS
        if not is_number or not self.minimum <= int(text) <= self.maximum:
            raise BadRequest(
                f"{name} must be an integer from {self.minimum} to {self.maximum}, got {_shorten(text)!r}",
                code="bad_parameter",
            )
        return int(text)


@dataclasses.dataclass(frozen=True)
class Request:
    """One parsed request.

    Attributes:
        video: the uploaded file, unchanged.
        top_k: number of predictions to return.
    """

    video: bytes
    top_k: int


def parse_request(row: Mapping[str, Any], *, headers: Mapping[str, str], limits: RequestLimits) -> Request:
    """Parses one row of a TorchServe batch.

    Args:
        row: name -> bytes, bytearray or str; what a JSON body contains, if TorchServe has parsed it; or a tuple of
            such values for a name that occurs several times.
        headers: HTTP headers. `X-Some-Name` sets the parameter `some_name` unless the row sets it.
        limits: what this deployment accepts.

    Raises:
        BadRequest: no video or several, invalid JSON or base64, an unknown parameter or one out of range.
        UploadTooLarge: the video exceeds `limits.max_upload_bytes`.
        ApiError: the video is a URL.
    """
    parameters = limits.parameters
    fields = {**_parameters_in_headers(headers, parameters), **_fields_of(row, is_json=_is_json_type(headers))}
    video = _video_of(fields, parameters)
    if len(video) > limits.max_upload_bytes:
        raise UploadTooLarge(len(video), max_upload_bytes=limits.max_upload_bytes)
    values = {
        name: parameter.parse(name, fields[name]) if name in fields else parameter.default
        for name, parameter in parameters.items()
    }
    return Request(video=video, **values)


def _video_of(fields: Mapping[str, Any], parameters: Mapping[str, IntegerParameter]) -> bytes:
    """The only video among the fields. Rejects unknown fields as well."""
    videos = [fields[name] for name in VIDEO_KEYS if name in fields]
    if not videos:
        # The most frequent cause is curl's --data-binary: it declares a form, and TorchServe parses the video as one.
        raise BadRequest(
            "expected a video as the body (with a Content-Type other than a form's), or as a part or key named 'video' "
            "or 'data'; got none",
            code="no_video",
        )
    unknown = [name for name in fields if name not in (*VIDEO_KEYS, *parameters, *TORCHSERVE_KEYS)]
    further_videos = [name for name in unknown if NUMBERED_VIDEO_KEY.fullmatch(name[:MAX_ECHOED_CHARACTERS])]
    if len(videos) + len(further_videos) > 1:
        raise _several_videos(len(videos) + len(further_videos))
    if unknown:
        name = _shorten(unknown[0])
        hint = describe_unknown(name, (*DOCUMENTED_VIDEO_KEYS, *parameters))
        raise BadRequest(f"unknown parameter {name!r}: {hint}", code="unknown_parameter")
    # With decode_input_request=true TorchServe decodes `text/*` bodies as UTF-8; encoding restores the bytes.
    video = videos[0].encode() if isinstance(videos[0], str) else bytes(videos[0])
    if not video:
        raise BadRequest("expected a video file, got an empty body", code="empty_body")
    if URL_SCHEME.match(video[:64].lstrip()):
        raise ApiError(f"expected a video file, got a URL: {URLS_NOT_FETCHED}", status=415, code="not_a_video")
    return video


URLS_NOT_FETCHED = "the server does not fetch addresses, send the content of the file"


def _parameters_in_headers(headers: Mapping[str, str], parameters: Mapping[str, IntegerParameter]) -> dict[str, str]:
    by_header = {f"x-{name}".replace("_", "-"): name for name in parameters}
    return {by_header[header.lower()]: value for header, value in headers.items() if header.lower() in by_header}


def _is_json_type(headers: Mapping[str, str]) -> bool:
    types = [value for header, value in headers.items() if header.lower() == "content-type"]
    return any(value.partition(";")[0].strip().lower() == "application/json" for value in types)


def _fields_of(row: Mapping[str, Any], *, is_json: bool) -> dict[str, Any]:
    """Replaces a JSON body by its keys, so that all forms of a request have the same fields."""
    fields: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, tuple):
            raise _repeated(name, count=len(value))
        contains_json = name in VIDEO_KEYS and (_looks_like_json(value) or (is_json and value))
        for key, content in (_parse_json(value) if contains_json else {name: value}).items():
            if key in fields:
                raise _repeated(key, count=2)
            fields[key] = content
    return fields


def _looks_like_json(value: object) -> bool:
    """gRPC has no content type, but no video container starts with `{`. Other types are JSON that TorchServe parsed."""
    if isinstance(value, (bytes, bytearray)):
        return value[:64].lstrip()[:1] == b"{"
    if isinstance(value, str):
        return value[:64].lstrip()[:1] == "{"
    return True


def _parse_json(value: object) -> dict[str, Any]:
    if isinstance(value, (bytes, bytearray, str)):
        _check_number_of_json_values(value)
        try:
            value = json.loads(value, object_pairs_hook=_object_without_repeated_keys)
        except ValueError as error:
            raise BadRequest(f"cannot parse the JSON body: {_json_problem(error)}", code="bad_json") from error
    if not isinstance(value, dict):
        message = f'expected a JSON object like {{"video": "<base64>"}}, got {type(value).__name__}'
        raise BadRequest(message, code="bad_json")
    return {key: _decode_base64(content, key=key) if key in VIDEO_KEYS else content for key, content in value.items()}


def _check_number_of_json_values(text: bytes | bytearray | str) -> None:
    # Base64 contains none of these characters.
    characters = ("{", "[", ",") if isinstance(text, str) else (b"{", b"[", b",")
    if sum(map(text.count, characters)) > MAX_JSON_VALUES:  # type: ignore[arg-type]  # both are str or both bytes
        raise BadRequest(f"expected a JSON object with at most {MAX_JSON_VALUES} values, got more", code="bad_json")


def _object_without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    for key in fields:
        if (count := sum(key == name for name, _ in pairs)) > 1:
            raise _repeated(key, count=count)
    return fields


def _json_problem(error: ValueError) -> str:
    """The problem without Python's own terms."""
    if isinstance(error, json.JSONDecodeError):
        return str(error)
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "a number in it is too long"


def _decode_base64(value: object, *, key: str) -> bytes:
    if not isinstance(value, str):
        raise BadRequest(f"JSON key {key!r} must be a base64 string, got {type(value).__name__}", code="bad_base64")
    if URL_SCHEME.match(value[:64].lstrip().encode(errors="replace")):
        raise BadRequest(f"JSON key {key!r} must be a base64 string, got a URL: {URLS_NOT_FETCHED}", code="bad_base64")
    # Browsers encode a file as a data URL: `data:video/mp4;base64,...`.
    payload = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode(payload.encode(errors="replace").translate(None, ASCII_WHITESPACE), validate=True)
    except binascii.Error as error:
        raise BadRequest(f"JSON key {key!r} is not valid base64: {error}", code="bad_base64") from error


def _repeated(name: str, *, count: int) -> BadRequest:
    if name in VIDEO_KEYS:
        return _several_videos(count)
    return BadRequest(f"expected {_shorten(name)!r} once, got it {count} times", code="bad_parameter")


def _several_videos(count: int) -> BadRequest:
    return BadRequest(f"expected one video, got {count}", code="several_videos")


def _shorten(text: str) -> str:
    return text[:MAX_ECHOED_CHARACTERS]
