"""Parses one row of a TorchServe batch into a Request.

A video in JSON exists in several forms: the body, its text, a base64 string and the file. Because a worker holds the
requests of a whole batch, each form is freed as soon as the next one exists. Parsing a request never takes more than
about three times its size.

A new request parameter needs an entry in `RequestLimits.parameters`, and a field of the same name in `Request` or an
argument in `ViewDefaults.resolve`.
"""

import base64
import binascii
import dataclasses
import json
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

from handler.protocol.errors import ApiError, BadRequest, UploadTooLarge
from handler.validation import ConfigError, check_integer, describe_unknown
from handler.views import ONE_VIEW, TooManyViewsError, ViewDefaults, Views

# TorchServe calls a raw body `body`; its own gRPC clients use `data`; `video` is this API's name.
VIDEO_KEYS = ("video", "data", "body")
DOCUMENTED_VIDEO_KEYS = ("video", "data")
NUMBERED_VIDEO_KEY = re.compile(r"(video|data|body)s?[\W_]*\d*[\W_]*", re.IGNORECASE)  # video2, video[1], videos
# TorchServe passes these on from the query string of /invocations.
TORCHSERVE_KEYS = ("model_name", "model_version")

# A request needs two values. Parsed values can take tens of times as much memory as the JSON text.
MAX_JSON_VALUES = 64
# A backslash, `u` and the number of a character that is not ASCII.
NON_ASCII_ESCAPE = re.compile(r"\\u(?!00[0-7])")
MAX_INTEGER_DIGITS = 18  # int() takes time quadratic in the number of digits
MAX_ECHOED_CHARACTERS = 40
NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{0,18})?(e-?[0-9]{1,2})?", re.ASCII)
ASCII_WHITESPACE = b" \t\r\n"
URL_SCHEME = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]{0,20}://")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What a deployment accepts in a request.

    Attributes:
        max_upload_bytes: largest size of the video file, however it is encoded in the request.
        max_top_k: largest number of predictions.
        default_top_k: number of predictions if the request does not ask for one; limited to `max_top_k`.
        views: the views if the request does not specify them, and how many it may ask for.

    Raises:
        ConfigError: a limit is not an integer >= 1.
    """

    max_upload_bytes: int
    max_top_k: int
    default_top_k: int
    views: ViewDefaults = dataclasses.field(default_factory=ViewDefaults)

    def __post_init__(self) -> None:
        for name in ("max_upload_bytes", "max_top_k", "default_top_k"):
            check_integer(name, getattr(self, name), minimum=1)

    @property
    def parameters(self) -> "dict[str, Parameter]":
        """Every parameter that a request may set besides the video."""
        top_k = IntegerParameter(default=min(self.default_top_k, self.max_top_k), minimum=1, maximum=self.max_top_k)
        return {"top_k": top_k, **VIEW_PARAMETERS, **MODE_PARAMETERS}

    @property
    def explanation_parameters(self) -> "dict[str, Parameter]":
        """Every parameter that a request for an explanation, which is of one view, may set."""
        excluded = {"views", *MODE_PARAMETERS}
        parameters = {name: parameter for name, parameter in self.parameters.items() if name not in excluded}
        return {**parameters, "label": TextParameter()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerParameter:
    """An optional integer of a request.

    Attributes:
        default: value if the request does not set it.
        minimum: smallest valid value.
        maximum: largest valid value.
    """

    default: int | None = None
    minimum: int
    maximum: int

    def parse(self, name: str, value: object) -> int:
        """Converts what a request contains: a JSON number, or decimal digits as text or bytes.

        Raises:
            BadRequest: it is not an integer in the range.
        """
        text = _short_text(value)
        is_number = text.isascii() and text.isdigit() and len(text) <= MAX_INTEGER_DIGITS
        if not is_number or not self.minimum <= int(text) <= self.maximum:
            raise BadRequest(
                f"{name} must be an integer from {self.minimum} to {self.maximum}, got {_shorten(text)!r}",
                code="bad_parameter",
            )
        return int(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumberParameter:
    """An optional number of a request that is not negative.

    Attributes:
        default: value if the request does not set it.
    """

    default: float | None = None

    def parse(self, name: str, value: object) -> float:
        """Converts what a request contains: a JSON number, or a decimal number as text or bytes.

        Raises:
            BadRequest: it is not such a number.
        """
        text = _short_text(value)
        if not NUMBER.fullmatch(text):
            raise BadRequest(f"{name} must be a number >= 0, got {_shorten(text)!r}", code="bad_parameter")
        return float(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextParameter:
    """An optional text of a request.

    Attributes:
        default: value if the request does not set it.
        max_characters: largest length.
    """

    default: str | None = None
    max_characters: int = 1000

    def parse(self, name: str, value: object) -> str:
        """Converts what a request contains: text, or UTF-8.

        Raises:
            BadRequest: it is not text, or too long.
        """
        if isinstance(value, (bytes, bytearray)):
            value = value[: 4 * self.max_characters + 1].decode(errors="replace")
        if not isinstance(value, str):
            raise BadRequest(f"{name} must be text, got {type(value).__name__}", code="bad_parameter")
        if len(value) > self.max_characters:
            message = f"{name} must have at most {self.max_characters} characters, got {_shorten(value)!r}..."
            raise BadRequest(message, code="bad_parameter")
        return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChoiceParameter:
    """An optional word of a request, one of several.

    Attributes:
        default: value if the request does not set it.
        choices: valid values, in lower case.
    """

    default: str | None = None
    choices: tuple[str, ...]

    def parse(self, name: str, value: object) -> str:
        """Converts what a request contains: text, bytes, or a JSON truth value.

        Raises:
            BadRequest: it is none of the choices.
        """
        text = _short_text(value).lower()
        if text not in self.choices:
            expected = ", ".join(self.choices)
            raise BadRequest(f"{name} must be one of {expected}, got {_shorten(text)!r}", code="bad_parameter")
        return text


Parameter = IntegerParameter | NumberParameter | TextParameter | ChoiceParameter
Parameters = Mapping[str, Parameter]

VIEW_PARAMETERS: Parameters = {
    "views": TextParameter(max_characters=MAX_ECHOED_CHARACTERS),
    "stride_frames": IntegerParameter(minimum=1, maximum=10**6),
    "sampling": TextParameter(max_characters=MAX_ECHOED_CHARACTERS),
    "start_s": NumberParameter(),
    "end_s": NumberParameter(),
}


MODE_PARAMETERS: Parameters = {
    "mode": ChoiceParameter(default="classification", choices=("classification", "embedding")),
    "pooling": ChoiceParameter(choices=("cls", "mean")),
    "normalize": ChoiceParameter(choices=("true", "false")),
    "encoding": ChoiceParameter(choices=("numbers", "base64")),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    """What a request for an embedding asks for.

    Attributes:
        pooling: "cls", "mean" or None, see `VideoClassifier.embed`.
        normalize: whether the vector should have the length 1.
        encoding: "numbers" or "base64".
    """

    pooling: str | None = None
    normalize: bool = False
    encoding: str = "numbers"


@dataclasses.dataclass(frozen=True)
class Request:
    """One parsed request.

    Attributes:
        video: the uploaded file, unchanged; empty after `without_video`.
        top_k: number of predictions to return.
        views: which frames of the video are classified, and which parts of them.
        is_explanation: whether the answer should have an explanation.
        label: what to explain; None for the best prediction.
        embedding: how to embed the video; None to classify it.
    """

    video: bytes
    top_k: int
    views: Views = ONE_VIEW
    is_explanation: bool = False
    label: str | None = None
    embedding: EmbeddingRequest | None = None

    def without_video(self) -> "Request":
        """Returns the request without the file, for the time after decoding."""
        return dataclasses.replace(self, video=b"")


def parse_request(
    row: MutableMapping[str, Any],
    *,
    headers: Mapping[str, str],
    limits: RequestLimits,
    is_explanation: bool = False,
) -> Request:
    """Parses one row of a TorchServe batch.

    Args:
        row: name -> bytes, bytearray or str; what a JSON body contains, if TorchServe has parsed it; or a tuple of
            such values for a name that occurs several times. This function empties it to free memory.
        headers: HTTP headers. `X-Some-Name` sets the parameter `some_name` unless the row sets it.
        limits: what this deployment accepts.
        is_explanation: whether the request asks for an explanation, which has further parameters.

    Raises:
        BadRequest: no video or several, invalid JSON or base64, an unknown parameter or one out of range, or too many
            views.
        UploadTooLarge: the video exceeds `limits.max_upload_bytes`.
        ApiError: the video is a URL.
    """
    parameters: Parameters = limits.explanation_parameters if is_explanation else limits.parameters
    fields = {**_parameters_in_headers(headers, parameters), **_fields_of(row, is_json=_is_json_type(headers))}
    video = _video_of(fields, parameters)
    if len(video) > limits.max_upload_bytes:
        raise UploadTooLarge(len(video), max_upload_bytes=limits.max_upload_bytes)
    values: dict[str, Any] = {
        name: parameter.parse(name, fields[name]) if name in fields else parameter.default
        for name, parameter in parameters.items()
    }
    chosen = {name: values.pop(name, None) for name in VIEW_PARAMETERS}
    if is_explanation:
        chosen["views"] = "1x1"
    return Request(
        video=video,
        views=_views_of(chosen, limits.views),
        is_explanation=is_explanation,
        embedding=_embedding_of({name: values.pop(name, None) for name in MODE_PARAMETERS}),
        **values,
    )


def _embedding_of(values: Mapping[str, Any]) -> EmbeddingRequest | None:
    if values["mode"] == "embedding":
        return EmbeddingRequest(
            pooling=values["pooling"],
            normalize=values["normalize"] == "true",
            encoding=values["encoding"] or "numbers",
        )
    for name, value in values.items():
        if name != "mode" and value is not None:
            raise BadRequest(f"{name} requires mode embedding", code="bad_parameter")
    return None


def _views_of(values: Mapping[str, Any], defaults: ViewDefaults) -> Views:
    try:
        return defaults.resolve(**values)
    except TooManyViewsError as error:
        raise BadRequest(str(error), code="too_many_views") from error
    except ConfigError as error:
        raise BadRequest(str(error), code="bad_parameter") from error


def _video_of(fields: Mapping[str, Any], parameters: Parameters) -> bytes:
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


def _parameters_in_headers(headers: Mapping[str, str], parameters: Parameters) -> dict[str, str]:
    by_header = {f"x-{name}".replace("_", "-"): name for name in parameters}
    return {by_header[header.lower()]: value for header, value in headers.items() if header.lower() in by_header}


def _is_json_type(headers: Mapping[str, str]) -> bool:
    types = [value for header, value in headers.items() if header.lower() == "content-type"]
    return any(value.partition(";")[0].strip().lower() == "application/json" for value in types)


def _fields_of(row: MutableMapping[str, Any], *, is_json: bool) -> dict[str, Any]:
    """Empties the row. Replaces a JSON body by its keys, so that all forms of a request have the same fields."""
    fields: dict[str, Any] = {}
    for name in list(row):
        value = row.pop(name)
        if isinstance(value, tuple):
            raise _repeated(name, count=len(value))
        if name in VIDEO_KEYS and (_looks_like_json(value) or (is_json and value)):
            # Each assignment frees the previous form.
            if isinstance(value, (bytes, bytearray, str)):
                value = _ascii_text(value)
                value = _load_json(value)
            value = _decode_videos(value)
        else:
            value = {name: value}
        for key, content in value.items():
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


def _ascii_text(body: bytes | bytearray | str) -> str:
    """Returns the text of a JSON body that contains only ASCII characters, also after unescaping.

    No valid request contains others. A single one would make Python store each character of the video in up to four
    bytes.
    """
    if body.isascii():
        text = body if isinstance(body, str) else body.decode("ascii")
        if "\0" not in text and not NON_ASCII_ESCAPE.search(text):
            return text
    message = "cannot parse the JSON body: expected only ASCII characters (UTF-8 without a byte order mark)"
    raise BadRequest(message, code="bad_json")


def _load_json(text: str) -> Any:
    # Base64 contains none of these characters.
    if sum(map(text.count, "{[,")) > MAX_JSON_VALUES:
        raise BadRequest(f"expected a JSON object with at most {MAX_JSON_VALUES} values, got more", code="bad_json")
    try:
        return json.loads(text, object_pairs_hook=_object_without_repeated_keys)
    except ValueError as error:
        problem = str(error) if isinstance(error, json.JSONDecodeError) else "a number in it is too long"
        raise BadRequest(f"cannot parse the JSON body: {problem}", code="bad_json") from error


def _decode_videos(fields: object) -> dict[str, Any]:
    if not isinstance(fields, dict):
        message = f'expected a JSON object like {{"video": "<base64>"}}, got {type(fields).__name__}'
        raise BadRequest(message, code="bad_json")
    return {key: _decode_base64(content, key=key) if key in VIDEO_KEYS else content for key, content in fields.items()}


def _object_without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    for key in fields:
        if (count := sum(key == name for name, _ in pairs)) > 1:
            raise _repeated(key, count=count)
    return fields


def _decode_base64(value: object, *, key: str) -> bytes:
    if not isinstance(value, str):
        raise BadRequest(f"JSON key {key!r} must be a base64 string, got {type(value).__name__}", code="bad_base64")
    if URL_SCHEME.match(value[:64].lstrip().encode(errors="replace")):
        raise BadRequest(f"JSON key {key!r} must be a base64 string, got a URL: {URLS_NOT_FETCHED}", code="bad_base64")
    data = value.encode(errors="replace")
    # Browsers encode a file as a data URL: `data:video/mp4;base64,...`.
    if data.startswith(b"data:"):
        data = data.partition(b",")[2]
    data = data.translate(None, ASCII_WHITESPACE)
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise BadRequest(f"JSON key {key!r} is not valid base64: {error}", code="bad_base64") from error


def _repeated(name: str, *, count: int) -> BadRequest:
    if name in VIDEO_KEYS:
        return _several_videos(count)
    return BadRequest(f"expected {_shorten(name)!r} once, got it {count} times", code="bad_parameter")


def _several_videos(count: int) -> BadRequest:
    return BadRequest(f"expected one video, got {count}", code="several_videos")


def _short_text(value: object) -> str:
    """The text of a parameter, or the name of its type if it cannot be one. Bytes are shortened."""
    if isinstance(value, (bytes, bytearray)):
        return value[:MAX_ECHOED_CHARACTERS].decode(errors="replace")
    return type(value).__name__ if isinstance(value, (dict, list)) else str(value)


def _shorten(text: str) -> str:
    return text[:MAX_ECHOED_CHARACTERS]
