"""Requests, responses and errors of the HTTP and gRPC API. Plain dictionaries and bytes; no torch, no TorchServe.

A request carries one video and optional parameters, in one of these forms:

- raw body:         `curl -T clip.mp4 -H 'X-Top-K: 3' URL` (TorchServe ignores the query string of /predictions)
- multipart form:   `curl -F video=@clip.mp4 -F top_k=3 URL`
- JSON:             `{"video": "<base64>", "top_k": 3}`
- gRPC input map:   `{"data": b"...", "top_k": b"3"}`; `data` may also contain such JSON

`parse_request` turns each into a Request. `render_answer` and `render_error` make the body of the response.
"""

from handler.protocol.errors import (
    ApiError,
    BadRequest,
    DecodersBusy,
    ExplanationsBusy,
    InternalError,
    NotSupported,
    OutOfMemory,
    UploadTooLarge,
    status_of_video_error,
)
from handler.protocol.request import Request, RequestLimits, parse_request
from handler.protocol.response import render_answer, render_embedding, render_error, render_explanation

__all__ = [
    "ApiError",
    "BadRequest",
    "DecodersBusy",
    "ExplanationsBusy",
    "InternalError",
    "NotSupported",
    "OutOfMemory",
    "Request",
    "RequestLimits",
    "UploadTooLarge",
    "parse_request",
    "render_answer",
    "render_embedding",
    "render_error",
    "render_explanation",
    "status_of_video_error",
]
