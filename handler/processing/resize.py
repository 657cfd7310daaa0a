"""Resizing and center cropping of 8-bit frames, bit-exact with transformers.

    resize_crop = ResizeCrop(resize_to=256, resample=Image.Resampling.BILINEAR, crop_to=(224, 224))
    pixels = resize_crop.resize_and_crop(frames)  # uint8 (T, H, W, 3) -> uint8 (T, 3, 224, 224)

Decoder processes import this module. It loads torch, which is slow and needs much memory, only if `is_fast` is set.

Shapes: T frames, C channels, (H, W) size of an input frame, (h, w) size of an output frame. Sizes are pairs
(height, width) in pixels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Size = tuple[int, int]


class Crop(NamedTuple):
    """A part of a resized frame, in pixels. If the frame is smaller, it is padded, and `top` or `left` is negative."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class ResizeCrop:
    """Resizes frames and crops a part of them, their center by default.

    Attributes:
        resize_to: length of the shorter side, which keeps the aspect ratio, or (height, width). None: no resizing.
        resample: Pillow's filter, a PIL.Image.Resampling or its number.
        crop_to: (height, width) of the center crop. Smaller frames are padded with zeros. None: no cropping.
        antialias: whether the filter widens where a frame shrinks, so that all pixels count. False: each pixel is
            interpolated between the four nearest ones and rounded down, like `tf.image.resize` and a cast to 8 bits.
            `resample` and `is_fast` then have no effect.
        is_fast: use torch for 8-bit frames that shrink to half their size or less, if the filter is BILINEAR. It is
            faster because its weights have 16 bits instead of Pillow's 22; one or two values in a thousand differ by 1.
        zoom: factor of the size before cropping, larger if that would not cover the crop. Training varies it.
        crop_at: (vertical, horizontal) position of the crop, from 0 (top, left) to 1. Training varies it.
    """

    resize_to: int | Size | None
    resample: int
    crop_to: Size | None
    antialias: bool = True
    is_fast: bool = False
    zoom: float = 1.0
    crop_at: tuple[float, float] = (0.5, 0.5)

    def output_size(self, height: int, width: int) -> Size:
        """Returns the (h, w) of a processed `height` x `width` frame."""
        return self.crop_to or self.resized_size(height, width)

    def resized_size(self, height: int, width: int) -> Size:
        """Returns the size of a `height` x `width` frame after resizing, before cropping."""
        resized = self._unzoomed_size(height, width)
        if self.zoom == 1:
            return resized
        zoom = self.zoom
        if self.crop_to:
            zoom = max(zoom, *(crop / length for crop, length in zip(self.crop_to, resized)))
        return round(zoom * resized[0]), round(zoom * resized[1])

    def _unzoomed_size(self, height: int, width: int) -> Size:
        if self.resize_to is None:
            return height, width
        if isinstance(self.resize_to, tuple):
            return self.resize_to
        edge = self.resize_to
        if width <= height:
            return int(edge * height / width), edge
        return edge, int(edge * width / height)

    def crops(self, height: int, width: int, *, count: int = 1) -> list[Crop]:
        """Returns the crops of a `height` x `width` frame.

        A single one is at `crop_at`. Several are at equal distances along the longer side, along the width of a square,
        from the start to the end of the frame: three are left, center and right, or top, center and bottom. As in the
        original code, they and the position on the shorter side are rounded up. Without a margin or without cropping,
        all are the same.

        Args:
            height, width: of the frame before resizing.
            count: number of crops.
        """
        resized = self.resized_size(height, width)
        size = self.crop_to or resized
        if count == 1:
            top, left = map(_crop_start, resized, size, self.crop_at)
            return [Crop(top, left, *size)]
        margins = [length - crop for length, crop in zip(resized, size)]
        longer = 0 if resized[0] > resized[1] else 1
        starts = [-(-margin // 2) if margin > 0 else margin // 2 for margin in margins]
        crops = []
        for number in range(count):
            if margins[longer] > 0:
                starts[longer] = -(-number * margins[longer] // (count - 1))
            crops.append(Crop(starts[0], starts[1], *size))
        return crops

    def region(self, height: int, width: int, crop: Crop) -> tuple[float, float, float, float]:
        """Returns (left, top, width, height) of the part of a frame that a crop shows, in pixels of the frame.

        It is larger than the frame where the crop is padded.
        """
        resized = self.resized_size(height, width)
        vertical, horizontal = height / resized[0], width / resized[1]
        return crop.left * horizontal, crop.top * vertical, crop.width * horizontal, crop.height * vertical

    def resize_and_crop(self, frames: NDArray[np.uint8], *, threads: int = 1) -> NDArray[np.uint8]:
        """Processes frames, concurrently if `threads` > 1.

        Args:
            frames: uint8 (T, H, W, 3).
            threads: number of threads.

        Returns:
            uint8 (T, 3, h, w), contiguous.

        Raises:
            TypeError: `frames` is not such an array.
        """
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.shape[3:] != (3,):
            got = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
            raise TypeError(f"frames must be a uint8 array (T, H, W, 3), got {got}")
        height, width = self.output_size(*frames.shape[1:3])
        pixels = np.empty((len(frames), 3, height, width), dtype=np.uint8)

        def process(index: int) -> None:
            pixels[index] = self.resize_and_crop_frame(frames[index]).transpose(2, 0, 1)  # (3, h, w)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(process, range(len(frames))))  # reading the results raises the errors of the threads
        return pixels

    def resize_and_crop_frame(self, image: NDArray[Any], crop: Crop | None = None) -> NDArray[Any]:
        """Processes one frame.

        Args:
            image: (H, W, C) of any dtype. To be resized, it must hold integers in [0, 255] or floats in [0, 1].
            crop: the part of the resized frame. By default the only one of `crops`.

        Returns:
            (h, w, C). A resized frame is uint8, or float32 in [0, 1] if it was floats. Both are resized in 8 bits.

        Raises:
            ValueError: The values of a frame to be resized are out of range.
        """
        height, width = self.resized_size(*image.shape[:2])
        crop = crop or self.crops(*image.shape[:2])[0]
        rows = range(max(crop.top, 0), min(crop.top + crop.height, height))
        columns = range(max(crop.left, 0), min(crop.left + crop.width, width))
        is_resized = self.resize_to is not None or self.zoom != 1
        if is_resized and not self.antialias:
            image = _interpolate(image, (height, width), rows, columns)
        elif is_resized and self.is_fast and _suits_torch(image, (height, width), self.resample):
            image = _slice(_resize_with_torch(image, (height, width)), rows, columns)
        elif is_resized:
            image = _resize(image, (height, width), Image.Resampling(self.resample), rows, columns)
        else:
            image = _slice(image, rows, columns)
        return _pad(image, (crop.height, crop.width))


def rescale(image: NDArray[Any], factor: float) -> NDArray[np.float32]:
    """Returns `image` times `factor`, computed in float64 as in transformers: float32 would differ in the last bit."""
    return (image.astype(np.float64) * factor).astype(np.float32)


def _slice(image: NDArray[Any], rows: range, columns: range) -> NDArray[Any]:
    return image[rows.start : rows.stop, columns.start : columns.stop]


def _crop_start(length: int, crop: int, position: float) -> int:
    """Returns where `crop` of `length` pixels start at a position from 0 to 1; below 0 if the crop is padded."""
    margin = length - crop
    return int(margin * position) if margin >= 0 else margin // 2


def _pad(image: NDArray[Any], size: Size) -> NDArray[Any]:
    """Pads an image (h, w, C) with zeros on all sides to (*size, C)."""
    height, width, channels = image.shape
    if (height, width) == size:
        return image
    # As in transformers, the top and the left get the larger half of an odd number.
    top, left = -((height - size[0]) // 2), -((width - size[1]) // 2)
    padded = np.zeros((*size, channels), dtype=image.dtype)
    padded[top : top + height, left : left + width] = image
    return padded


def _resize(
    image: NDArray[Any], size: Size, resample: Image.Resampling, rows: range, columns: range
) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Returns `rows` and `columns` of the image (H, W, C) resized to `size`; see `resize_and_crop_frame` for dtypes."""
    image, is_unit_range = _to_uint8(image)
    height, width, channels = image.shape
    plan = _plan_part((height, width), size, resample, rows, columns) if channels == 3 else None
    if plan is None:
        resized = _slice(_resize_whole(image, size, resample), rows, columns)
    else:
        resized = _resize_part(image, plan, resample)
    return rescale(resized, 1 / 255) if is_unit_range else resized


def _to_uint8(image: NDArray[Any]) -> tuple[NDArray[np.uint8], bool]:
    """Returns the image as uint8, and whether its range was [0, 1]."""
    if image.dtype == np.uint8:
        return image, False
    low, high = image.min(), image.max()
    if low >= 0 and high <= 255:
        if np.allclose(image, image.astype(np.int64)):
            return image.astype(np.uint8), False
        if high <= 1:
            return rescale(image, 255).astype(np.uint8), True
    raise ValueError(
        "a frame to be resized must hold integers in [0, 255] or floats in [0, 1], "
        f"got {image.dtype} in [{low}, {high}]"
    )


def _resize_whole(image: NDArray[np.uint8], size: Size, resample: Image.Resampling) -> NDArray[np.uint8]:
    """Resizes an image (H, W, C) to (*size, C)."""
    source = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    return np.asarray(source.resize((size[1], size[0]), resample)).reshape(*size, -1)


# Interpolation without antialiasing


def _interpolate(
    image: NDArray[Any], size: Size, rows: range, columns: range
) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Returns the same part as `_resize`, but see `ResizeCrop.antialias`. In float32, like TensorFlow."""
    image, is_unit_range = _to_uint8(image)
    upper, lower, down = _neighbors(image.shape[0], size[0], rows)
    left, right, across = _neighbors(image.shape[1], size[1], columns)

    def interpolate_rows(indices: NDArray[np.intp]) -> NDArray[np.float32]:
        pixels = image.take(indices, axis=0)  # (h, W, C)
        first, second = pixels.take(left, axis=1).astype(np.float32), pixels.take(right, axis=1)
        return first + (second - first) * across[:, None]  # (h, w, C)

    first, second = interpolate_rows(upper), interpolate_rows(lower)
    resized = (first + (second - first) * down[:, None, None]).astype(np.uint8)
    return rescale(resized, 1 / 255) if is_unit_range else resized


def _neighbors(source: int, target: int, part: range) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Returns the source pixels before and after the center of each target pixel in `part`, and the second's weight."""
    half = np.float32(0.5)
    centers = (np.arange(part.start, part.stop, dtype=np.float32) + half) * np.float32(source / target) - half
    before = np.floor(centers)
    index = before.astype(np.intp)
    return index.clip(0), (index + 1).clip(max=source - 1), centers - before


# The order of Pillow's passes
#
# Pillow resizes in two passes, horizontal and vertical. The first is rounded to 8 bits, so that their order affects
# the result. It depends on the sizes and on Pillow's version.


def _is_vertical_first(source: Size, target: Size) -> bool | None:
    """Returns whether Pillow runs the vertical pass first. None: unknown, because its version is."""
    rule = _find_pass_order_rule()
    return None if rule is None else rule(source, target)


def _is_vertical_first_before_13(source: Size, target: Size) -> bool:
    return False


def _is_vertical_first_since_13(source: Size, target: Size) -> bool:
    return source[0] - target[0] > max(0, 2 * (source[1] - target[1]))


# Pairs of source and target sizes that tell the rules above from each other, and from similar ones.
PASS_ORDER_PROBES: tuple[tuple[Size, Size], ...] = (
    ((64, 64), (16, 40)),
    ((64, 64), (15, 40)),
    ((60, 12), (30, 11)),
    ((32, 60), (16, 52)),
    ((30, 20), (28, 40)),
    ((20, 30), (28, 10)),
)


@lru_cache(maxsize=1)
def _find_pass_order_rule() -> Callable[[Size, Size], bool] | None:
    """Returns the rule by which the installed Pillow orders its passes."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    observed = []
    for (height, width), target in PASS_ORDER_PROBES:
        image = noise[:height, :width, None]
        vertical = _resize_whole(image, (target[0], width), Image.Resampling.BILINEAR)
        vertical_first = _resize_whole(vertical, target, Image.Resampling.BILINEAR)
        observed.append(np.array_equal(vertical_first, _resize_whole(image, target, Image.Resampling.BILINEAR)))
    for rule in (_is_vertical_first_since_13, _is_vertical_first_before_13):
        if observed == [rule(*sizes) for sizes in PASS_ORDER_PROBES]:
            return rule
    return None


# Resizing only what the crop keeps, with the same result
#
# A pass computes each target pixel as a weighted sum of the source pixels around it. Pillow can resize a box of the
# source. The weights are the same as for the whole frame if the edges of the box are exact in float32, which is true
# every `step` target pixels:
#
#     source  |.....|.....|.....|.....|.....|.....|
#                 (------- source -------)          the box, and the pixels beyond it that the filter reaches
#                   |------ box ------|             the source of the resized pixels
#     target  |---|---|---|---|---|---|---|         a mark every `step` pixels
#                   |-- resized --|                 the steps that contain the crop
#                     [-- crop -]

# Radius of the filters in source pixels, unless they downscale. NEAREST and BOX are missing because they are not
# continuous: rounding could move a pixel into or out of the filter.
FILTER_REACH = {Image.Resampling.BILINEAR: 1, Image.Resampling.BICUBIC: 2, Image.Resampling.LANCZOS: 3}
# The 24 bits of a float32 hold positions up to 65,535 in steps of 1/256 pixel.
BOX_FRACTION = 256


class _Axis(NamedTuple):
    source: slice  # pixels to read
    box: tuple[float, float]  # start and stop, relative to the start of `source`
    resized: int  # target pixels
    crop: range  # relative to the first resized pixel


class _Plan(NamedTuple):
    vertical: _Axis
    horizontal: _Axis
    is_vertical_first: bool


def _plan_part(source: Size, target: Size, resample: Image.Resampling, rows: range, columns: range) -> _Plan | None:
    """Plans how to resize a frame to `target` where only `rows` and `columns` are needed.

    Returns:
        The plan, or None if resizing the whole frame is not slower, or the result might differ.
    """
    if resample not in FILTER_REACH or source == target or (len(rows), len(columns)) == target:
        return None
    is_vertical_first = _is_vertical_first(source, target)
    if is_vertical_first is None:
        return None
    vertical = _plan_axis(source[0], target[0], rows, FILTER_REACH[resample])
    horizontal = _plan_axis(source[1], target[1], columns, FILTER_REACH[resample])
    reads_all = (
        vertical.source.stop - vertical.source.start,
        horizontal.source.stop - horizontal.source.start,
    ) == source
    crops_between_passes = len(rows) < target[0] if is_vertical_first else len(columns) < target[1]
    if reads_all and not crops_between_passes:
        return None
    return _Plan(vertical, horizontal, is_vertical_first)


def _plan_axis(source: int, target: int, crop: range, reach: int) -> _Axis:
    """Plans how to resize one axis from `source` to `target` pixels where only `crop` are needed."""
    step = target // math.gcd(source * BOX_FRACTION, target)
    first, last = crop.start // step * step, -(-crop.stop // step) * step
    start, stop = first * source / target, last * source / target
    margin = math.ceil(reach * max(1, source / target)) + 1
    read = slice(max(0, math.floor(start) - margin), min(source, math.ceil(stop) + margin))
    return _Axis(
        source=read,
        box=(start - read.start, stop - read.start),
        resized=last - first,
        crop=range(crop.start - first, crop.stop - first),
    )


def _resize_part(image: NDArray[np.uint8], plan: _Plan, resample: Image.Resampling) -> NDArray[np.uint8]:
    """Resizes an image (H, W, 3) and returns the planned rows and columns."""
    part = Image.fromarray(image[plan.vertical.source, plan.horizontal.source])
    if plan.is_vertical_first:
        part = _resize_horizontally(_resize_vertically(part, plan.vertical, resample), plan.horizontal, resample)
    else:
        part = _resize_vertically(_resize_horizontally(part, plan.horizontal, resample), plan.vertical, resample)
    return np.asarray(part)


def _resize_horizontally(image: Image.Image, axis: _Axis, resample: Image.Resampling) -> Image.Image:
    box = (axis.box[0], 0, axis.box[1], image.height)
    resized = image.resize((axis.resized, image.height), resample, box=box)
    return resized.crop((axis.crop.start, 0, axis.crop.stop, image.height))


def _resize_vertically(image: Image.Image, axis: _Axis, resample: Image.Resampling) -> Image.Image:
    box = (0, axis.box[0], image.width, axis.box[1])
    resized = image.resize((image.width, axis.resized), resample, box=box)
    return resized.crop((0, axis.crop.start, image.width, axis.crop.stop))


# Resizing with torch


def _suits_torch(image: NDArray[Any], size: Size, resample: int) -> bool:
    # For a frame that shrinks less, up to 2 % of the values would differ, and it would not be faster.
    is_halved = all(length >= 2 * resized for length, resized in zip(image.shape, size))
    return image.dtype == np.uint8 and is_halved and resample == Image.Resampling.BILINEAR


def _resize_with_torch(image: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Resizes an image (H, W, C) to (*size, C)."""
    torch, is_vertical_first = _import_torch(), _is_vertical_first(image.shape[:2], size)
    if is_vertical_first:  # torch always runs the horizontal pass first
        image, size = image.transpose(1, 0, 2), size[::-1]
    if min(image.strides) < 0:  # a rotated frame; torch does not support negative strides
        image = image.copy()
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, C, H, W)
    pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    resized: NDArray[np.uint8] = pixels[0].permute((2, 1, 0) if is_vertical_first else (1, 2, 0)).numpy()
    return resized


@lru_cache(maxsize=1)
def _import_torch() -> ModuleType:
    import torch

    # Decoded frames are read-only, and so is their use here.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    return torch
