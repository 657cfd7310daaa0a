"""From frames of any size to what the model takes: resize, centre crop, rescale, normalise.

Letters in shapes: B videos, T frames, C channels; H and W are height and width of a frame as it comes in,
h and w as it comes out. Sizes are pairs (height, width) in pixels.

The pixels are those of `transformers.VivitImageProcessor`, 8-bit ones to the bit. What differs, nearly always
where that one stops:

- An array (T, H, W, C) or (T, C, H, W) is a video; an array (B, T, ...) or a list of such arrays is several.
- A PIL picture has its channels last, also where it is 1 or 3 pixels high, and what is not RGB (grey,
  palette, alpha) is converted. With `input_data_format` it is taken as it is.
- `data_format=None` leaves the channels where they are in the frames.
- A parameter that breaks a rule is an error where the processor is made; an unknown one is always an error.
- Videos that do not make one tensor are an error for "np" as they are for "pt".
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from handler.checkpoints.hub import CheckpointFileError, HubOptions, fetch, read_json
from handler.processing.resize import ResizeCrop, rescale
from handler.validation import ConfigError, broken_rule

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The second is what the video processor of newer transformers writes: the same parameters by the same names.
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
TYPE_KEYS = ("image_processor_type", "video_processor_type", "feature_extractor_type")  # the first counts

CHANNELS_FIRST, CHANNELS_LAST = "channels_first", "channels_last"

Frame = Image.Image | np.ndarray | torch.Tensor
Size = int | Sequence[int] | Mapping[str, int]


class VideoInputs(dict):
    """What the processor returns: `inputs["pixel_values"]`, `inputs.pixel_values`, `model(**inputs)`."""

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
        """Move every tensor to `device`, cast floating-point ones to `dtype`; in place, and returns itself.

        A dtype may come alone, in the first place. What is not a tensor stays as it is.
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
    size            {"shortest_edge": n}, or n, keeps the aspect ratio ("longest_edge" beside it is not used);
                      {"height": h, "width": w}, or a pair, does not
    resample        Pillow's filter: a PIL.Image.Resampling or its number
    do_center_crop  cut `crop_size` out of the middle; a smaller frame is padded with zeros
    crop_size       {"height": h, "width": w}, or a pair, or n for a square
    do_rescale      multiply by `rescale_factor`
    offset          subtract 1 then; needs do_rescale
    do_normalize    then subtract `image_mean` and divide by `image_std`: one number, or one for each channel

    Once made, sizes are read-only mappings, mean and std are floats or tuples of floats. The defaults make
    -1 .. 1 of 0 .. 255 by rescaling, and -3 .. 1 of that by normalising, as published. Raises ConfigError.
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
                raise broken_rule(name, getattr(self, name), "true or false")
        if self.offset and not self.do_rescale:
            raise broken_rule("offset", self.offset, "false where do_rescale is false")
        clean = {
            "size": _size("size", self.size, is_crop=False),
            "resample": _resample(self.resample),
            "crop_size": _size("crop_size", self.crop_size, is_crop=True),
            "rescale_factor": _number("rescale_factor", self.rescale_factor),
            "image_mean": _numbers("image_mean", self.image_mean),
            "image_std": _numbers("image_std", self.image_std),
        }
        if 0 in np.ravel(clean["image_std"]):
            raise broken_rule("image_std", self.image_std, "other than 0")
        for name, value in clean.items():
            object.__setattr__(self, name, value)  # the one way to complete a frozen instance

    def __reduce__(self) -> tuple:
        # A read-only mapping can be neither pickled nor copied, and a data loader pickles its processor.
        return type(self).from_dict, (self.to_dict(),)

    def __call__(
        self, images: Frame | Sequence | None = None, *, videos: Frame | Sequence | None = None, **options: Any
    ) -> VideoInputs:
        """The same as `preprocess`, under the name that transformers gives the argument here or there."""
        return self.preprocess(videos if images is None else images, **options)

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

        videos             a frame, a list of frames or an array (T, ...) of them; or several videos: a list
                           of those, or an array (B, T, ...). A frame is a PIL picture, or a NumPy array or
                           tensor (H, W, C) or (C, H, W); to be resized, of whole numbers 0 .. 255 or floats
                           0 .. 1
        return_tensors     "pt" or "np": one tensor or array (B, T, C, h, w); None: a list per video of an
                           array (C, h, w) per frame
        data_format        "channels_first", or "channels_last" for (.., h, w, C); None: as the frames have it
        input_data_format  the same of the frames; None: told from the shape, 1 or 3 being channels, and first
                           before last
        overrides          parameters of the constructor, for this call; None counts as not given

        Rescaled values are float32, and so are normalised ones that were whole numbers; other floats keep
        their dtype. Without either step a frame has the dtype it came in; a resized one is uint8, or float32
        if it came as floats 0 .. 1.

        Raises ConfigError for a parameter, ValueError for videos, TypeError for an unknown parameter.
        """
        _check_choice("return_tensors", return_tensors, ("pt", "np"))
        _check_choice("data_format", data_format, (CHANNELS_FIRST, CHANNELS_LAST))
        _check_choice("input_data_format", input_data_format, (CHANNELS_FIRST, CHANNELS_LAST))
        processor = replace(self, **{name: value for name, value in overrides.items() if value is not None})
        process = functools.partial(
            processor._preprocess_frame, data_format=data_format, input_data_format=input_data_format
        )
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            pixels = [list(threads.map(process, frames)) for frames in _split_videos(videos)]
        if return_tensors is None:
            return VideoInputs(pixel_values=pixels)
        stacked = _stack(pixels)  # (B, T, C, h, w)
        return VideoInputs(pixel_values=torch.from_numpy(stacked) if return_tensors == "pt" else stacked)

    def _preprocess_frame(self, frame: Frame, data_format: str | None, input_data_format: str | None) -> np.ndarray:
        image, found_format = _channels_last(frame, input_data_format)  # (H, W, C)
        if self.do_rescale and image.dtype != np.uint8 and image.min() >= 0 and image.max() <= 1:
            warnings.warn("rescaling a frame with all values in 0 .. 1: was it before? Then do_rescale=False")
        image = self.resize_crop.resize_and_crop_frame(image)  # (h, w, C)
        # Arithmetic on a plane per channel is several times faster than on a few values per pixel.
        image = image.transpose(2, 0, 1).copy()  # (C, h, w)
        if self.do_rescale:
            image = rescale(image, self.rescale_factor)
        if self.offset:
            image = image - 1
        if self.do_normalize:
            image = _normalize(image, self.image_mean, self.image_std)
        return image.transpose(1, 2, 0) if (data_format or found_format) == CHANNELS_LAST else image

    @property
    def resize_crop(self) -> ResizeCrop:
        """What happens to a frame before its numbers change."""
        size = self.size.get("shortest_edge") or (self.size["height"], self.size["width"])
        return ResizeCrop(
            resize_to=size if self.do_resize else None,
            resample=self.resample,
            crop_to=(self.crop_size["height"], self.crop_size["width"]) if self.do_center_crop else None,
        )

    def resize_and_crop(self, frames: np.ndarray) -> np.ndarray:
        """The 8-bit half of `preprocess`, for a server that does the rest on its device (see `scale_and_bias`).

        frames: uint8 (T, H, W, 3). Returns uint8 (T, 3, h, w), contiguous. Raises TypeError for other frames.
        """
        return self.resize_crop.resize_and_crop(frames, threads=torch.get_num_threads())

    def scale_and_bias(self) -> tuple[np.ndarray, np.ndarray]:
        """(scale, bias), float32 (3,) each: `pixel * scale + bias` rescales, offsets and normalises."""
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VivitImageProcessor":
        """From the content of a preprocessor_config.json. Other keys are ignored, null means the default.

        Raises ConfigError, also for another model's processor: those know no `offset`, so the same numbers
        would make other pixels.
        """
        type_key = next((key for key in TYPE_KEYS if values.get(key)), None)
        if type_key and not str(values[type_key]).startswith("Vivit"):
            raise broken_rule(type_key, values[type_key], "that of a ViViT, VivitImageProcessor")
        own = {parameter.name for parameter in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in own and value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Content for a preprocessor_config.json: `from_dict` of it equals this. transformers reads it."""
        values = {parameter.name: getattr(self, parameter.name) for parameter in fields(self)}
        for name, value in values.items():
            if isinstance(value, Mapping):
                values[name] = dict(value)
            elif isinstance(value, tuple):
                values[name] = list(value)
        return {"image_processor_type": "VivitImageProcessor", **values, "resample": int(self.resample)}

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> "VivitImageProcessor":
        """Loads the preprocessor_config.json of a checkpoint.

        Args:
            name_or_path: a local directory or a hub id.
            **hub: see `handler.checkpoints.hub.fetch`.

        Raises:
            CheckpointError: The errors of `fetch`; CheckpointFileError for an unreadable or invalid file.
        """
        path = fetch(name_or_path, PROCESSOR_FILES, **hub)
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


def _check_choice(name: str, value: Any, choices: tuple[str, str]) -> None:
    if value is not None and value not in choices:
        raise broken_rule(name, value, f"None or one of {', '.join(choices)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _number(name: str, value: Any) -> float:
    if not _is_number(value):
        raise broken_rule(name, value, "a finite number")
    return float(value)


def _numbers(name: str, value: Any) -> float | tuple[float, ...]:
    if isinstance(value, (list, tuple, np.ndarray)) and len(value) > 0 and all(map(_is_number, value)):
        return tuple(map(float, value))
    if not _is_number(value):
        raise broken_rule(name, value, "a finite number, or one for each channel")
    return float(value)


def _resample(value: Any) -> Image.Resampling:
    try:
        return Image.Resampling(value)
    except ValueError as error:
        filters = ", ".join(f"{known.value} ({known.name})" for known in sorted(Image.Resampling))
        raise broken_rule("resample", value, f"one of {filters}") from error


def _size(name: str, value: Any, *, is_crop: bool) -> Mapping[str, int]:
    """A size as the hub may spell it, spelt out."""
    spelt = value
    if isinstance(value, Integral):
        spelt = {"height": value, "width": value} if is_crop else {"shortest_edge": value}
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        spelt = {"height": value[0], "width": value[1]}
    shapes = [{"height", "width"}]
    if not is_crop:
        shapes += [{"shortest_edge"}, {"shortest_edge", "longest_edge"}]
    if not isinstance(spelt, Mapping) or set(spelt) not in shapes:
        rule = "height and width, or n for a square" if is_crop else "a shortest_edge, or height and width"
        raise broken_rule(name, value, rule)
    for length in spelt.values():
        if not isinstance(length, Integral) or isinstance(length, bool) or length < 1:
            raise broken_rule(name, value, "in whole pixels, 1 or more")
    return MappingProxyType({key: int(length) for key, length in spelt.items()})


def _channel_values(name: str, values: float | tuple[float, ...], channels: int) -> np.ndarray:
    """float64 (C,)."""
    if isinstance(values, tuple) and len(values) != channels:
        raise broken_rule(name, values, f"one number, or as many as the frames have channels ({channels})")
    return np.broadcast_to(np.array(values), channels)


# Frames in, a batch out


def _split_videos(videos: Any) -> list[list[Frame]]:
    if _is_frame(videos):
        return [[videos]]
    items = _items(videos)
    if all(map(_is_frame, items)):
        return [items]
    split = [_items(video) for video in items]
    for frame in (frame for frames in split for frame in frames):
        if not _is_frame(frame):
            raise ValueError(f"a frame must be PIL or (H, W, C) or (C, H, W), got {_describe(frame)}")
    return split


def _is_frame(value: Any) -> bool:
    return isinstance(value, Image.Image) or (_is_array(value) and value.ndim == 3)


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor))


def _items(value: Any) -> list:
    is_list = isinstance(value, (list, tuple)) or (_is_array(value) and value.ndim > 3)
    if not is_list or len(value) == 0:
        raise ValueError(
            "expected a frame, a list of frames, an array (T, H, W, C) or (T, C, H, W) of them, "
            f"or a list of such videos, none of them empty; got {_describe(value)}"
        )
    return list(value)


def _describe(value: Any) -> str:
    if _is_array(value):
        return f"{value.dtype} {tuple(value.shape)}"
    return "an empty list" if isinstance(value, (list, tuple)) and not value else type(value).__name__


def _channels_last(frame: Frame, input_data_format: str | None) -> tuple[np.ndarray, str]:
    """The frame as an array (H, W, C), and where its channels were."""
    if isinstance(frame, Image.Image):
        if input_data_format is None:
            input_data_format = CHANNELS_LAST
            frame = frame if frame.mode == "RGB" else frame.convert("RGB")
        frame = np.asarray(frame)
    elif isinstance(frame, torch.Tensor):
        frame = frame.detach().cpu().numpy()
    if frame.ndim != 3 or 0 in frame.shape or frame.dtype.kind not in "buif":
        raise ValueError(f"a frame must have numbers (H, W, C) or (C, H, W), got {_describe(frame)}")
    if input_data_format is None:
        if frame.shape[0] not in (1, 3) and frame.shape[2] not in (1, 3):
            raise ValueError(
                f"without input_data_format a frame must have 1 or 3 channels, first or last, got {_describe(frame)}"
            )
        input_data_format = CHANNELS_FIRST if frame.shape[0] in (1, 3) else CHANNELS_LAST
    if input_data_format == CHANNELS_FIRST:
        frame = frame.transpose(1, 2, 0)  # (H, W, C)
    return frame, input_data_format


def _stack(videos: list[list[np.ndarray]]) -> np.ndarray:
    """Videos of frames (C, h, w) -> (B, T, C, h, w)."""
    frame_counts = sorted({len(frames) for frames in videos})
    shapes = sorted({frame.shape for frames in videos for frame in frames})
    if len(frame_counts) > 1 or len(shapes) > 1:
        raise ValueError(
            "one tensor needs videos of equally many frames of one shape, got "
            f"{frame_counts} frames of shapes {shapes}; leave out return_tensors, or crop"
        )
    return np.array(videos)  # (B, T, C, h, w)


# The steps, for one frame


def _normalize(image: np.ndarray, mean: float | tuple[float, ...], std: float | tuple[float, ...]) -> np.ndarray:
    """(C, h, w) -> (C, h, w)."""
    if image.dtype.kind != "f":
        image = image.astype(np.float32)
    mean = _channel_values("image_mean", mean, len(image)).astype(image.dtype)
    std = _channel_values("image_std", std, len(image)).astype(image.dtype)
    return (image - mean[:, None, None]) / std[:, None, None]
