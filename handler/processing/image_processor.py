"""VivitImageProcessor: resizes, center-crops, rescales and normalizes frames for the model.

Shapes: B videos, T frames, C channels, (H, W) size of an input frame, (h, w) size of an output frame. Sizes are pairs
(height, width) in pixels.

The results are those of `transformers.VivitImageProcessor`, bit-exact for 8-bit output. Differences concern inputs that
transformers rejects or misreads:

- An array (T, H, W, C) or (T, C, H, W) is a video; an array (B, T, ...) or a list of such arrays is a batch of videos.
- PIL images have their channels last even if they are 1 or 3 pixels high. Modes other than RGB (grayscale, palette,
  alpha) are converted, unless `input_data_format` is given.
- With `data_format=None`, the channels keep their position.
- Invalid parameters raise an error when the processor is created; unknown ones always do.
- Videos of different sizes raise an error for return_tensors="np", as they do for "pt".
"""

from __future__ import annotations

import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handler.checkpoints.hub import CheckpointFileError, HubOptions, fetch, read_json, write_json
from handler.processing.resize import ResizeCrop, rescale
from handler.validation import ConfigError, broken_rule, check_bool, check_choice

if TYPE_CHECKING:
    import torch
    from typing_extensions import TypeIs, Unpack

# Newer versions of transformers save the same parameters as a video processor, in the second file.
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
TYPE_KEYS = ("image_processor_type", "video_processor_type", "feature_extractor_type")  # the first one present counts

CHANNELS_FIRST, CHANNELS_LAST = "channels_first", "channels_last"

Frame: TypeAlias = "Image.Image | NDArray[Any] | torch.Tensor"
# A frame, a video, or a batch of videos; see VivitImageProcessor.preprocess.
Videos: TypeAlias = "Frame | Sequence[Any]"
FrameSize = int | Sequence[int] | Mapping[str, int]


class VideoInputs(dict[str, Any]):
    """Model inputs by name, also available as attributes: `model(**inputs)`, `inputs.pixel_values`."""

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
    ) -> VideoInputs:
        """Moves all tensors to `device` and casts floating-point tensors to `dtype`, in place.

        Args:
            device: target device, or a dtype in its place.
            dtype: target dtype.
            non_blocking: see torch.Tensor.to.

        Returns:
            The object itself.
        """
        import torch

        if isinstance(device, torch.dtype):
            device, dtype = None, device
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                target_dtype = dtype if value.is_floating_point() else None
                self[name] = value.to(device=device, dtype=target_dtype, non_blocking=non_blocking)
        return self


@dataclass(frozen=True, kw_only=True)
class VivitImageProcessor:
    """Resizes, center-crops, rescales and normalizes frames, with the parameters and defaults of transformers.

    Rescaling with the default parameters maps pixels to [-1, 1]; normalizing maps these to [-3, 1], as published.

    Attributes:
        do_resize: whether to resize frames to `size`.
        size: {"shortest_edge": n} or n resizes the shorter side to n pixels and keeps the aspect ratio; "longest_edge"
            is accepted and ignored. {"height": h, "width": w} or a pair is the exact size.
        resample: Pillow's filter, a PIL.Image.Resampling or its number.
        antialias: False resizes like scenic, the original code, see ResizeCrop; requires BILINEAR. Not a parameter of
            transformers, which ignores it. Only written to files if it is False.
        do_center_crop: whether to crop the center of frames to `crop_size`. Smaller frames are padded with zeros.
        crop_size: {"height": h, "width": w}, a pair, or n for a square.
        do_rescale: whether to multiply by `rescale_factor`.
        rescale_factor: factor for rescaling.
        offset: whether to subtract 1 after rescaling.
        do_normalize: whether to subtract `image_mean` and divide by `image_std`.
        image_mean: a number, or one per channel.
        image_std: a number, or one per channel.

    After creation, sizes are read-only mappings, mean and standard deviation are floats or tuples of floats.

    Raises:
        ConfigError: A value is invalid.
    """

    do_resize: bool = True
    size: FrameSize = field(default_factory=lambda: {"shortest_edge": 256})
    resample: int = Image.Resampling.BILINEAR
    antialias: bool = True
    do_center_crop: bool = True
    crop_size: FrameSize = field(default_factory=lambda: {"height": 224, "width": 224})
    do_rescale: bool = True
    rescale_factor: float = 1 / 127.5
    offset: bool = True
    do_normalize: bool = True
    image_mean: float | Sequence[float] = (0.5, 0.5, 0.5)
    image_std: float | Sequence[float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("do_resize", "antialias", "do_center_crop", "do_rescale", "offset", "do_normalize"):
            check_bool(name, getattr(self, name))
        if self.offset and not self.do_rescale:
            raise broken_rule("offset", self.offset, "false if do_rescale is false")
        resolved: dict[str, Any] = {
            "size": _resolve_size("size", self.size, is_crop=False),
            "resample": _resolve_resample(self.resample),
            "crop_size": _resolve_size("crop_size", self.crop_size, is_crop=True),
            "rescale_factor": _resolve_number("rescale_factor", self.rescale_factor),
            "image_mean": _resolve_numbers("image_mean", self.image_mean),
            "image_std": _resolve_numbers("image_std", self.image_std),
        }
        if not self.antialias and resolved["resample"] != Image.Resampling.BILINEAR:
            raise broken_rule("antialias", False, "true unless resample is 2 (BILINEAR)")
        if 0 in np.ravel(resolved["image_std"]):
            raise broken_rule("image_std", self.image_std, "other than 0")
        for name, value in resolved.items():
            object.__setattr__(self, name, value)  # plain assignment fails because the class is frozen

    def __reduce__(self) -> tuple[Callable[[Mapping[str, Any]], VivitImageProcessor], tuple[dict[str, Any]]]:
        # Read-only mappings cannot be pickled or copied, but data loaders pickle their processor.
        return type(self).from_dict, (self.to_dict(),)

    def __call__(self, images: Videos | None = None, *, videos: Videos | None = None, **options: Any) -> VideoInputs:
        """Calls `preprocess` with `images` or `videos`; versions of transformers use either name."""
        given = videos if images is None else images
        if given is None:
            raise ValueError("expected images or videos, got neither")
        return self.preprocess(given, **options)

    def preprocess(
        self,
        videos: Videos,
        *,
        return_tensors: str | None = None,
        data_format: str | None = CHANNELS_FIRST,
        input_data_format: str | None = None,
        **overrides: Any,
    ) -> VideoInputs:
        """Prepares one or more videos for the model.

        Rescaled frames are float32. Normalized frames are float32 as well, unless they were floats and not rescaled.
        Other frames keep their dtype, except that resized ones are uint8, or float32 if they were floats in [0, 1].

        Args:
            videos: a frame, or a video (a list of frames or an array (T, ...)), or several videos (a list of videos or
                an array (B, T, ...)). A frame is a PIL image, or a NumPy array or tensor (H, W, C) or (C, H, W). To be
                resized, it must hold integers in [0, 255] or floats in [0, 1].
            return_tensors: "pt" or "np" returns a tensor or array (B, T, C, h, w). None returns a list of arrays
                (C, h, w) per video.
            data_format: position of the channels in the result, "channels_first" or "channels_last". None: as in the
                frames.
            input_data_format: position of the channels in the frames. None: inferred from the axis that has a length of
                1 or 3; the first one if both have.
            **overrides: parameters of the constructor for this call. None is ignored.

        Returns:
            The processed frames as `pixel_values`.

        Raises:
            ConfigError: A parameter is invalid.
            TypeError: A parameter is unknown.
            ValueError: `videos` are not videos, their values are out of range, or they do not form one tensor.
        """
        import torch

        check_choice("return_tensors", return_tensors, ("pt", "np", None))
        check_choice("data_format", data_format, (CHANNELS_FIRST, CHANNELS_LAST, None))
        check_choice("input_data_format", input_data_format, (CHANNELS_FIRST, CHANNELS_LAST, None))
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

    def _preprocess_frame(
        self, frame: Frame, *, data_format: str | None, input_data_format: str | None
    ) -> NDArray[Any]:
        image, found_format = _to_channels_last(frame, input_data_format)  # (H, W, C)
        if self.do_rescale and image.dtype != np.uint8 and image.min() >= 0 and image.max() <= 1:
            warnings.warn(
                "rescaling a frame whose values are all in [0, 1]: if it is rescaled already, pass do_rescale=False",
                stacklevel=2,
            )
        image = self.resize_crop.resize_and_crop_frame(image)  # (h, w, C)
        # The arithmetic is several times faster on one plane per channel.
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
        """The geometric part of the processing."""
        # __post_init__ made mappings of both.
        size, crop_size = cast("Mapping[str, int]", self.size), cast("Mapping[str, int]", self.crop_size)
        resize_to = size.get("shortest_edge") or (size["height"], size["width"])
        return ResizeCrop(
            resize_to=resize_to if self.do_resize else None,
            resample=self.resample,
            crop_to=(crop_size["height"], crop_size["width"]) if self.do_center_crop else None,
            antialias=self.antialias,
        )

    def resize_and_crop(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Runs the 8-bit part of `preprocess`. The rest can run on the model's device, see `scale_and_bias`.

        Args:
            frames: uint8 (T, H, W, 3).

        Returns:
            uint8 (T, 3, h, w), contiguous.

        Raises:
            TypeError: `frames` is not such an array.
        """
        import torch

        return self.resize_crop.resize_and_crop(frames, threads=torch.get_num_threads())

    def scale_and_bias(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Returns (scale, bias), float32 (3,) each: `pixel * scale + bias` rescales, offsets and normalizes."""
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
    def from_dict(cls, values: Mapping[str, Any]) -> VivitImageProcessor:
        """Creates a processor from the content of a preprocessor_config.json.

        Unknown keys are ignored; null means the default.

        Raises:
            ConfigError: A value is invalid, or the file belongs to another model's processor. Such processors have no
                `offset`, so the same parameters would produce different pixels.
        """
        type_key = next((key for key in TYPE_KEYS if values.get(key)), None)
        if type_key and not str(values[type_key]).startswith("Vivit"):
            raise broken_rule(type_key, values[type_key], "a ViViT processor, e.g. VivitImageProcessor")
        known = {parameter.name for parameter in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known and value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of a preprocessor_config.json, readable by `from_dict` and transformers."""
        values = {parameter.name: getattr(self, parameter.name) for parameter in fields(self)}
        if self.antialias:
            del values["antialias"]
        for name, value in values.items():
            if isinstance(value, Mapping):
                values[name] = dict(value)
            elif isinstance(value, tuple):
                values[name] = list(value)
        return {"image_processor_type": "VivitImageProcessor", **values, "resample": int(self.resample)}

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> VivitImageProcessor:
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

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes preprocessor_config.json to `directory`, which is created if missing."""
        write_json(Path(directory, PROCESSOR_FILES[0]), self.to_dict())


# Parameters


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _resolve_number(name: str, value: Any) -> float:
    if not _is_number(value):
        raise broken_rule(name, value, "a finite number")
    return float(value)


def _resolve_numbers(name: str, value: Any) -> float | tuple[float, ...]:
    if isinstance(value, (list, tuple, np.ndarray)) and len(value) > 0 and all(map(_is_number, value)):
        return tuple(map(float, value))
    if not _is_number(value):
        raise broken_rule(name, value, "a finite number, or one per channel")
    return float(value)


def _resolve_resample(value: Any) -> Image.Resampling:
    try:
        return Image.Resampling(value)
    except ValueError as error:
        filters = ", ".join(f"{known.value} ({known.name})" for known in sorted(Image.Resampling))
        raise broken_rule("resample", value, f"one of {filters}") from error


def _resolve_size(name: str, value: Any, *, is_crop: bool) -> Mapping[str, int]:
    """Returns a size in any accepted notation as a mapping."""
    size = value
    if isinstance(value, Integral):
        size = {"height": value, "width": value} if is_crop else {"shortest_edge": value}
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        size = {"height": value[0], "width": value[1]}
    accepted_keys = [{"height", "width"}]
    if not is_crop:
        accepted_keys += [{"shortest_edge"}, {"shortest_edge", "longest_edge"}]
    if not isinstance(size, Mapping) or set(size) not in accepted_keys:
        rule = "height and width, or n for a square" if is_crop else "a shortest_edge, or height and width"
        raise broken_rule(name, value, rule)
    for length in size.values():
        if not isinstance(length, Integral) or isinstance(length, bool) or length < 1:
            raise broken_rule(name, value, "a whole number of pixels, >= 1")
    return MappingProxyType({key: int(length) for key, length in size.items()})


def _channel_values(name: str, values: float | Sequence[float], channels: int) -> NDArray[np.float64]:
    """Returns one value per channel, (C,)."""
    if isinstance(values, Sequence) and len(values) != channels:
        raise broken_rule(name, values, f"one number, or one per channel of the frames ({channels})")
    return np.broadcast_to(np.array(values, dtype=np.float64), channels)


# Inputs and outputs


def _split_videos(videos: Any) -> list[list[Frame]]:
    """Returns the frames of each video."""
    if _is_frame(videos):
        return [[videos]]
    items = _items(videos)
    if all(map(_is_frame, items)):
        return [items]
    split = [_items(video) for video in items]
    for frame in (frame for frames in split for frame in frames):
        if not _is_frame(frame):
            raise ValueError(f"expected frames that are PIL images, (H, W, C) or (C, H, W), got {_describe(frame)}")
    return split


def _is_frame(value: Any) -> TypeGuard[Frame]:
    return isinstance(value, Image.Image) or (_is_array(value) and value.ndim == 3)


def _is_array(value: Any) -> TypeGuard[NDArray[Any] | torch.Tensor]:
    return isinstance(value, np.ndarray) or _is_tensor(value)


def _is_tensor(value: Any) -> TypeIs[torch.Tensor]:
    torch = sys.modules.get("torch")  # there are no tensors before it is imported
    return torch is not None and isinstance(value, torch.Tensor)


def _items(value: Any) -> list[Any]:
    is_list = isinstance(value, (list, tuple)) or (_is_array(value) and value.ndim > 3)
    if not is_list or len(value) == 0:
        raise ValueError(
            "expected a frame, a list of frames, an array (T, H, W, C) or (T, C, H, W), or a list of such videos, none "
            f"of them empty; got {_describe(value)}"
        )
    return list(value)


def _describe(value: Any) -> str:
    if _is_array(value):
        return f"{value.dtype} {tuple(value.shape)}"
    return "an empty list" if isinstance(value, (list, tuple)) and not value else type(value).__name__


def _to_channels_last(frame: Frame, input_data_format: str | None) -> tuple[NDArray[Any], str]:
    """Returns a frame as an array (H, W, C), and the position that its channels had."""
    if isinstance(frame, Image.Image):
        if input_data_format is None:
            input_data_format = CHANNELS_LAST
            frame = frame if frame.mode == "RGB" else frame.convert("RGB")
        image = np.asarray(frame)
    elif _is_tensor(frame):
        image = frame.detach().cpu().numpy()
    else:
        image = frame
    if image.ndim != 3 or 0 in image.shape or image.dtype.kind not in "buif":
        raise ValueError(f"a frame must hold numbers, (H, W, C) or (C, H, W), got {_describe(image)}")
    if input_data_format is None:
        if image.shape[0] not in (1, 3) and image.shape[2] not in (1, 3):
            raise ValueError(
                f"without input_data_format a frame must have 1 or 3 channels, first or last, got {_describe(image)}"
            )
        input_data_format = CHANNELS_FIRST if image.shape[0] in (1, 3) else CHANNELS_LAST
    if input_data_format == CHANNELS_FIRST:
        image = image.transpose(1, 2, 0)  # (H, W, C)
    return image, input_data_format


def _stack(videos: list[list[NDArray[Any]]]) -> NDArray[Any]:
    """Stacks videos of frames (C, h, w) to (B, T, C, h, w)."""
    frame_counts = sorted({len(frames) for frames in videos})
    shapes = sorted({frame.shape for frames in videos for frame in frames})
    if len(frame_counts) > 1 or len(shapes) > 1:
        raise ValueError(
            "return_tensors requires videos with the same number of frames of the same shape, got "
            f"{frame_counts} frames of shapes {shapes}; omit return_tensors or crop the frames"
        )
    return np.array(videos)  # (B, T, C, h, w)


def _normalize(image: NDArray[Any], mean: float | Sequence[float], std: float | Sequence[float]) -> NDArray[Any]:
    """Normalizes an image (C, h, w) in its own dtype if that is floating-point, otherwise in float32."""
    if image.dtype.kind != "f":
        image = image.astype(np.float32)
    means = _channel_values("image_mean", mean, len(image)).astype(image.dtype)
    stds = _channel_values("image_std", std, len(image)).astype(image.dtype)
    normalized: NDArray[Any] = (image - means[:, None, None]) / stds[:, None, None]
    return normalized
