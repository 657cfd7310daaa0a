"""From frames of any size to what the model takes: resize, centre crop, rescale, normalise.

Letters in shapes: B videos, T frames, C channels; H and W height and width of a frame as it comes in, h and w as it
comes out. Sizes are pairs (height, width) in pixels.

The 8-bit frames and the floats are those of `transformers.VivitImageProcessor`. What differs, where that one stops:

- An array (T, H, W, C) or (T, C, H, W) is a video; an array (B, T, ...) and a list of such arrays are several.
- A PIL picture that is not RGB (grey, palette, alpha) is converted to RGB, unless `input_data_format` is given.
- `data_format=None` keeps the channels where they are in the frame that comes in.
- A parameter that breaks a rule is an error where the processor is made, an unknown one is always an error, and videos
  that do not make one tensor are an error for "np" as they are for "pt".
"""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from handler.config import ConfigError
from handler.hub import CheckpointFileError, fetch, read_json

# The second is what the video processor of newer transformers writes; the parameters have the same names.
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
TYPE_KEYS = ("image_processor_type", "video_processor_type", "feature_extractor_type")  # the first one there counts

CHANNELS_FIRST, CHANNELS_LAST = "channels_first", "channels_last"

Frame = Image.Image | np.ndarray | torch.Tensor
Size = int | Sequence[int] | Mapping[str, int]


class VideoInputs(dict):
    """What the processor returns: `inputs["pixel_values"]`, `inputs.pixel_values` and `model(**inputs)` all work."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"expected one of {', '.join(self)}, got {name}") from None

    def to(
        self,
        device: torch.device | torch.dtype | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> "VideoInputs":
        """Move every tensor to `device` and cast those of floating point to `dtype`, in place; returns itself.

        A dtype may stand alone in the first place. What is not a tensor stays as it is.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                own_dtype = dtype if value.is_floating_point() else None
                self[name] = value.to(device=device, dtype=own_dtype, non_blocking=non_blocking)
        return self


@dataclass(frozen=True, kw_only=True)
class VivitImageProcessor:
    """Resize, centre crop, rescale, normalise: the published parameters and defaults.

    do_resize       resize every frame to `size`
    size            {"shortest_edge": n} keeps the aspect ratio (n alone means it, a "longest_edge" beside it is not
                      used), {"height": h, "width": w} does not (a pair means it)
    resample        Pillow's filter, PIL.Image.Resampling or its number
    do_center_crop  cut `crop_size` out of the middle; what is smaller is padded with zeros
    crop_size       {"height": h, "width": w}; a pair, or n for a square
    do_rescale      multiply by `rescale_factor`
    offset          then subtract 1; needs do_rescale
    do_normalize    then subtract `image_mean` and divide by `image_std`, each a number or one number a channel

    Once made, the sizes are read-only mappings, mean and std floats or tuples of floats. With the defaults, 0 .. 255
    becomes -1 .. 1 by rescaling and then -3 .. 1 by normalising, as published. Raises ConfigError.
    """

    do_resize: bool = True
    size: Size = field(default_factory=lambda: {"shortest_edge": 256})
    resample: int = Image.Resampling.BILINEAR
    do_center_crop: bool = True
    crop_size: Size = field(default_factory=lambda: {"height": 224, "width": 224})
    do_rescale: bool = True
    rescale_factor: float = 1 / 127.5
    offset: bool = True
    do_normalize: bool = True
    image_mean: float | Sequence[float] = (0.5, 0.5, 0.5)
    image_std: float | Sequence[float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("do_resize", "do_center_crop", "do_rescale", "offset", "do_normalize"):
            if not isinstance(getattr(self, name), bool):
                raise _broken(name, getattr(self, name), "true or false")
        if self.offset and not self.do_rescale:
            raise _broken("offset", self.offset, "false where do_rescale is false")
        clean = {
            "size": _size("size", self.size, square=False),
            "resample": _resample(self.resample),
            "crop_size": _size("crop_size", self.crop_size, square=True),
            "rescale_factor": _number("rescale_factor", self.rescale_factor),
            "image_mean": _per_channel("image_mean", self.image_mean),
            "image_std": _per_channel("image_std", self.image_std),
        }
        if 0 in np.ravel(clean["image_std"]):
            raise _broken("image_std", self.image_std, "other than 0")
        for name, value in clean.items():
            object.__setattr__(self, name, value)  # the one way to complete a frozen instance

    def __reduce__(self) -> tuple:
        # A mapping proxy can be neither pickled nor copied, and a data loader does both to its processor.
        return type(self).from_dict, (self.to_dict(),)

    def __call__(self, videos: Frame | Sequence, **options: Any) -> VideoInputs:
        """The same as `preprocess`."""
        return self.preprocess(videos, **options)

    def preprocess(
        self,
        videos: Frame | Sequence,
        *,
        return_tensors: str | None = None,
        data_format: str | None = CHANNELS_FIRST,
        input_data_format: str | None = None,
        **overrides: Any,
    ) -> VideoInputs:
        """One video or several, ready for the model, under the name `pixel_values`.

        videos             one frame, a list of frames, an array (T, ...) of frames; or several videos: a list of either,
                           an array (B, T, ...). A frame is a PIL picture, or a NumPy array or tensor (H, W, C) or
                           (C, H, W) of whole numbers 0 .. 255 or, for resizing, of floats 0 .. 1
        return_tensors     "pt" or "np": one tensor or array (B, T, C, h, w); None: a list for every video of one array
                           (C, h, w) for every frame
        data_format        "channels_first", or "channels_last" for (.., h, w, C); None: as in the frame that comes in
        input_data_format  the same of the frames; None: told from the shape, where 1 or 3 is the channels, first before
                           last
        overrides          parameters of the constructor, for this call; None is as if it was not given

        Values are float32 if they are rescaled, or normalised from whole numbers; other floats keep their dtype, and
        frames that are neither rescaled nor normalised keep theirs (resized ones are uint8, or float32 if they came
        as floats 0 .. 1).

        Raises ConfigError for a parameter, TypeError or ValueError for a frame.
        """
        processor = replace(self, **{name: value for name, value in overrides.items() if value is not None})
        _check_choice("return_tensors", return_tensors, ("pt", "np"))
        _check_choice("data_format", data_format, (CHANNELS_FIRST, CHANNELS_LAST))
        _check_choice("input_data_format", input_data_format, (CHANNELS_FIRST, CHANNELS_LAST))
        pixels = [
            [processor._preprocess_frame(frame, data_format, input_data_format) for frame in frames]
            for frames in _split_videos(videos)
        ]
        if return_tensors is None:
            return VideoInputs(pixel_values=pixels)
        stacked = _stack(pixels)  # (B, T, C, h, w)
        return VideoInputs(pixel_values=torch.from_numpy(stacked) if return_tensors == "pt" else stacked)

    def _preprocess_frame(self, frame: Frame, data_format: str | None, input_data_format: str | None) -> np.ndarray:
        image, found_format = _channels_last(frame, input_data_format)  # (H, W, C)
        if self.do_rescale and image.dtype != np.uint8 and 0 <= image.min() and image.max() <= 1:
            warnings.warn("a frame to be rescaled has all its values in 0 .. 1: rescaled before? Then do_rescale=False")
        image = self._resize_and_crop(image)  # (h, w, C)
        # What follows is several times faster on one plane a channel than on C values a pixel.
        image = np.ascontiguousarray(image.transpose(2, 0, 1))  # (C, h, w)
        if self.do_rescale:
            image = _rescale(image, self.rescale_factor)
        if self.offset:
            image = image - 1
        if self.do_normalize:
            image = _normalize(image, self.image_mean, self.image_std)
        if (data_format or found_format) == CHANNELS_LAST:
            image = image.transpose(1, 2, 0)  # (h, w, C)
        return image

    def _resize_and_crop(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) -> (h, w, C)."""
        size = self._resized_size(*image.shape[:2])
        rows, columns = self._kept(size)
        if self.do_resize:
            image = _resize(image, size, self.resample, rows, columns)
        else:
            image = image[rows.start:rows.stop, columns.start:columns.stop]
        if self.do_center_crop:
            image = _pad(image, (self.crop_size["height"], self.crop_size["width"]))
        return image

    def resize_and_crop(self, frames: np.ndarray) -> np.ndarray:
        """The 8-bit half of `preprocess`, for a server that rescales and normalises on its device: see `affine`.

        frames: uint8 (T, H, W, 3). Returns uint8 (T, 3, h, w), contiguous. Raises TypeError for anything else.
        """
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.shape[3:] != (3,):
            raise TypeError(f"frames must be a uint8 array (T, H, W, 3), got {_describe(frames)}")
        height, width = self.output_size(*frames.shape[1:3])
        out = np.empty((len(frames), 3, height, width), dtype=np.uint8)
        for index, frame in enumerate(frames):
            out[index] = self._resize_and_crop(frame).transpose(2, 0, 1)  # (3, h, w)
        return out

    def affine(self) -> tuple[np.ndarray, np.ndarray]:
        """(scale, bias), each float32 (3,): `pixel * scale + bias` is what rescaling and normalising make of a pixel."""
        scale, bias = np.ones(3), np.zeros(3)
        if self.do_rescale:
            scale *= self.rescale_factor
        if self.offset:
            bias -= 1
        if self.do_normalize:
            mean = _channel_values("image_mean", self.image_mean, 3)
            std = _channel_values("image_std", self.image_std, 3)
            scale, bias = scale / std, (bias - mean) / std
        return scale.astype(np.float32), bias.astype(np.float32)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of what a frame of `height` x `width` pixels becomes."""
        if self.do_center_crop:
            return self.crop_size["height"], self.crop_size["width"]
        return self._resized_size(height, width)

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        if not self.do_resize:
            return height, width
        if "shortest_edge" not in self.size:
            return self.size["height"], self.size["width"]
        short = self.size["shortest_edge"]
        if width <= height:
            return int(short * height / width), short
        return short, int(short * width / height)

    def _kept(self, size: tuple[int, int]) -> tuple[range, range]:
        """The rows and columns of a resized frame that the centre crop keeps."""
        if not self.do_center_crop:
            return range(size[0]), range(size[1])
        return _middle(size[0], self.crop_size["height"]), _middle(size[1], self.crop_size["width"])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VivitImageProcessor":
        """From the content of a preprocessor_config.json. What is not a parameter is ignored, null is the default.

        Raises ConfigError, also for the file of another model's processor: those know no `offset`, so the same numbers
        mean other pixels.
        """
        processor_type = next((values[key] for key in TYPE_KEYS if values.get(key)), "VivitImageProcessor")
        if not str(processor_type).startswith("Vivit"):
            raise _broken("image_processor_type", processor_type, "VivitImageProcessor")
        own = {parameter.name for parameter in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in own and value is not None})

    def to_dict(self) -> dict[str, Any]:
        """The content of a preprocessor_config.json: `from_dict` of it is equal to this, and transformers reads it."""
        values = {"image_processor_type": "VivitImageProcessor"}
        for name in (parameter.name for parameter in fields(self)):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                value = dict(value)
            elif isinstance(value, tuple):
                value = list(value)
            values[name] = value
        values["resample"] = int(self.resample)
        return values

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "VivitImageProcessor":
        """From the preprocessor_config.json of a local directory or hub repository; the arguments are those of `hub.fetch`.

        Raises CheckpointError: what `hub.fetch` raises, and CheckpointFileError where the content breaks a rule.
        """
        path = fetch(name_or_path, PROCESSOR_FILES, revision=revision, cache_dir=cache_dir, token=token,
                     local_files_only=local_files_only)
        try:
            return cls.from_dict(read_json(path))
        except ConfigError as error:
            raise CheckpointFileError(f"{path}: {error}") from error

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write preprocessor_config.json into `directory` (made where it is missing)."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        Path(directory, PROCESSOR_FILES[0]).write_text(text + "\n", encoding="utf-8")


# Parameters


def _broken(name: str, value: Any, rule: str) -> ConfigError:
    return ConfigError(f"{name} must be {rule}, got {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise _broken(name, value, f"one of {', '.join(choices)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _number(name: str, value: Any) -> float:
    if not _is_number(value):
        raise _broken(name, value, "a finite number")
    return float(value)


def _per_channel(name: str, value: Any) -> float | tuple[float, ...]:
    if _is_number(value):
        return float(value)
    if isinstance(value, (Sequence, np.ndarray)) and len(value) and all(map(_is_number, value)):
        return tuple(map(float, value))
    raise _broken(name, value, "a finite number, or one a channel")


def _resample(value: Any) -> Image.Resampling:
    try:
        return Image.Resampling(value)
    except ValueError as error:
        filters = ", ".join(f"{item.value} ({item.name})" for item in sorted(Image.Resampling))
        raise _broken("resample", value, f"one of {filters}") from error


def _size(name: str, value: Any, *, square: bool) -> Mapping[str, int]:
    """A size as the hub may give it, under its full names. One number is a square or a shortest edge."""
    given = value
    if isinstance(value, Integral):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    shapes = [{"height", "width"}] + ([] if square else [{"shortest_edge"}, {"shortest_edge", "longest_edge"}])
    if not isinstance(value, Mapping) or set(value) not in shapes:
        others = "or n for a square" if square else "n, or a shortest_edge"
        raise _broken(name, given, f"a height and a width, {others}")
    for length in value.values():
        if not isinstance(length, Integral) or isinstance(length, bool) or length < 1:
            raise _broken(name, given, "whole numbers of pixels, each 1 or more")
    return MappingProxyType({key: int(length) for key, length in value.items()})


# Frames in, one batch out


def _split_videos(videos: Any) -> list[list[Frame]]:
    if _is_frame(videos):
        return [[videos]]
    items = _items(videos)
    if all(map(_is_frame, items)):
        return [items]
    split = [_items(video) for video in items]
    for frame in (frame for frames in split for frame in frames):
        if not _is_frame(frame):
            raise ValueError(f"expected a frame, PIL or an array (H, W, C) or (C, H, W), got {_describe(frame)}")
    return split


def _is_frame(value: Any) -> bool:
    return isinstance(value, Image.Image) or isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 3


def _items(value: Any) -> list:
    is_array = isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim > 3
    if not (isinstance(value, (list, tuple)) or is_array) or len(value) == 0:
        raise ValueError("expected a frame, a list of frames or an array (T, H, W, C) or (T, C, H, W) of them, or a "
                         f"list of such videos; got {_describe(value)}")
    return list(value)


def _describe(value: Any) -> str:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (" without items" if isinstance(value, (list, tuple)) and not value else "")


def _channels_last(frame: Frame, input_data_format: str | None) -> tuple[np.ndarray, str]:
    """Any frame as an array (H, W, C), and where its channels were."""
    if isinstance(frame, Image.Image):
        if input_data_format is None:
            frame, input_data_format = frame.convert("RGB"), CHANNELS_LAST
        frame = np.array(frame)
    elif isinstance(frame, torch.Tensor):
        frame = frame.detach().cpu().numpy()
    if frame.ndim != 3 or 0 in frame.shape or frame.dtype.kind not in "buif":
        raise ValueError(f"a frame must be an array (H, W, C) or (C, H, W) of numbers, got {_describe(frame)}")
    if input_data_format is None:
        if frame.shape[0] in (1, 3):
            input_data_format = CHANNELS_FIRST
        elif frame.shape[2] in (1, 3):
            input_data_format = CHANNELS_LAST
        else:
            raise ValueError("a frame must have 1 or 3 channels, first or last, where input_data_format is not given; "
                             f"got {_describe(frame)}")
    return frame.transpose(1, 2, 0) if input_data_format == CHANNELS_FIRST else frame, input_data_format  # (H, W, C)


def _stack(videos: list[list[np.ndarray]]) -> np.ndarray:
    """Videos of frames (C, h, w) -> (B, T, C, h, w)."""
    frame_counts = sorted({len(frames) for frames in videos})
    shapes = sorted({frame.shape for frames in videos for frame in frames})
    if len(frame_counts) > 1 or len(shapes) > 1:
        raise ValueError("one tensor needs videos of as many frames and frames of one size each, got "
                         f"{frame_counts} frames of shapes {shapes}: leave out return_tensors, or crop")
    return np.array(videos)  # (B, T, C, h, w)


# The steps, on one frame (H, W, C)


def _rescale(image: np.ndarray, factor: float) -> np.ndarray:
    # In double precision, as the reference has it: single would differ in the last bit.
    return (image.astype(np.float64) * factor).astype(np.float32)


def _normalize(image: np.ndarray, mean: float | tuple[float, ...], std: float | tuple[float, ...]) -> np.ndarray:
    """(C, h, w) -> (C, h, w), in the dtype of the image if it is one of floating point, else in float32."""
    if image.dtype.kind != "f":
        image = image.astype(np.float32)
    mean = _channel_values("image_mean", mean, len(image)).astype(image.dtype)[:, None, None]  # (C, 1, 1)
    std = _channel_values("image_std", std, len(image)).astype(image.dtype)[:, None, None]  # (C, 1, 1)
    return (image - mean) / std


def _channel_values(name: str, values: float | tuple[float, ...], channels: int) -> np.ndarray:
    """float64 (C,)."""
    if isinstance(values, tuple) and len(values) != channels:
        raise _broken(name, values, f"one number, or as many as the frames have channels ({channels})")
    return np.broadcast_to(np.array(values), channels)


def _middle(length: int, wanted: int) -> range:
    """The middle `wanted` of `length` pixels; all of them where there are fewer. The odd pixel is left at the end."""
    start = (length - wanted) // 2
    return range(max(start, 0), min(start + wanted, length))


def _pad(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Black around a frame that is smaller than `size`; the odd row or column of it comes first."""
    height, width, channels = image.shape
    if (height, width) == size:
        return image
    top, left = -((height - size[0]) // 2), -((width - size[1]) // 2)
    padded = np.zeros((*size, channels), dtype=image.dtype)
    padded[top:top + height, left:left + width] = image
    return padded


def _resize(image: np.ndarray, size: tuple[int, int], resample: int, rows: range, columns: range) -> np.ndarray:
    """These rows and columns of the frame resized to `size`, as Pillow does it: in 8 bits.

    image: whole numbers 0 .. 255, which make uint8, or floats 0 .. 1, which make float32.
    """
    image, is_unit = _to_8_bit(image)
    height, width, channels = image.shape
    plan = _plan((height, width), size, resample, rows, columns) if channels == 3 else None
    if plan is None:
        resized = _resize_whole(image, size, resample)[rows.start:rows.stop, columns.start:columns.stop]
    else:
        resized = _resize_part(image, plan, resample)
    return _rescale(resized, 1 / 255) if is_unit else resized


def _resize_whole(image: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    height, width, channels = image.shape
    picture = Image.fromarray(image[:, :, 0] if channels == 1 else image)
    return np.asarray(picture.resize((size[1], size[0]), resample)).reshape(*size, channels)


def _to_8_bit(image: np.ndarray) -> tuple[np.ndarray, bool]:
    """The frame as uint8, and whether it was multiplied by 255 for that."""
    if image.dtype == np.uint8:
        return image, False
    if 0 <= image.min() and image.max() <= 255:
        is_whole = np.allclose(image, image.astype(np.int64))
        if is_whole:
            return image.astype(np.uint8), False
        if image.max() <= 1:
            return _rescale(image, 255).astype(np.uint8), True
    raise ValueError("a frame to be resized must have whole numbers 0 .. 255 or floats 0 .. 1, got "
                     f"{image.dtype} {image.min()} .. {image.max()}")


# Resizing only what the centre crop keeps, to the same bits
#
# Pillow resizes in two passes, across and down, with integer weights that follow from where a target pixel stands in
# the source. A part of the source, given as a box, gets the same weights where the box's corners are exact in float32,
# which is so every `step` target pixels:
#
#     source  |.....|.....|.....|.....|.....|.....|
#                 (-------- read -------)            `read`: the box, and as far as the filter reaches beyond it
#                   |------ box ------|              `box`: what the pixels made stand on
#     target  |---|---|---|---|---|---|---|          a mark every `step` pixels
#                 |--- made --|                      `made`: whole steps
#                   [- kept -]                       `kept`: what is wanted
#
# This is not taken on trust. `_same_weights` compares the weights, and `_plan` tries on noise which pass Pillow does
# first, which depends on the sizes and on Pillow's version. Where either is in doubt, the whole frame is resized.

# Source pixels either side of its centre that a filter reads at scale 1. Filters with edges (NEAREST, BOX) are left
# out: the last bit of a position can move a pixel across.
FILTER_REACH = {
    Image.Resampling.BILINEAR: 1, Image.Resampling.HAMMING: 1, Image.Resampling.BICUBIC: 2, Image.Resampling.LANCZOS: 3
}
# Corners are at multiples of 1 / 256 pixel: with 16 bits of whole pixels they fit the 24 bits of a float32.
BOX_FRACTION = 256


class _Axis(NamedTuple):
    read: slice  # of the source
    box: tuple[float, float]  # counted from the first pixel read
    made: range  # of the target
    kept: tuple[int, int]  # start and stop, counted from the first pixel made


class _Plan(NamedTuple):
    rows: _Axis
    columns: _Axis
    is_down_first: bool


def _resize_part(image: np.ndarray, plan: _Plan, resample: int) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (kept rows, kept columns, 3)."""
    picture = Image.fromarray(image[plan.rows.read, plan.columns.read])
    for is_down in (plan.is_down_first, not plan.is_down_first):
        width, height = picture.size
        if is_down:
            (top, bottom), (first, stop) = plan.rows.box, plan.rows.kept
            picture = picture.resize((width, len(plan.rows.made)), resample, box=(0, top, width, bottom))
            picture = picture.crop((0, first, width, stop))
        else:
            (left, right), (first, stop) = plan.columns.box, plan.columns.kept
            picture = picture.resize((len(plan.columns.made), height), resample, box=(left, 0, right, height))
            picture = picture.crop((first, 0, stop, height))
    return np.asarray(picture)


@lru_cache(maxsize=1024)
def _plan(
    source: tuple[int, int], target: tuple[int, int], resample: int, rows: range, columns: range
) -> _Plan | None:
    """How to resize no more than these rows and columns of a frame; None where only resizing all of it is sure."""
    if resample not in FILTER_REACH or (len(rows), len(columns)) == target:
        return None
    row_axis = _axis(source[0], target[0], rows, resample)
    column_axis = _axis(source[1], target[1], columns, resample)
    if row_axis is None or column_axis is None:
        return None
    noise = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
    expected = _resize_whole(noise, target, resample)[rows.start:rows.stop, columns.start:columns.stop]
    plans = [_Plan(row_axis, column_axis, is_down_first) for is_down_first in (False, True)]
    exact = [plan for plan in plans if np.array_equal(_resize_part(noise, plan, resample), expected)]
    # The right order always passes. If the wrong one does too, noise does not tell them apart.
    return exact[0] if len(exact) == 1 else None


def _axis(source: int, target: int, kept: range, resample: int) -> _Axis | None:
    """One axis of a plan; None if Pillow would weigh the pixels of the part otherwise than those of the whole."""
    step = target // math.gcd(source * BOX_FRACTION, target)
    made = range(kept.start // step * step, -(-kept.stop // step) * step)
    start, stop = made.start * source / target, made.stop * source / target
    reach = math.ceil(FILTER_REACH[resample] * max(1, source / target)) + 1
    read = slice(max(0, math.floor(start) - reach), min(source, math.ceil(stop) + reach))
    axis = _Axis(
        read=read,
        box=(start - read.start, stop - read.start),
        made=made,
        kept=(kept.start - made.start, kept.stop - made.start),
    )
    return axis if _same_weights(axis, source, target, resample, spacing=2 * reach + 1) else None


def _same_weights(axis: _Axis, source: int, target: int, resample: int, *, spacing: int) -> bool:
    """Whether the part gets the weights of the whole: both resize combs so wide that a filter sees one tooth at a time.

    In Pillow's 32-bit mode a tooth of 2 ** 22 comes out as the weight of 22 bits that its 8-bit mode computes with.
    """
    teeth = np.arange(source) % spacing == np.arange(spacing)[:, None]  # (spacing, source): the comb at every place
    combs = teeth.astype(np.int32) << 22
    whole = Image.fromarray(combs).resize((target, spacing), resample)
    part = Image.fromarray(np.ascontiguousarray(combs[:, axis.read])).resize(
        (len(axis.made), spacing), resample, box=(axis.box[0], 0, axis.box[1], spacing)
    )
    return np.array_equal(np.asarray(whole)[:, axis.made.start:axis.made.stop], np.asarray(part))
