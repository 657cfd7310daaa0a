"""The 8-bit half of image processing: resize and centre crop, to the bit as `transformers` does it.

    resize_crop = ResizeCrop(resize_to=256, resample=2, crop_to=(224, 224))
    pixels = resize_crop.resize_and_crop(frames)  # uint8 (T, H, W, 3) -> uint8 (T, 3, 224, 224)

No torch, which takes a process long to load and much memory, except to resize the fast way.

Letters in shapes: T frames, C channels; H and W are height and width of a frame as it comes in, h and w as it comes
out. Sizes are pairs (height, width) in pixels.
"""

import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class ResizeCrop:
    """What becomes of a frame's rows and columns.

    resize_to  the length of the shorter side, which keeps the aspect ratio; or a size, which does not; None: as it is
    resample   Pillow's filter: a PIL.Image.Resampling or its number
    crop_to    the size to cut out of the middle, where a smaller frame is padded with zeros; None: all of it
    is_fast    torch resizes frames of bytes that shrink to half or less, with weights of 16 bits where Pillow's have
               22: one or two values in a thousand differ by 1. Only where the filter is BILINEAR, as published
    """

    resize_to: int | tuple[int, int] | None
    resample: int
    crop_to: tuple[int, int] | None
    is_fast: bool = False

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of what becomes of a frame of `height` x `width` pixels."""
        return self.crop_to or self.resized_size(height, width)

    def resize_and_crop(self, frames: np.ndarray, *, threads: int = 1) -> np.ndarray:
        """uint8 (T, H, W, 3) -> uint8 (T, 3, h, w), contiguous. Raises TypeError for other frames."""
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.shape[3:] != (3,):
            got = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
            raise TypeError(f"frames must be a uint8 array (T, H, W, 3), got {got}")
        height, width = self.output_size(*frames.shape[1:3])
        pixels = np.empty((len(frames), 3, height, width), dtype=np.uint8)

        def fill(index: int) -> None:
            pixels[index] = self.resize_and_crop_frame(frames[index]).transpose(2, 0, 1)  # (3, h, w)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(len(frames))))  # a list, since only that raises what went wrong
        return pixels

    def resize_and_crop_frame(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) -> (h, w, C).

        To be resized, an image has whole numbers 0 .. 255, which become uint8, or floats 0 .. 1, which are resized in
        8 bits too and become float32 0 .. 1. Raises ValueError for others.
        """
        height, width = self.resized_size(*image.shape[:2])
        rows, columns = range(height), range(width)
        if self.crop_to:
            rows, columns = _middle(height, self.crop_to[0]), _middle(width, self.crop_to[1])
        if self.resize_to and self.is_fast and _can_torch(image, (height, width), self.resample):
            image = _cut(_resize_with_torch(image, (height, width)), rows, columns)
        elif self.resize_to:
            image = _resize(image, (height, width), Image.Resampling(self.resample), rows, columns)
        else:
            image = _cut(image, rows, columns)
        return _pad(image, self.crop_to) if self.crop_to else image

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of a frame of `height` x `width` pixels before it is cropped."""
        if self.resize_to is None:
            return height, width
        if isinstance(self.resize_to, tuple):
            return self.resize_to
        short = self.resize_to
        if width <= height:
            return int(short * height / width), short
        return short, int(short * width / height)


def rescale(image: np.ndarray, factor: float) -> np.ndarray:
    # In float64, as transformers does it: float32 would differ in the last bit.
    return (image.astype(np.float64) * factor).astype(np.float32)


def _cut(image: np.ndarray, rows: range, columns: range) -> np.ndarray:
    return image[rows.start : rows.stop, columns.start : columns.stop]


def _middle(length: int, wanted: int) -> range:
    """The middle `wanted` of `length` pixels, or all if there are fewer. An odd one is cut off at the end."""
    start = (length - wanted) // 2
    return range(max(start, 0), min(start + wanted, length))


def _pad(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w, C) -> (*size, C), zeros around what is smaller. An odd row or column of them comes first."""
    height, width, channels = image.shape
    if (height, width) == size:
        return image
    top, left = -((height - size[0]) // 2), -((width - size[1]) // 2)
    padded = np.zeros((*size, channels), dtype=image.dtype)
    padded[top : top + height, left : left + width] = image
    return padded


def _resize(
    image: np.ndarray, size: tuple[int, int], resample: Image.Resampling, rows: range, columns: range
) -> np.ndarray:
    """These rows and columns of the image (H, W, C) resized to `size`; Pillow does it, in 8 bits.

    Whole numbers 0 .. 255 become uint8; floats 0 .. 1, multiplied by 255 for it, become float32 0 .. 1.
    """
    image, is_unit = _to_8_bit(image)
    height, width, channels = image.shape
    plan = _plan((height, width), size, resample, rows, columns) if channels == 3 else None
    if plan:
        resized = _resize_part(image, plan, resample)
    else:
        resized = _cut(_resize_whole(image, size, resample), rows, columns)
    return rescale(resized, 1 / 255) if is_unit else resized


def _to_8_bit(image: np.ndarray) -> tuple[np.ndarray, bool]:
    """The image as uint8, and whether it was multiplied by 255."""
    if image.dtype == np.uint8:
        return image, False
    low, high = image.min(), image.max()
    if low >= 0 and high <= 255:
        if np.allclose(image, image.astype(np.int64)):
            return image.astype(np.uint8), False
        if high <= 1:
            return rescale(image, 255).astype(np.uint8), True
    raise ValueError(
        f"a frame to be resized must have whole numbers 0 .. 255 or floats 0 .. 1, got {image.dtype} {low} .. {high}"
    )


def _resize_whole(image: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """uint8 (H, W, C) -> uint8 (*size, C)."""
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    return np.asarray(picture.resize((size[1], size[0]), resample)).reshape(*size, -1)


# Resizing the fast way


def _can_torch(image: np.ndarray, size: tuple[int, int], resample: int) -> bool:
    # Of a frame that hardly shrinks, up to 2 % of the values would differ, and nothing be won.
    halves = all(length >= 2 * wanted for length, wanted in zip(image.shape, size))
    return image.dtype == np.uint8 and halves and resample == Image.Resampling.BILINEAR


def _resize_with_torch(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, C) -> uint8 (*size, C)."""
    torch, is_down_first = _torch(), _is_down_first(image.shape[:2], size)
    if is_down_first:  # torch always goes across first
        image, size = image.transpose(1, 0, 2), size[::-1]
    if min(image.strides) < 0:  # turned upright by reading it backwards, which torch cannot do
        image = image.copy()
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, C, H, W)
    pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    return pixels[0].permute((2, 1, 0) if is_down_first else (1, 2, 0)).numpy()


@lru_cache(maxsize=1024)
def _is_down_first(source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether Pillow resizes such pictures down before across, which depends on the sizes and on its version."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, source, dtype=np.uint8))
    (height, width), down = target, (source[1], target[0])
    whole = picture.resize((width, height), Image.Resampling.BILINEAR)
    return picture.resize(down, Image.Resampling.BILINEAR).resize((width, height), Image.Resampling.BILINEAR) == whole


@lru_cache(maxsize=1)
def _torch() -> ModuleType:
    import torch  # here, see the top of this file

    # What a decoder hands out is read-only, of which torch warns; it is only read here.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    return torch


# Resizing no more than the centre crop keeps, to the same bits
#
# Pillow resizes in two passes, across and down; a pass weighs source pixels by where a target pixel falls
# among them. It can resize a box of the source, and weighs the pixels there as it would in the whole if the
# box begins and ends where float32 is exact, which is so every `step` target pixels:
#
#     source  |.....|.....|.....|.....|.....|.....|
#                 (-------- read -------)           `read`  the box, and as far as the filter reaches beyond
#                   |------ box ------|             `box`   what falls under `made`
#     target  |---|---|---|---|---|---|---|                 a mark every `step` pixels
#                   |--- made ----|                 `made`  whole steps
#                     [- kept -]                    `kept`  what the crop wants
#
# Which pass comes first changes the rounding in between, and depends on the sizes and on Pillow's version. So
# `_plan` tries both on noise, once for every pair of sizes; if in doubt, the whole frame is resized.

# How many source pixels either side of its centre a filter weighs, unless it scales down. NEAREST and BOX
# have edges, which rounding can move to another pixel: with them, and rarer filters, the whole is resized.
FILTER_REACH = {Image.Resampling.BILINEAR: 1, Image.Resampling.BICUBIC: 2, Image.Resampling.LANCZOS: 3}
# A float32 has 24 bits: whole pixels up to 65,535 leave 8 for the fraction.
BOX_FRACTION = 256


class _Axis(NamedTuple):
    read: slice  # of the source
    box: tuple[float, float]  # start and stop, from the first pixel read
    made: int  # target pixels
    kept: tuple[int, int]  # start and stop, from the first pixel made


class _Plan(NamedTuple):
    rows: _Axis
    columns: _Axis
    is_down_first: bool


@lru_cache(maxsize=1024)
def _plan(
    source: tuple[int, int],
    target: tuple[int, int],
    resample: Image.Resampling,
    rows: range,
    columns: range,
) -> _Plan | None:
    """How to resize a part from which these rows and columns can be cut; None: resize the whole frame."""
    if resample not in FILTER_REACH or (len(rows), len(columns)) == target:
        return None
    row_axis = _axis(source[0], target[0], rows, FILTER_REACH[resample])
    column_axis = _axis(source[1], target[1], columns, FILTER_REACH[resample])
    noise = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
    expected = _cut(_resize_whole(noise, target, resample), rows, columns)
    plans = [_Plan(row_axis, column_axis, is_down_first) for is_down_first in (False, True)]
    exact = [plan for plan in plans if np.array_equal(_resize_part(noise, plan, resample), expected)]
    # Both are exact where noise cannot tell one order from the other.
    return exact[0] if len(exact) == 1 else None


def _axis(source: int, target: int, kept: range, reach: int) -> _Axis:
    step = target // math.gcd(source * BOX_FRACTION, target)
    first, last = kept.start // step * step, -(-kept.stop // step) * step  # target pixels
    start, stop = first * source / target, last * source / target  # source pixels
    margin = math.ceil(reach * max(1, source / target)) + 1
    read = slice(max(0, math.floor(start) - margin), min(source, math.ceil(stop) + margin))
    return _Axis(
        read=read,
        box=(start - read.start, stop - read.start),
        made=last - first,
        kept=(kept.start - first, kept.stop - first),
    )


def _resize_part(image: np.ndarray, plan: _Plan, resample: Image.Resampling) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (rows kept, columns kept, 3)."""
    picture = Image.fromarray(image[plan.rows.read, plan.columns.read])
    if plan.is_down_first:
        picture = _resize_across(_resize_down(picture, plan.rows, resample), plan.columns, resample)
    else:
        picture = _resize_down(_resize_across(picture, plan.columns, resample), plan.rows, resample)
    return np.asarray(picture)


def _resize_across(picture: Image.Image, axis: _Axis, resample: Image.Resampling) -> Image.Image:
    box = (axis.box[0], 0, axis.box[1], picture.height)
    made = picture.resize((axis.made, picture.height), resample, box=box)
    return made.crop((axis.kept[0], 0, axis.kept[1], picture.height))


def _resize_down(picture: Image.Image, axis: _Axis, resample: Image.Resampling) -> Image.Image:
    box = (0, axis.box[0], picture.width, axis.box[1])
    made = picture.resize((picture.width, axis.made), resample, box=box)
    return made.crop((0, axis.kept[0], picture.width, axis.kept[1]))
