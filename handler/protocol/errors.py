"""Errors that a client receives: an HTTP status, a stable code for programs and a message for people.

ApiError
├── BadRequest        400  the request is malformed
├── UploadTooLarge    413  the file exceeds the size limit
├── InternalError     500  the server failed; the message contains an id that the log contains as well
├── NotSupported      501  the model does not offer this API of TorchServe
├── DecodersBusy      503  other videos took too long to decode; the request may succeed later
├── ExplanationsBusy  503  other explanations took too long; the request may succeed later
└── OutOfMemory       507  the model's device has too little memory for a single clip
"""

# HTTP status for the codes of handler.video.VideoError; all others are 422, a video that cannot be used.
STATUS_BY_VIDEO_CODE = {
    "decode_cost": 413,
    "decode_memory": 413,
    "decode_timeout": 413,
    "frame_too_large": 413,
    "too_many_frames": 413,
    "video_too_long": 413,
    "not_a_video": 415,
    "unsupported_container": 415,
    "unsupported_codec": 415,
}
UNPROCESSABLE_CONTENT = 422


class ApiError(Exception):
    """An error response.

    Attributes:
        status: HTTP status.
        code: stable name of the error, for programs.
    """

    def __init__(self, message: str, *, status: int, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class BadRequest(ApiError):
    """The request is malformed."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message, status=400, code=code)


class UploadTooLarge(ApiError):
    """The file exceeds the size limit."""

    def __init__(self, size_bytes: int, *, max_upload_bytes: int) -> None:
        message = f"expected a file of at most {max_upload_bytes} bytes, got {size_bytes}"
        super().__init__(message, status=413, code="upload_too_large")


class InternalError(ApiError):
    """The server failed. The cause is only in its log, because it may contain paths or file contents."""

    def __init__(self, request_id: str) -> None:
        message = f"the server failed to process this request; its log has the cause under request id {request_id}"
        super().__init__(message, status=500, code="internal_error")


class NotSupported(ApiError):
    """The model does not offer this API of TorchServe."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=501, code="not_supported")


class DecodersBusy(ApiError):
    """Other videos took too long to decode; the request may succeed later."""

    def __init__(self) -> None:
        message = "the server was busy decoding other videos; send the request again"
        super().__init__(message, status=503, code="decoders_busy")


class ExplanationsBusy(ApiError):
    """Other explanations took too long; the request may succeed later."""

    def __init__(self) -> None:
        message = "the server was busy with other explanations; send the request again"
        super().__init__(message, status=503, code="explanations_busy")


class OutOfMemory(ApiError):
    """The model's device has too little memory for a single clip."""

    def __init__(self, request_id: str) -> None:
        message = f"the server is out of memory; its log has details under request id {request_id}"
        super().__init__(message, status=507, code="out_of_memory")


def status_of_video_error(code: str) -> int:
    """Returns the HTTP status for the code of a VideoError: 413 over a limit, 415 unsupported, otherwise 422."""
    return STATUS_BY_VIDEO_CODE.get(code, UNPROCESSABLE_CONTENT)
