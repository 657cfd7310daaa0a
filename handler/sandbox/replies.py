"""The replies of a decoder process: serialized by the process, checked by the worker.

The worker does not trust a reply, because a crafted video could have taken over the process. Each value must have its
declared type and be within the limits of the deployment. So a reply can describe a wrong clip, but not make the worker
allocate more memory, return an unknown error code, or write control characters to a log or an answer.
"""

import dataclasses
import math
import re
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

from handler.clips import Clip, ClipSettings, distinct, layout
from handler.sandbox.wire import Bytes, MessageError, rebuild
from handler.video import Postponed, VideoError
from handler.views import Views

MAX_MESSAGE_CHARACTERS = 500
MAX_FAILURE_CHARACTERS = 20_000
MAX_WARNINGS = 20

_MAX_COUNT = 2**31
_MAX_SECONDS = 10**6
_NAME = re.compile(r"[A-Za-z0-9_,.-]{1,100}")  # of a codec or container


def to_message(result: Clip | Exception) -> tuple[dict[str, Any], Bytes]:
    """Returns the header and the payload of the reply to a request."""
    if isinstance(result, Clip):
        fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
        del fields["frames"]  # the payload; the receiver knows the shape
        del fields["crops"], fields["num_frames"]  # known to the receiver as well
        return {"clip": fields}, result.frames.data
    if isinstance(result, Postponed):
        return {"postponed": {"gigapixels": result.gigapixels}}, b""
    if isinstance(result, VideoError):
        return {"error": {"code": result.code, "message": str(result)}}, b""
    return {"failure": "".join(traceback.format_exception(result))[-MAX_FAILURE_CHARACTERS:]}, b""


def max_payload_bytes(settings: ClipSettings, views: Views) -> int:
    """Returns the size of the largest clip that a process can return: that of all views without a common frame."""
    # The size of a clip that is not cropped depends on the video.
    height, width = settings.resize_crop.crop_to or (1, settings.limits.max_frame_pixels)
    return views.count * settings.num_frames * 3 * height * width


def read_result(
    header: Mapping[str, Any], payload: bytearray, settings: ClipSettings, views: Views
) -> Clip | Exception:
    """Rebuilds what `to_message` has serialized. An unexpected exception becomes a RuntimeError.

    Args:
        header: The header of the message.
        payload: The payload of the message.
        settings: The settings of the process that has sent it.
        views: The views that it was asked for.

    Raises:
        MessageError: The message is not a reply that a process with these settings can send.
    """
    try:
        match header:
            case {"clip": fields}:
                return _clip(fields, payload, settings, views)
            case {"postponed": fields}:
                return _postponed(**fields)
            case {"error": fields}:
                return _video_error(**fields)
            case {"failure": str(text)}:
                lines = text[-MAX_FAILURE_CHARACTERS:].splitlines()
                return RuntimeError("\n".join(["decoding failed:", *(f"  {_printable(line)}" for line in lines)]))
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise MessageError(f"expected a valid reply: {error!r:.500}") from error
    raise MessageError(f"expected a clip, an error or a failure, got the keys {list(header)!r:.200}")


def _clip(fields: Mapping[str, Any], payload: bytearray, settings: ClipSettings, views: Views) -> Clip:
    clip: Clip = rebuild(Clip, {**fields, "frames": [], "crops": [], "num_frames": settings.num_frames})
    _check_clip(clip, settings, views)
    resize_crop = dataclasses.replace(settings.resize_crop, zoom=views.zoom, crop_at=views.crop_at)
    crops = tuple(resize_crop.crops(clip.info.height, clip.info.width, count=views.crops))
    indices = clip.frame_indices.astype(np.int64)  # (K * T,)
    frames = np.frombuffer(payload, np.uint8).reshape(len(distinct(indices)), 3, *layout(crops).size)  # (F, C, h', w')
    warnings = tuple(_printable(warning)[:MAX_MESSAGE_CHARACTERS] for warning in clip.warnings)
    return dataclasses.replace(clip, frames=frames, frame_indices=indices, crops=crops, warnings=warnings)


def _check_clip(clip: Clip, settings: ClipSettings, views: Views) -> None:
    """Raises ValueError if a field has a value that no video within the limits has."""
    info, limits, shape = clip.info, settings.limits, (views.clips * settings.num_frames,)
    indices = clip.frame_indices
    has_valid_value = {
        "frame_count": 1 <= info.frame_count <= min(2 * limits.max_frames, _MAX_COUNT),
        "duration_s": 0 <= info.duration_s <= min(limits.max_duration_s, 10**9),
        "fps": info.fps is None or 0 <= info.fps <= 1001,
        "width, height": min(info.width, info.height) >= 1 and info.width * info.height <= limits.max_frame_pixels,
        "rotation": info.rotation in (0, 90, 180, 270),
        "codec": _NAME.fullmatch(info.codec),
        "container": _NAME.fullmatch(info.container),
        "stream": 0 <= info.stream <= _MAX_COUNT,
        "frame_indices": indices.shape == shape and (indices % 1 == 0).all(),
        "range of frame_indices": (indices >= 0).all() and (indices < info.frame_count).all(),
        "times_s": clip.times_s.shape == shape and np.isfinite(clip.times_s).all(),
        "warnings": len(clip.warnings) <= MAX_WARNINGS,
        "decoded_frames": 0 <= clip.decoded_frames <= min(8 * limits.max_frames, _MAX_COUNT),
        "decode_s": 0 <= clip.decode_s <= _MAX_SECONDS,
        "resize_s": 0 <= clip.resize_s <= _MAX_SECONDS,
    }
    for name, is_valid in has_valid_value.items():
        if not is_valid:
            raise ValueError(f"{name} is out of range")


def _postponed(*, gigapixels: float) -> Postponed:
    if type(gigapixels) not in (int, float) or not 0 <= gigapixels < math.inf:
        raise ValueError("gigapixels is out of range")
    return Postponed(gigapixels)


def _video_error(*, code: str, message: str) -> VideoError:
    """Returns an instance of the VideoError class that has this code."""
    classes = [VideoError]
    for error_class in classes:
        if error_class.code == code:
            return error_class(_printable(message)[:MAX_MESSAGE_CHARACTERS])
        classes += error_class.__subclasses__()
    raise ValueError(f"no VideoError has the code {code!r}")


def _printable(text: str) -> str:
    """Replaces control characters, line breaks and lone surrogates."""
    return text if text.isprintable() else "".join(each if each.isprintable() else "?" for each in text)
