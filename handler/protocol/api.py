"""What a request may say and what a response says. No torch, no TorchServe: rows of bytes in, dictionaries out.

    ApiError                  an HTTP status, a stable code and a sentence
    ├── BadRequest            400: the request itself is malformed
    ├── TooLarge              413: the file is larger than allowed
    ├── InternalError         500: ours; the sentence carries an id that the log has too
    └── OutOfMemory           507: the model's device has no memory left for even this clip alone

A request carries one video and, optionally, parameters. It comes as

- a raw body:       `curl -T clip.mp4 -H 'X-Top-K: 3' URL` (TorchServe drops the query string of /predictions)
- multipart:        `curl -F video=@clip.mp4 -F top_k=3 URL`
- JSON:             `{"video": "<base64>", "top_k": 3}`
- a gRPC input map: `{"data": b"...", "top_k": b"3"}`, where `data` may also hold such JSON.
"""

import base64
import binascii
import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence

# TorchServe names a raw body `body`; its own clients name the part `data`; people name it `video`.
VIDEO_KEYS = ("video", "data", "body")
PARAMETERS = ("top_k",)
# What TorchServe itself reads from the query string of /invocations, and passes on.
SERVER_KEYS = ("model_name", "model_version")

# A request has two. Of a large text full of them Python would make objects of tens of times its size.
MAX_JSON_VALUES = 64
WHITESPACE = b" \t\r\n"

# The HTTP status for every code that a video's own trouble may have (the codes of handler.video.VideoError).
STATUS_BY_VIDEO_CODE = {
    "decode_memory": 413,
    "decode_timeout": 413,
    "frame_too_large": 413,
    "too_many_frames": 413,
    "video_too_long": 413,
    "not_a_video": 415,
    "unsupported_container": 415,
    "unsupported_codec": 415,
}
UNUSABLE_VIDEO_STATUS = 422


class ApiError(Exception):
    """A refusal: `status` (HTTP), `code` (stable, for programs) and the message (for people)."""

    def __init__(self, message: str, *, status: int, code: str):
        super().__init__(message)
        self.status = status
        self.code = code


class BadRequest(ApiError):
    def __init__(self, message: str, *, code: str):
        super().__init__(message, status=400, code=code)


class TooLarge(ApiError):
    def __init__(self, size_bytes: int, max_upload_bytes: int):
        message = f"expected a file of at most {max_upload_bytes} bytes, got {size_bytes}"
        super().__init__(message, status=413, code="upload_too_large")


class InternalError(ApiError):
    def __init__(self, request_id: str):
        message = f"the server failed on this request; its log names the cause under the id {request_id}"
        super().__init__(message, status=500, code="internal_error")


class OutOfMemory(ApiError):
    def __init__(self, request_id: str):
        message = f"the server has no memory left for this video; its log tells more under the id {request_id}"
        super().__init__(message, status=507, code="out_of_memory")


@dataclasses.dataclass(frozen=True)
class Request:
    """One parsed request: the uploaded file as it came, and how many predictions to return."""

    video: bytes
    top_k: int


def parse_request(
    row: Mapping, *, headers: Mapping[str, str], default_top_k: int, num_labels: int, max_upload_bytes: int
) -> Request:
    """Reads one row of a TorchServe batch.

    Args:
        row: name -> bytes, bytearray, str or, for a JSON body, what the JSON holds.
        headers: of the HTTP request; a parameter `some_name` may stand there as `X-Some-Name`, the row's own wins.
        default_top_k: predictions to return when the request does not say; capped at `num_labels`.
        num_labels: the model's number of classes, the largest `top_k` that can be asked for.
        max_upload_bytes: of the video itself, however it was wrapped.

    Raises:
        BadRequest: no video or several, bad JSON or base64, an unknown parameter or one out of range.
        TooLarge: more bytes than allowed.
    """
    fields = {**_header_parameters(headers), **_flatten(row, is_said_to_be_json=_says_json(headers))}
    videos = [fields[name] for name in VIDEO_KEYS if name in fields]
    if not videos:
        # The commonest cause: curl's --data-binary claims to send a form, whose fields TorchServe then takes apart.
        raise BadRequest(
            "expected a video as the body (with a Content-Type that is not a form's), or as a part or key named "
            "'video' or 'data'; got none",
            code="no_video",
        )
    unknown = [name for name in fields if name not in VIDEO_KEYS + PARAMETERS + SERVER_KEYS]
    if unknown:
        raise BadRequest(_unknown_parameter(unknown[0]), code="unknown_parameter")
    if len(videos) > 1:
        raise BadRequest(f"expected one video, got {len(videos)}", code="several_videos")
    video = _as_bytes(videos[0])
    if not video:
        raise BadRequest("expected a video file, got an empty body", code="empty_body")
    if len(video) > max_upload_bytes:
        raise TooLarge(len(video), max_upload_bytes)
    top_k = _parse_int(fields, "top_k", default=min(default_top_k, num_labels), low=1, high=num_labels)
    return Request(video=video, top_k=top_k)


def _header_parameters(headers: Mapping[str, str]) -> dict[str, str]:
    by_name = {f"x-{name}".replace("_", "-"): name for name in PARAMETERS}
    return {by_name[header.lower()]: value for header, value in headers.items() if header.lower() in by_name}


def _says_json(headers: Mapping[str, str]) -> bool:
    types = [value for header, value in headers.items() if header.lower() == "content-type"]
    return any(value.partition(";")[0].strip().lower() == "application/json" for value in types)


def _flatten(row: Mapping, *, is_said_to_be_json: bool) -> dict:
    """Replaces a JSON body by its keys, so that JSON, multipart and query parameters read alike."""
    fields = {}
    for name, value in row.items():
        is_json = name in VIDEO_KEYS and (_is_json(value) or (is_said_to_be_json and value))
        for key, content in (_read_json(value) if is_json else {name: value}).items():
            if key in fields:
                code = "several_videos" if key in VIDEO_KEYS else "bad_parameter"
                raise BadRequest(f"expected {key[:40]!r} once, got it twice", code=code)
            fields[key] = content
    return fields


def _is_json(value) -> bool:
    """gRPC has no content type, so look: no video container begins with `{`. A value of another type has been parsed
    by TorchServe, which does that where decode_input_request is true."""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value[:64]).lstrip()[:1] == b"{"
    if isinstance(value, str):
        return value[:64].lstrip()[:1] == "{"
    return True


def _read_json(value) -> dict:
    if isinstance(value, (bytes, bytearray, str)):
        try:
            value = json.loads(_limit_json_size(value))
        except ValueError as error:
            raise BadRequest(f"the JSON body cannot be parsed: {_what_is_wrong(error)}", code="bad_json") from error
    if not isinstance(value, dict):
        raise BadRequest(
            f'expected a JSON object like {{"video": "<base64>"}}, got {type(value).__name__}',
            code="bad_json",
        )
    fields = dict(value)
    for name in VIDEO_KEYS:
        if name in fields:
            fields[name] = _decode_base64(fields[name], name=name)
    return fields


def _limit_json_size(text: bytes | bytearray | str) -> bytes | bytearray | str:
    """The same text, once its marks are counted."""
    marks = (b"{", b"[", b",") if isinstance(text, (bytes, bytearray)) else ("{", "[", ",")  # base64 has none of them
    if sum(map(text.count, marks)) > MAX_JSON_VALUES:
        raise BadRequest(
            f"expected a JSON object of at most {MAX_JSON_VALUES} values, got more, or something else", code="bad_json"
        )
    return text


def _what_is_wrong(error: Exception) -> str:
    """In words that help whoever sent the JSON; Python's own are about Python."""
    if isinstance(error, json.JSONDecodeError):
        return str(error)
    return "it is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else "a number in it is too long"


def _decode_base64(value, *, name: str) -> bytes:
    if not isinstance(value, str):
        raise BadRequest(f"JSON key {name!r} must be a base64 string, got {type(value).__name__}", code="bad_base64")
    # A data URL is how browsers hand over a file; only its payload counts.
    payload = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode(payload.encode(errors="replace").translate(None, WHITESPACE), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"JSON key {name!r} is not valid base64: {error}", code="bad_base64") from error


def _as_bytes(value) -> bytes:
    # Where decode_input_request is true TorchServe decodes `text/*`; encoding gives back the bytes that came.
    return value.encode() if isinstance(value, str) else bytes(value)


def _parse_int(fields: Mapping, name: str, *, default: int, low: int, high: int) -> int:
    if name not in fields:
        return default
    value = fields[name]
    text = value.decode(errors="replace") if isinstance(value, (bytes, bytearray)) else str(value)
    # At most 18 digits, so that no absurdly long number is ever converted.
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None
    if number is None or not low <= number <= high or isinstance(value, bool):
        raise BadRequest(f"{name} must be an integer from {low} to {high}, got {text[:40]!r}", code="bad_parameter")
    return number


def _unknown_parameter(name: str) -> str:
    name, known = name[:40], ("video", "data") + PARAMETERS
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(known)}"
    return f"unknown parameter {name!r}{hint}"


def status_of(video_code: str) -> int:
    """The HTTP status for a VideoError's code: 415 for what we do not accept, 422 for a video we cannot use."""
    return STATUS_BY_VIDEO_CODE.get(video_code, UNUSABLE_VIDEO_STATUS)


def render_answer(
    predictions: Sequence[tuple[str, float]], *, video: Mapping, times_s: Sequence[float], warnings: Sequence[str]
) -> dict:
    """The answer's body.

    Args:
        predictions: (label, score) pairs, best first; scores in [0, 1].
        video: what was decoded (the fields of VideoInfo).
        times_s: display time of every sampled frame, seconds from the video's first frame.
        warnings: sentences about what the caller should know, e.g. repeated frames.
    """
    return {
        "predictions": [{"label": label, "score": score} for label, score in predictions],
        "video": {**video, "frames": [round(float(time_s), 3) for time_s in times_s]},
        "warnings": list(warnings),
    }


def render_error(error: ApiError) -> dict:
    """The body of a refusal. gRPC drops the HTTP status, so everything a client needs is in here."""
    return {"error": {"code": error.code, "message": str(error)}}
