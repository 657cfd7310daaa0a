"""VivitImageProcessor and ResizeCrop, with transformers and whole-frame resizing by Pillow as oracles."""

import copy
import dataclasses
import json
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from handler import VivitImageProcessor
from handler.checkpoints.hub import CheckpointFileError, CheckpointNotFoundError
from handler.processing import resize
from handler.processing.resize import ResizeCrop
from handler.validation import ConfigError

Published = transformers.VivitImageProcessor

EIGHT_BIT = {"do_rescale": False, "offset": False, "do_normalize": False}
FIRST, LAST = "channels_first", "channels_last"

# The file of google/vivit-b-16x2-kinetics400 since 2023, without offset, and with keys that only transformers uses.
HUB_FILE = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "VivitFeatureExtractor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "VivitImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "VivitProcessor",
    "resample": 2,
    "rescale_factor": 0.00784313725490196,
    "size": {"shortest_edge": 224},
}


def noise(height, width, *, frames=2, channels=3, seed=0):
    """Returns frames without structure, uint8 (T, H, W, C)."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, channels), dtype=np.uint8)


def photograph(height, width):
    """Returns a smooth frame with edges and grain, uint8 (1, height, width, 3)."""
    small = noise(height // 12 + 2, width // 12 + 2, frames=1)[0]
    large = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    grain = np.random.default_rng(1).normal(0, 4, large.shape)
    return np.clip(large + grain, 0, 255).astype(np.uint8)[None]


def flatten(pixels):
    """Returns the arrays of nested lists."""
    if isinstance(pixels, list):
        return [array for item in pixels for array in flatten(item)]
    return [pixels.numpy() if isinstance(pixels, torch.Tensor) else pixels]


def assert_same(ours, theirs):
    """Compares structure, dtypes, shapes, and values: integers exactly, floats to 1e-6."""
    assert type(ours) is type(theirs)
    assert len(flatten(ours)) == len(flatten(theirs))
    for our_array, their_array in zip(flatten(ours), flatten(theirs)):
        assert our_array.dtype == their_array.dtype
        assert our_array.shape == their_array.shape
        tolerance = 1e-6 if our_array.dtype.kind == "f" else 0
        np.testing.assert_allclose(our_array, their_array, rtol=tolerance, atol=tolerance)


def assert_same_as_published(videos, *, call=None, **parameters):
    call = call or {}
    ours = VivitImageProcessor(**parameters)(videos, **call)
    theirs = Published(**parameters)(videos, **call)
    assert_same(ours["pixel_values"], theirs["pixel_values"])


# Pixels


# Common and odd sizes, smaller and larger than the target. Pillow 13 resizes the tallest (phones) vertically first.
@pytest.mark.parametrize(
    "height, width",
    [
        (240, 320),
        (720, 1280),
        (480, 854),
        (1080, 608),
        (1600, 720),
        (1000, 400),
        (144, 176),
        (61, 67),
        (224, 398),
        (256, 340),
        (577, 1023),
        (300, 224),
        (90, 1000),
        (1, 9),
        (7, 1),
    ],
)
def test_8_bit_frames_match_transformers(height, width):
    frames = noise(height, width, frames=1)
    for parameters in (
        {},
        {"size": 224},
        {"size": (250, 301), "crop_size": (97, 200)},
        {"resample": 3},
        {"resample": 1, "size": 61},
        {"do_resize": False},
        {"do_center_crop": False, "size": 61},
    ):
        processor = VivitImageProcessor(**parameters, **EIGHT_BIT)

        pixels = processor.resize_and_crop(frames)

        options = {"return_tensors": "np", "input_data_format": LAST}
        expected = Published(**parameters, **EIGHT_BIT)(list(frames), **options)["pixel_values"][0]
        np.testing.assert_array_equal(pixels, expected, err_msg=str(parameters))
        assert (pixels.dtype, pixels.flags.c_contiguous) == (np.uint8, True)
        assert pixels.shape == (1, 3, *processor.resize_crop.output_size(height, width))
        np.testing.assert_array_equal(processor(frames, **options).pixel_values[0], expected)


@pytest.mark.parametrize("resample", list(Image.Resampling), ids=lambda resample: resample.name)
def test_all_filters_match_transformers(resample):
    for size in ({"shortest_edge": 50}, {"height": 90, "width": 41}):
        for height, width in [(61, 97), (97, 61), (33, 200), (45, 40)]:
            assert_same_as_published(
                list(noise(height, width)), size=size, crop_size=36, resample=resample, **EIGHT_BIT
            )


@pytest.mark.parametrize("crop", [(10, 10), (11, 10), (10, 11), (4, 11), (11, 5), (7, 8), (1, 1), (6, 7)])
def test_padding_matches_transformers(crop):
    for height, width in [(7, 8), (6, 7)]:
        assert_same_as_published(list(noise(height, width)), do_resize=False, crop_size=crop)


@pytest.mark.filterwarnings("ignore:rescaling a frame")
@pytest.mark.parametrize("seed", range(60))
def test_random_options_match_transformers(seed):
    draw, values = random.Random(seed), np.random.default_rng(seed)

    def length(longest=120):
        return draw.randint(1, longest)

    channels = draw.choice([3, 3, 3, 1, 4])
    parameters = {
        "do_resize": draw.random() < 0.7,
        "size": draw.choice(
            [
                length(),
                [length(), length()],
                {"height": length(), "width": length()},
                {"shortest_edge": length()},
                {"shortest_edge": length(), "longest_edge": length()},
            ]
        ),
        "resample": draw.randint(0, 5),
        "do_center_crop": draw.random() < 0.7,
        "crop_size": draw.choice([length(), [length(), length()], {"height": length(), "width": length()}]),
        "do_rescale": draw.random() < 0.7,
        "rescale_factor": draw.choice([1 / 127.5, 1 / 255, 2]),
        "do_normalize": draw.random() < 0.7,
        "image_mean": draw.choice([0.4, [draw.random() for _ in range(channels)]]),
        "image_std": draw.choice([0.6, [0.1 + draw.random() for _ in range(channels)]]),
    }
    parameters["offset"] = parameters["do_rescale"] and draw.random() < 0.5

    shape = (draw.randint(1, 3), length(150), length(150), channels)
    frames = values.integers(0, 256, shape, dtype=np.uint8)
    kind = draw.choice(["uint8", "uint8", "unit range", "integers", "black and white"])
    if kind == "unit range":
        frames = values.random(frames.shape).astype(draw.choice([np.float16, np.float32, np.float64]))
    elif kind == "integers":
        frames = frames.astype(draw.choice([np.float32, np.float64, np.int64]))
    elif kind == "black and white":
        frames = (frames > 127).astype(draw.choice([bool, np.float32, np.int16]))
    layout = draw.choice([FIRST, LAST])
    if layout == FIRST:
        frames = frames.transpose(0, 3, 1, 2)
    video = [torch.from_numpy(frame.copy()) for frame in frames] if draw.random() < 0.3 else list(frames)
    call = {
        "return_tensors": draw.choice([None, "pt", "np"]),
        "data_format": draw.choice([FIRST, LAST]),
        "input_data_format": layout if channels == 4 or draw.random() < 0.5 else None,
    }
    if call["input_data_format"] is None and frames.shape[1] in (1, 3):
        call["input_data_format"] = layout  # the height looks like channels, and transformers guesses

    assert_same_as_published([video, video] if draw.random() < 0.3 else video, call=call, **parameters)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_keep_dtype_without_resizing_and_rescaling(dtype):
    frames = list(np.random.default_rng(0).random((2, 20, 30, 3)).astype(dtype))
    options = {"do_resize": False, "do_rescale": False, "offset": False, "crop_size": 16}

    assert VivitImageProcessor(**options)(frames)["pixel_values"][0][0].dtype == dtype
    assert_same_as_published(frames, **options)


def test_rescaled_values_are_bit_exact():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    parameters = {"do_resize": False, "do_center_crop": False, "do_normalize": False}
    for factor in (1 / 127.5, 1 / 255):
        ours = VivitImageProcessor(rescale_factor=factor, **parameters)(levels, return_tensors="np")
        theirs = Published(rescale_factor=factor, **parameters)(list(levels), return_tensors="np")
        np.testing.assert_array_equal(ours["pixel_values"], theirs["pixel_values"])


def test_unit_range_floats_resized_in_8_bits():
    frames = list(np.random.default_rng(0).random((2, 50, 60, 3), dtype=np.float32))

    pixels = VivitImageProcessor(**EIGHT_BIT)(frames, return_tensors="np").pixel_values

    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels * 255, np.round(pixels * 255), atol=1e-4)
    assert_same_as_published(frames, **EIGHT_BIT)


def test_constant_floats_match_transformers():
    for value in (0.0, 1.0, 0.5, 255.0, 254.001):
        assert_same_as_published([np.full((30, 40, 3), value, dtype=np.float32)], crop_size=20, **EIGHT_BIT)


@pytest.mark.parametrize("low, high", [(-1, 1), (0, 256), (0.0, 254.5), (-0.1, 0.9)])
def test_values_out_of_range_cannot_be_resized(low, high):
    frames = [np.linspace(low, high, 20 * 30 * 3).reshape(20, 30, 3)]

    with pytest.raises(ValueError):
        Published()(frames)
    with pytest.raises(ValueError, match=r"integers in \[0, 255\] or floats in \[0, 1\], got float64 in \["):
        VivitImageProcessor()(frames)


def test_double_rescaling_warns():
    with pytest.warns(UserWarning, match="do_rescale=False"):
        VivitImageProcessor()([np.random.default_rng(0).random((20, 30, 3), dtype=np.float32)])


# Resizing only what the crop keeps


def resize_whole(frame, resize_crop):
    """Resizes the whole frame with Pillow, then crops it."""
    height, width = resize_crop.resized_size(*frame.shape[:2])
    resized = np.asarray(Image.fromarray(frame).resize((width, height), resize_crop.resample))
    top, left = (max(0, (full - crop) // 2) for full, crop in zip((height, width), resize_crop.crop_to))
    return resized[top : top + resize_crop.crop_to[0], left : left + resize_crop.crop_to[1]]


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
def test_partial_resize_is_exact(resample):
    draw = random.Random(0)
    pool = noise(500, 500, frames=1)[0]
    for _ in range(60):
        frame = pool[: draw.randint(60, 500), : draw.randint(60, 500)]
        size = draw.choice([256, (draw.randint(10, 300), draw.randint(10, 300))])
        height, width = ResizeCrop(resize_to=size, resample=resample, crop_to=None).resized_size(*frame.shape[:2])
        crop = (draw.randint(1, min(height, 300)), draw.randint(1, min(width, 300)))
        resize_crop = ResizeCrop(resize_to=size, resample=resample, crop_to=crop)

        pixels = resize_crop.resize_and_crop_frame(frame)

        expected = resize_whole(frame, resize_crop)
        np.testing.assert_array_equal(pixels, expected, err_msg=f"{frame.shape} {resize_crop}")


def interpolate(frame, height, width):
    """Bilinear interpolation between the four nearest pixels, in float64."""

    def centers(source, target):
        return (np.arange(target) + 0.5) * source / target - 0.5

    frame = np.apply_along_axis(
        lambda pixels: np.interp(centers(len(pixels), height), range(len(pixels)), pixels), 0, frame
    )
    return np.apply_along_axis(
        lambda pixels: np.interp(centers(len(pixels), width), range(len(pixels)), pixels), 1, frame
    )


@pytest.mark.parametrize("height, width, edge", [(70, 50, 24), (31, 90, 40), (40, 40, 33)])
def test_resize_without_antialiasing_interpolates_four_pixels_and_rounds_down(height, width, edge):
    frame = noise(height, width, frames=1)[0]
    processor = VivitImageProcessor(size=edge, crop_size=(edge - 5, edge + 3), antialias=False)
    size = processor.resize_crop.resized_size(height, width)
    whole = replace(processor, do_center_crop=False).resize_and_crop(frame[None])[0].transpose(1, 2, 0)
    expected = interpolate(frame, *size)
    assert np.all((expected - 1.02 < whole) & (whole < expected + 0.02))
    cropped = processor.resize_and_crop(frame[None])[0].transpose(1, 2, 0)
    expected = ResizeCrop(resize_to=None, resample=2, crop_to=(edge - 5, edge + 3)).resize_and_crop_frame(whole)
    np.testing.assert_array_equal(cropped, expected)
    fast = replace(processor.resize_crop, is_fast=True).resize_and_crop_frame(frame)
    np.testing.assert_array_equal(fast, cropped)


def test_antialiasing_written_only_if_off(tmp_path):
    assert "antialias" not in VivitImageProcessor().to_dict()
    VivitImageProcessor(antialias=False).save_pretrained(tmp_path)
    assert not VivitImageProcessor.from_pretrained(tmp_path).antialias
    for values in ({"antialias": 0}, {"antialias": False, "resample": 3}):
        with pytest.raises(ConfigError, match="antialias must be"):
            VivitImageProcessor.from_dict(values)


@pytest.mark.parametrize(
    "height, width, edge, most",
    [
        (720, 1280, 256, 0.8),  # of the source's pixels, read by both passes together
        (2400, 1080, 256, 0.7),
        (480, 854, 256, 0.9),
        (720, 1280, 224, 1.2),
        (1280, 720, 224, 1.0),
    ],
)
def test_first_frame_reads_only_what_crop_needs(height, width, edge, most, monkeypatch):
    pillow_resize, pixels_read = Image.Image.resize, []
    resize_crop = ResizeCrop(resize_to=edge, resample=Image.Resampling.BILINEAR, crop_to=(224, 224))
    resize_crop.resize_and_crop_frame(noise(2400, 300, frames=1)[0])  # the first frame of the process, of another size

    def spy(image, *args, **options):
        pixels_read.append(image.width * image.height)
        return pillow_resize(image, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    resize_crop.resize_and_crop_frame(noise(height, width, frames=1)[0])

    assert sum(pixels_read) <= most * width * height


@pytest.mark.parametrize("order", ["horizontal first", "vertical first"])
def test_partial_resize_follows_pass_order_of_pillow(order, monkeypatch):
    pillow_resize, boxes = Image.Image.resize, []

    def resize_in_order(image, size, resample, box=None):
        boxes.append(box)
        if box is None:
            image = pillow_resize(
                image, (size[0], image.height) if order == "horizontal first" else (image.width, size[1]), resample
            )
        return pillow_resize(image, size, resample, box=box)

    monkeypatch.setattr(Image.Image, "resize", resize_in_order)
    monkeypatch.setattr(resize, "_find_pass_order_rule", resize._find_pass_order_rule.__wrapped__)
    for height, width in [(300, 400), (900, 300), (400, 300), (100, 120)]:
        frame = noise(height, width, frames=1)[0]
        resize_crop = ResizeCrop(resize_to=256, resample=Image.Resampling.BILINEAR, crop_to=(224, 224))
        np.testing.assert_array_equal(resize_crop.resize_and_crop_frame(frame), resize_whole(frame, resize_crop))
    # No version of Pillow runs the vertical pass first for all sizes: whole frames are resized.
    assert any(boxes) == (order == "horizontal first")


# Fast resizing


@pytest.mark.parametrize("height, width", [(480, 854), (1080, 1920), (1600, 720)])
def test_fast_resize_rarely_differs_and_by_one(height, width):
    frames = photograph(height, width)
    exact = ResizeCrop(resize_to=224, resample=2, crop_to=(224, 224))

    fast = replace(exact, is_fast=True).resize_and_crop(frames)

    difference = np.abs(fast.astype(int) - exact.resize_and_crop(frames))
    assert difference.max() <= 1
    assert 0 < (difference > 0).mean() < 2e-3


def test_fast_resize_of_strided_and_read_only_frames():
    frame = photograph(90, 160)[0]
    padded = np.frombuffer(np.pad(frame, ((0, 0), (0, 7), (0, 0))).tobytes(), np.uint8).reshape(90, 167, 3)
    fast = ResizeCrop(resize_to=40, resample=2, crop_to=(40, 40), is_fast=True)  # less than half, for torch
    for rotate in (lambda frame: frame, lambda frame: frame[::-1, ::-1], lambda frame: frame.transpose(1, 0, 2)):
        expected = fast.resize_and_crop_frame(rotate(frame).copy())
        np.testing.assert_array_equal(fast.resize_and_crop_frame(rotate(padded[:, :160])), expected)


@pytest.mark.parametrize(
    "resample, height",
    [(Image.Resampling.BICUBIC, 300), (Image.Resampling.NEAREST, 300), (Image.Resampling.BILINEAR, 127)],
    ids=["bicubic", "nearest", "shrinks to more than half"],
)
def test_fast_resize_exact_for_other_filters_and_ratios(resample, height):
    frames = photograph(height, 400)
    exact = ResizeCrop(resize_to=64, resample=resample, crop_to=(64, 64))
    np.testing.assert_array_equal(replace(exact, is_fast=True).resize_and_crop(frames), exact.resize_and_crop(frames))


# Scale and bias


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"do_normalize": False},
        EIGHT_BIT,
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "rescale_factor": 1 / 255, "offset": False},
        {"do_rescale": False, "offset": False, "image_mean": 127.5, "image_std": 127.5},
    ],
    ids=str,
)
def test_scale_and_bias_match_preprocess(parameters):
    levels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 16, 16, 3)
    processor = VivitImageProcessor(do_resize=False, do_center_crop=False, **parameters)

    scale, bias = processor.scale_and_bias()

    assert (scale.dtype, bias.dtype, scale.shape, bias.shape) == (np.float32, np.float32, (3,), (3,))
    expected = processor(levels, data_format=LAST, return_tensors="np").pixel_values[0]
    np.testing.assert_allclose(levels * scale + bias, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "frames", [noise(9, 9)[0], noise(9, 9).astype(np.float32), noise(9, 9, channels=4), list(noise(9, 9))], ids=type
)
def test_resize_and_crop_of_other_types(frames):
    with pytest.raises(TypeError, match=r"frames must be a uint8 array \(T, H, W, 3\), got"):
        VivitImageProcessor().resize_and_crop(frames)


# Inputs


def to_images(frames):
    return [Image.fromarray(frame) for frame in frames]


FORMS = {
    "tuple": tuple,
    "array": np.array,
    "tensor": torch.from_numpy,
    "PIL": to_images,
    "tensors (C, H, W)": lambda frames: [torch.from_numpy(frame.transpose(2, 0, 1).copy()) for frame in frames],
    "array (T, C, H, W)": lambda frames: frames.transpose(0, 3, 1, 2),
    "tensor (T, C, H, W)": lambda frames: torch.from_numpy(frames).permute(0, 3, 1, 2),
    "array (B, T, H, W, C)": lambda frames: frames[None],
    "list of arrays": lambda frames: [frames],
    "list of lists": lambda frames: [list(frames)],
    "list of lists of PIL": lambda frames: [to_images(frames)],
    "tuple of tuples": lambda frames: (tuple(frames),),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_of_one_video(form):
    frames = noise(40, 50, frames=3)
    processor = VivitImageProcessor(size=20, crop_size=16)

    expected = processor(list(frames), return_tensors="pt").pixel_values

    assert expected.shape == (1, 3, 3, 16, 16)
    assert torch.equal(processor(form(frames), return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize("form", [list, np.array, torch.from_numpy])
def test_forms_of_a_batch(form):
    videos = noise(40, 50, frames=6).reshape(2, 3, 40, 50, 3)
    processor = VivitImageProcessor(size=20, crop_size=16)

    batch = processor(form(videos), return_tensors="pt").pixel_values

    assert batch.shape == (2, 3, 3, 16, 16)
    for pixels, video in zip(batch, videos):
        assert torch.equal(pixels, processor(video, return_tensors="pt").pixel_values[0])


@pytest.mark.parametrize("form", [np.array, torch.from_numpy, Image.fromarray])
def test_single_frame_is_a_video(form):
    frame = form(noise(40, 50)[0])

    assert VivitImageProcessor()(frame, return_tensors="np").pixel_values.shape == (1, 1, 3, 224, 224)
    assert_same_as_published(frame)


def test_frames_of_different_sizes_in_one_video():
    frames = [noise(40, 50)[0], noise(70, 30)[0], noise(10, 10)[0]]

    assert_same_as_published(frames, call={"return_tensors": "pt"}, crop_size=100)


def test_other_image_modes_converted_to_rgb():
    processor = VivitImageProcessor(crop_size=40)
    for mode in ("L", "P", "1", "RGBA", "LA", "CMYK"):
        image = Image.fromarray(noise(40, 50)[0]).convert(mode)
        converted = processor([image], return_tensors="np").pixel_values
        expected = processor([image.convert("RGB")], return_tensors="np").pixel_values
        np.testing.assert_array_equal(converted, expected, err_msg=mode)


def test_alpha_kept_with_input_data_format():
    images = to_images(noise(40, 50, channels=4))

    assert images[0].mode == "RGBA"
    assert_same_as_published(images, call={"input_data_format": LAST}, image_mean=0.5, image_std=0.5)


def test_height_not_mistaken_for_channels():
    strip = noise(3, 50)
    processor = VivitImageProcessor(crop_size=40)

    pixels = processor(to_images(strip), return_tensors="np").pixel_values

    expected = processor(list(strip), input_data_format=LAST, return_tensors="np").pixel_values
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_channel_position_kept_without_data_format(layout):
    frames = list(noise(40, 50) if layout == LAST else noise(40, 50).transpose(0, 3, 1, 2))
    processor = VivitImageProcessor(crop_size=40)

    kept, given = processor(frames, data_format=None), processor(frames, data_format=layout)

    np.testing.assert_array_equal(kept["pixel_values"], given["pixel_values"])


@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_tensor_is_contiguous(layout):
    for options in ({}, EIGHT_BIT):
        inputs = VivitImageProcessor(**options)(noise(40, 50), return_tensors="pt", data_format=layout)
        assert inputs.pixel_values.is_contiguous()


def test_result_shares_no_memory_with_frames():
    frames = noise(20, 30)
    before = frames.copy()

    processor = VivitImageProcessor(do_resize=False, do_center_crop=False, **EIGHT_BIT)
    processor(frames)["pixel_values"][0][0][:] = 0

    np.testing.assert_array_equal(frames, before)


def test_videos_passed_by_either_name():
    video = noise(40, 60)
    processor = VivitImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    expected = processor(video, return_tensors="np")["pixel_values"]
    for given in ({"images": video}, {"videos": video}):
        np.testing.assert_array_equal(processor(**given, return_tensors="np")["pixel_values"], expected)
    with pytest.raises(ValueError, match="expected images or videos"):
        processor()


@pytest.mark.parametrize(
    "videos",
    [
        [],
        [[]],
        np.zeros((0, 4, 4, 3), np.uint8),
        "video.mp4",
        None,
        [None],
        [["frame"]],
        np.zeros((4, 4), np.uint8),
        [np.zeros((4, 4), np.uint8)],
        [[[np.zeros((4, 4, 3), np.uint8)]]],
        [np.zeros((4, 0, 3), np.uint8)],
        [np.zeros((4, 4, 3), np.uint8), [np.zeros((4, 4, 3), np.uint8)]],
        [np.zeros((4, 4, 3), complex)],
    ],
    ids=repr,
)
def test_inputs_that_are_not_videos(videos):
    with pytest.raises(ValueError, match="got"):
        VivitImageProcessor()(videos)


def test_number_of_channels_must_be_known():
    with pytest.raises(ValueError, match=r"without input_data_format .* got uint8 \(20, 30, 4\)"):
        VivitImageProcessor()(noise(20, 30, channels=4))
    for name in ("image_mean", "image_std"):
        with pytest.raises(ConfigError, match=rf"{name} must be one number, or one per .* \(3\), got \(0.5, 0.25\)"):
            VivitImageProcessor(**{name: [0.5, 0.25]})(noise(20, 30))


@pytest.mark.parametrize("return_tensors", ["pt", "np"])
def test_videos_of_unequal_shape_not_stacked(return_tensors):
    processor = VivitImageProcessor()

    with pytest.raises(ValueError, match=r"\[2, 3\] frames"):
        processor([noise(20, 30), noise(20, 30, frames=3)], return_tensors=return_tensors)
    with pytest.raises(ValueError, match=r"\(3, 256, 384\), \(3, 384, 256\)"):
        processor([noise(20, 30), noise(30, 20)], return_tensors=return_tensors, do_center_crop=False)


def test_videos_of_unequal_shape_without_return_tensors():
    processor = VivitImageProcessor(do_center_crop=False)

    wide, tall = processor([noise(20, 30), noise(30, 20, frames=3)])["pixel_values"]

    assert [frame.shape for frame in wide] == [(3, 256, 384)] * 2
    assert [frame.shape for frame in tall] == [(3, 384, 256)] * 3


@pytest.mark.parametrize("name", ["return_tensors", "data_format", "input_data_format"])
def test_invalid_choice(name):
    with pytest.raises(ConfigError, match=f"{name} must be one of .* got 'tf'"):
        VivitImageProcessor()(noise(20, 30), **{name: "tf"})


# Result


def test_result_is_mapping_with_attributes():
    inputs = VivitImageProcessor()(noise(20, 30), return_tensors="pt")

    assert inputs.pixel_values is inputs["pixel_values"]
    assert dict(**inputs) == {"pixel_values": inputs.pixel_values}
    assert not hasattr(inputs, "labels")


def test_result_to_device_and_dtype():
    inputs = VivitImageProcessor()(noise(20, 30), return_tensors="pt")
    inputs["labels"] = torch.tensor([1])
    inputs["names"] = ["waving"]

    assert inputs.to(torch.float16) is inputs
    assert inputs.pixel_values.dtype == torch.float16
    assert inputs.labels.dtype == torch.int64
    assert inputs.names == ["waving"]

    inputs.to("meta", torch.float64)
    assert (inputs.pixel_values.device.type, inputs.pixel_values.dtype) == ("meta", torch.float64)
    assert (inputs.labels.device.type, inputs.labels.dtype) == ("meta", torch.int64)


# Parameters


def test_parameters_and_defaults_match_transformers():
    assert VivitImageProcessor().to_dict() == Published().to_dict()


@pytest.mark.parametrize(
    "override",
    [
        {"do_resize": False},
        {"size": {"height": 30, "width": 70}},
        {"size": 40},
        {"resample": 3},
        {"do_center_crop": False},
        {"crop_size": 10},
        {"do_rescale": False, "offset": False},
        {"rescale_factor": 1 / 255},
        {"offset": False},
        {"do_normalize": False},
        {"image_mean": [0.1, 0.2, 0.3]},
        {"image_std": 0.2},
    ],
    ids=str,
)
def test_override_for_one_call(override):
    processor, unchanged = VivitImageProcessor(crop_size=50), VivitImageProcessor(crop_size=50)
    frames = list(noise(40, 60))

    pixels = processor.preprocess(frames, **override)["pixel_values"]

    assert_same(pixels, Published(crop_size=50).preprocess(frames, **override)["pixel_values"])
    assert not np.array_equal(pixels, processor.preprocess(frames)["pixel_values"])
    assert processor == unchanged


def test_override_of_none_is_ignored():
    processor = VivitImageProcessor(do_normalize=False)

    pixels = processor(noise(9, 9), do_normalize=None)["pixel_values"]

    assert_same(pixels, processor(noise(9, 9))["pixel_values"])


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"do_resize": 1}, "do_resize must be true or false, got 1"),
        ({"do_rescale": False}, "offset must be false if do_rescale is false, got True"),
        ({"size": 0}, "size must be a whole number of pixels, >= 1, got 0"),
        ({"size": {"shortest_edge": 224.0}}, "size must be a whole number of pixels"),
        ({"size": {"longest_edge": 224}}, "size must be a shortest_edge, or height and width"),
        ({"size": [1, 2, 3]}, "size must be a shortest_edge, or height and width"),
        ({"size": True}, "size must be a whole number of pixels"),
        ({"crop_size": {"shortest_edge": 224}}, "crop_size must be height and width, or n for a square"),
        ({"crop_size": "224"}, "crop_size must be height and width"),
        ({"resample": 9}, r"resample must be one of 0 \(NEAREST\), .* got 9"),
        ({"rescale_factor": "1/255"}, "rescale_factor must be a finite number, got '1/255'"),
        ({"rescale_factor": float("nan")}, "rescale_factor must be a finite number"),
        ({"image_mean": []}, "image_mean must be a finite number, or one per channel"),
        ({"image_mean": [0.5, None, 0.5]}, "image_mean must be a finite number"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std must be other than 0"),
    ],
    ids=str,
)
def test_invalid_parameter(parameters, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        VivitImageProcessor(**parameters)
    with pytest.raises(ConfigError, match=f"^{message}"):
        VivitImageProcessor().preprocess(noise(9, 9), **parameters)


def test_unknown_parameter():
    with pytest.raises(TypeError, match="do_flip"):
        VivitImageProcessor(do_flip=True)
    with pytest.raises(TypeError, match="do_flip"):
        VivitImageProcessor()(noise(9, 9), do_flip=True)


@pytest.mark.parametrize(
    "size, resolved",
    [
        (224, {"shortest_edge": 224}),
        ([30, 40], {"height": 30, "width": 40}),
        ((np.int64(30), 40), {"height": 30, "width": 40}),
        ({"width": 40, "height": 30}, {"height": 30, "width": 40}),
    ],
)
def test_size_formats(size, resolved):
    assert VivitImageProcessor(size=size).size == resolved
    assert VivitImageProcessor(crop_size=20).crop_size == {"height": 20, "width": 20}


def test_processor_is_immutable_and_copyable():
    mean = [0.1, 0.2, 0.3]
    processor = VivitImageProcessor(image_mean=mean, size=(30, 40), resample=3, offset=False)
    mean[0] = 9.0

    assert processor.image_mean == (0.1, 0.2, 0.3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        processor.do_resize = False
    with pytest.raises(TypeError):
        processor.size["height"] = 1
    assert pickle.loads(pickle.dumps(processor)) == processor
    assert copy.deepcopy(processor) == processor


# Files


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"size": {"height": 30, "width": 40}, "resample": Image.Resampling.BICUBIC, "crop_size": 20},
        {"do_rescale": False, "offset": False, "do_resize": False, "image_mean": 0.3, "image_std": [1, 2, 3]},
    ],
    ids=["defaults", "size", "mean and std"],
)
def test_files_are_exchangeable_with_transformers(parameters, tmp_path):
    ours = VivitImageProcessor(**parameters)
    ours.save_pretrained(tmp_path / "new" / "ours")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "new" / "ours")
    Published(**parameters).save_pretrained(tmp_path / "theirs")

    assert type(theirs) is Published
    frames = list(noise(40, 60))
    assert_same(ours(frames)["pixel_values"], theirs(frames)["pixel_values"])
    assert VivitImageProcessor.from_pretrained(str(tmp_path / "new" / "ours")) == ours
    assert VivitImageProcessor.from_pretrained(tmp_path / "theirs") == ours


def test_hub_file_read_without_unknown_keys():
    assert VivitImageProcessor.from_dict(HUB_FILE) == VivitImageProcessor(size={"shortest_edge": 224})
    assert VivitImageProcessor.from_dict({"size": None, "image_mean": None}) == VivitImageProcessor()


@pytest.mark.parametrize(
    "key, name, other_name",
    [
        ("image_processor_type", "VivitImageProcessor", "VideoMAEImageProcessor"),
        ("feature_extractor_type", "VivitFeatureExtractor", "CLIPFeatureExtractor"),
        ("video_processor_type", "VivitVideoProcessor", "VJEPA2VideoProcessor"),
    ],
)
def test_processor_type_in_file(key, name, other_name, tmp_path):
    assert VivitImageProcessor.from_dict({key: name}) == VivitImageProcessor()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({key: other_name, "size": 224}))

    with pytest.raises(CheckpointFileError, match=f"preprocessor_config.json: {key} must be .* got '{other_name}'"):
        VivitImageProcessor.from_pretrained(tmp_path)


def test_video_processor_file(tmp_path):
    content = {"video_processor_type": "VivitVideoProcessor", "do_sample_frames": False, "size": 9}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(content))

    assert VivitImageProcessor.from_pretrained(tmp_path) == VivitImageProcessor(size=9)


def test_invalid_file_named(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="has no preprocessor_config.json"):
        VivitImageProcessor.from_pretrained(tmp_path)
    for content in ("{", "[]", '{"size": -1}'):
        (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(CheckpointFileError, match="preprocessor_config.json"):
            VivitImageProcessor.from_pretrained(tmp_path)
