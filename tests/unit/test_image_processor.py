"""VivitImageProcessor: the pixels, files and inputs of transformers' processor, and the server's way."""

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
from handler.models.config import ConfigError
from handler.processing import image_processor, resize
from handler.processing.resize import ResizeCrop

Published = transformers.VivitImageProcessor

EIGHT_BIT = {"do_rescale": False, "offset": False, "do_normalize": False}
FIRST, LAST = "channels_first", "channels_last"

# Of google/vivit-b-16x2-kinetics400, as its file of 2023 has it: no offset, and keys of transformers' own.
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
    """uint8 (T, H, W, C): every pixel counts, and neighbours differ."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, channels), dtype=np.uint8)


def leaves(pixels):
    """Every array of nested lists, in order; a tensor is one."""
    if isinstance(pixels, list):
        return [leaf for item in pixels for leaf in leaves(item)]
    return [pixels.numpy() if isinstance(pixels, torch.Tensor) else pixels]


def assert_same(ours, theirs):
    """The same structure, dtypes and shapes; values to 1e-6, or exactly where they are whole numbers."""
    assert type(ours) is type(theirs)
    assert len(leaves(ours)) == len(leaves(theirs))
    for our_leaf, their_leaf in zip(leaves(ours), leaves(theirs)):
        assert our_leaf.dtype == their_leaf.dtype
        assert our_leaf.shape == their_leaf.shape
        tolerance = 1e-6 if our_leaf.dtype.kind == "f" else 0
        np.testing.assert_allclose(our_leaf, their_leaf, rtol=tolerance, atol=tolerance)


def assert_same_as_published(videos, *, call=None, **parameters):
    call = call or {}
    ours = VivitImageProcessor(**parameters)(videos, **call)
    theirs = Published(**parameters)(videos, **call)
    assert_same(ours["pixel_values"], theirs["pixel_values"])


# The pixels of transformers


@pytest.mark.parametrize(
    "height, width",
    [
        (256, 256),
        (240, 320),
        (320, 240),
        (120, 160),
        (37, 53),
        (360, 641),
        (480, 270),
        (224, 398),
        (1, 9),
        (7, 1),
    ],
)
@pytest.mark.parametrize("edge", [224, 256, 61])
def test_resized_and_cropped_frames_are_those_of_transformers(height, width, edge):
    assert_same_as_published(list(noise(height, width)), size={"shortest_edge": edge}, **EIGHT_BIT)


@pytest.mark.parametrize("resample", list(Image.Resampling), ids=lambda resample: resample.name)
@pytest.mark.parametrize("size", [{"shortest_edge": 50}, {"height": 90, "width": 41}])
def test_every_filter_of_pillow_makes_the_frames_of_transformers(resample, size):
    for height, width in [(61, 97), (97, 61), (33, 200), (45, 40)]:
        assert_same_as_published(list(noise(height, width)), size=size, crop_size=36, resample=resample, **EIGHT_BIT)


@pytest.mark.parametrize("crop", [(10, 10), (11, 10), (10, 11), (4, 11), (11, 5), (7, 8), (1, 1), (6, 7)])
def test_a_frame_smaller_than_the_crop_is_padded_as_by_transformers(crop):
    assert_same_as_published(list(noise(7, 8)), do_resize=False, crop_size=crop)
    assert_same_as_published(list(noise(6, 7)), do_resize=False, crop_size=crop, **EIGHT_BIT)


@pytest.mark.filterwarnings("ignore:rescaling a frame")
@pytest.mark.parametrize("seed", range(80))
def test_any_options_and_frames_give_the_output_of_transformers(seed):
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
    kind = draw.choice(["8 bit", "8 bit", "unit", "whole", "black and white"])
    if kind == "unit":
        frames = values.random(frames.shape).astype(draw.choice([np.float16, np.float32, np.float64]))
    elif kind == "whole":
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
        call["input_data_format"] = layout  # a strip that looks like channels: transformers only warns

    assert_same_as_published([video, video] if draw.random() < 0.3 else video, call=call, **parameters)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_that_are_neither_resized_nor_rescaled_keep_their_dtype(dtype):
    frames = list(np.random.default_rng(0).random((2, 20, 30, 3)).astype(dtype))
    options = {"do_resize": False, "do_rescale": False, "offset": False, "crop_size": 16}

    assert VivitImageProcessor(**options)(frames)["pixel_values"][0][0].dtype == dtype
    assert_same_as_published(frames, **options)


def test_floats_from_0_to_1_are_resized_in_8_bits_and_come_back_as_floats_from_0_to_1():
    frames = list(np.random.default_rng(0).random((2, 50, 60, 3), dtype=np.float32))

    pixels = VivitImageProcessor(**EIGHT_BIT)(frames, return_tensors="np").pixel_values

    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels * 255, np.round(pixels * 255), atol=1e-4)
    assert_same_as_published(frames, **EIGHT_BIT)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5, 255.0, 254.001])
def test_a_frame_of_one_float_value_is_resized_as_by_transformers(value):
    assert_same_as_published([np.full((30, 40, 3), value, dtype=np.float32)], crop_size=20, **EIGHT_BIT)


@pytest.mark.parametrize("low, high", [(-1, 1), (0, 256), (0.0, 254.5), (-0.1, 0.9)])
def test_resizing_refuses_values_that_are_not_pixels_as_transformers_does(low, high):
    frames = [np.linspace(low, high, 20 * 30 * 3).reshape(20, 30, 3)]

    with pytest.raises(ValueError):
        Published()(frames)
    with pytest.raises(ValueError, match=r"whole numbers 0 \.\. 255 or floats 0 \.\. 1, got float64"):
        VivitImageProcessor()(frames)


def test_rescaling_what_looks_rescaled_already_is_done_with_a_warning():
    frames = [np.random.default_rng(0).random((20, 30, 3), dtype=np.float32)]

    with pytest.warns(UserWarning, match="do_rescale=False"):
        VivitImageProcessor()(frames)


# Forms of input and output


def as_pictures(frames):
    return [Image.fromarray(frame) for frame in frames]


def as_tensors_channels_first(frames):
    return [torch.from_numpy(frame.transpose(2, 0, 1).copy()) for frame in frames]


@pytest.mark.parametrize(
    "form",
    [
        tuple,
        np.array,
        torch.from_numpy,
        as_pictures,
        as_tensors_channels_first,
        lambda frames: frames.transpose(0, 3, 1, 2),
        lambda frames: torch.from_numpy(frames).permute(0, 3, 1, 2),
        lambda frames: frames[None],
        lambda frames: [frames],
        lambda frames: [list(frames)],
        lambda frames: [as_pictures(frames)],
        lambda frames: (tuple(frames),),
    ],
    ids=[
        "tuple",
        "array",
        "tensor",
        "PIL",
        "tensors (C, H, W)",
        "array (T, C, H, W)",
        "tensor (T, C, H, W)",
        "array (B, T, H, W, C)",
        "list of arrays",
        "list of lists",
        "list of lists of PIL",
        "tuple of tuples",
    ],
)
def test_a_video_may_come_in_many_forms(form):
    frames = noise(40, 50, frames=3)
    processor = VivitImageProcessor(size=20, crop_size=16)

    expected = processor(list(frames), return_tensors="pt").pixel_values

    assert expected.shape == (1, 3, 3, 16, 16)
    assert torch.equal(processor(form(frames), return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize("form", [list, np.array, torch.from_numpy])
def test_several_videos_are_a_batch(form):
    videos = noise(40, 50, frames=6).reshape(2, 3, 40, 50, 3)
    processor = VivitImageProcessor(size=20, crop_size=16)

    batch = processor(form(videos), return_tensors="pt").pixel_values

    assert batch.shape == (2, 3, 3, 16, 16)
    for pixels, video in zip(batch, videos):
        assert torch.equal(pixels, processor(video, return_tensors="pt").pixel_values[0])


@pytest.mark.parametrize("form", [np.array, torch.from_numpy, Image.fromarray])
def test_a_single_frame_is_a_video_of_one_frame(form):
    frame = form(noise(40, 50)[0])

    assert VivitImageProcessor()(frame, return_tensors="np").pixel_values.shape == (1, 1, 3, 224, 224)
    assert_same_as_published(frame)


def test_frames_of_different_sizes_make_one_video():
    frames = [noise(40, 50)[0], noise(70, 30)[0], noise(10, 10)[0]]

    assert_same_as_published(frames, call={"return_tensors": "pt"}, crop_size=100)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK"])
def test_a_picture_that_is_not_rgb_is_converted(mode):
    picture = Image.fromarray(noise(40, 50)[0]).convert(mode)
    processor = VivitImageProcessor()

    ours = processor([picture], return_tensors="np").pixel_values

    np.testing.assert_array_equal(ours, processor([picture.convert("RGB")], return_tensors="np").pixel_values)


def test_a_picture_keeps_its_alpha_where_the_layout_is_given():
    pictures = as_pictures(noise(40, 50, channels=4))

    assert pictures[0].mode == "RGBA"
    assert_same_as_published(pictures, call={"input_data_format": LAST}, image_mean=0.5, image_std=0.5)


def test_the_height_of_a_picture_is_never_taken_for_channels():
    strip = noise(3, 50)
    processor = VivitImageProcessor()

    ours = processor(as_pictures(strip), return_tensors="np").pixel_values

    expected = processor(list(strip), input_data_format=LAST, return_tensors="np").pixel_values
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_without_a_data_format_the_channels_stay_where_they_were(layout):
    frames = list(noise(40, 50) if layout == LAST else noise(40, 50).transpose(0, 3, 1, 2))
    processor = VivitImageProcessor()

    kept, given = processor(frames, data_format=None), processor(frames, data_format=layout)

    np.testing.assert_array_equal(kept["pixel_values"], given["pixel_values"])


@pytest.mark.parametrize("layout", [FIRST, LAST])
@pytest.mark.parametrize("options", [{}, EIGHT_BIT])
def test_a_tensor_is_contiguous(layout, options):
    processor = VivitImageProcessor(**options)

    inputs = processor(noise(40, 50), return_tensors="pt", data_format=layout)

    assert inputs.pixel_values.is_contiguous()


def test_the_frames_that_came_in_are_left_alone_and_not_handed_out():
    frames = noise(20, 30)
    before = frames.copy()

    processor = VivitImageProcessor(do_resize=False, do_center_crop=False, **EIGHT_BIT)
    processor(frames)["pixel_values"][0][0][:] = 0

    np.testing.assert_array_equal(frames, before)


def test_a_processor_takes_its_videos_by_either_name():
    video = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), np.uint8)
    processor = VivitImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    expected = processor(video, return_tensors="np")["pixel_values"]
    for given in ({"images": video}, {"videos": video}):
        np.testing.assert_array_equal(processor(**given, return_tensors="np")["pixel_values"], expected)
    with pytest.raises(ValueError):
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
def test_what_is_no_video_is_refused(videos):
    with pytest.raises(ValueError, match="got"):
        VivitImageProcessor()(videos)


def test_channels_that_cannot_be_told_are_asked_for():
    with pytest.raises(ValueError, match=r"without input_data_format .* got uint8 \(20, 30, 4\)"):
        VivitImageProcessor()(noise(20, 30, channels=4))


@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_mean_and_std_must_be_as_many_as_the_channels(name):
    with pytest.raises(ConfigError, match=rf"{name} .* as the frames have channels \(3\), got \(0.5, 0.25\)"):
        VivitImageProcessor(**{name: [0.5, 0.25]})(noise(20, 30))


@pytest.mark.parametrize("return_tensors", ["pt", "np"])
def test_videos_that_do_not_make_one_tensor_are_refused(return_tensors):
    processor = VivitImageProcessor()

    with pytest.raises(ValueError, match=r"\[2, 3\] frames"):
        processor([noise(20, 30), noise(20, 30, frames=3)], return_tensors=return_tensors)
    with pytest.raises(ValueError, match=r"\(3, 256, 384\), \(3, 384, 256\)"):
        processor([noise(20, 30), noise(30, 20)], return_tensors=return_tensors, do_center_crop=False)


def test_without_return_tensors_videos_may_differ():
    processor = VivitImageProcessor(do_center_crop=False)

    wide, tall = processor([noise(20, 30), noise(30, 20, frames=3)])["pixel_values"]

    assert [frame.shape for frame in wide] == [(3, 256, 384)] * 2
    assert [frame.shape for frame in tall] == [(3, 384, 256)] * 3


@pytest.mark.parametrize("name", ["return_tensors", "data_format", "input_data_format"])
def test_a_wrong_choice_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} must be .* got 'tf'"):
        VivitImageProcessor()(noise(20, 30), **{name: "tf"})


# What comes out


def test_the_result_is_a_mapping_with_attributes():
    inputs = VivitImageProcessor()(noise(20, 30), return_tensors="pt")

    assert inputs.pixel_values is inputs["pixel_values"]
    assert dict(**inputs) == {"pixel_values": inputs.pixel_values}
    assert not hasattr(inputs, "labels")


def test_moving_the_result_changes_it_and_casts_only_floats():
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


def test_parameters_and_defaults_are_the_published_ones():
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
def test_every_parameter_can_be_overridden_for_one_call(override):
    processor, untouched = VivitImageProcessor(crop_size=50), VivitImageProcessor(crop_size=50)
    frames = list(noise(40, 60))

    ours = processor.preprocess(frames, **override)["pixel_values"]

    assert_same(ours, Published(crop_size=50).preprocess(frames, **override)["pixel_values"])
    assert not np.array_equal(ours, processor.preprocess(frames)["pixel_values"])
    assert processor == untouched


def test_an_override_of_none_is_none():
    processor = VivitImageProcessor(do_normalize=False)

    pixels = processor(noise(9, 9), do_normalize=None)["pixel_values"]

    assert_same(pixels, processor(noise(9, 9))["pixel_values"])


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"do_resize": 1}, "do_resize must be true or false, got 1"),
        ({"do_rescale": False}, "offset must be false where do_rescale is false, got True"),
        ({"size": 0}, "size must be in whole pixels, 1 or more, got 0"),
        ({"size": {"shortest_edge": 224.0}}, "size must be in whole pixels"),
        ({"size": {"longest_edge": 224}}, "size must be a shortest_edge, or height and width"),
        ({"size": [1, 2, 3]}, "size must be a shortest_edge, or height and width"),
        ({"size": True}, "size must be in whole pixels"),
        ({"crop_size": {"shortest_edge": 224}}, "crop_size must be height and width, or n for a square"),
        ({"crop_size": "224"}, "crop_size must be height and width"),
        ({"resample": 9}, r"resample must be one of 0 \(NEAREST\), .* got 9"),
        ({"rescale_factor": "1/255"}, "rescale_factor must be a finite number, got '1/255'"),
        ({"rescale_factor": float("nan")}, "rescale_factor must be a finite number"),
        ({"image_mean": []}, "image_mean must be a finite number, or one for each channel"),
        ({"image_mean": [0.5, None, 0.5]}, "image_mean must be a finite number"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std must be other than 0"),
    ],
    ids=str,
)
def test_a_parameter_that_breaks_a_rule_is_refused_where_the_processor_is_made(parameters, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        VivitImageProcessor(**parameters)
    with pytest.raises(ConfigError, match=f"^{message}"):
        VivitImageProcessor().preprocess(noise(9, 9), **parameters)


def test_an_unknown_parameter_is_refused():
    with pytest.raises(TypeError, match="do_flip"):
        VivitImageProcessor(do_flip=True)
    with pytest.raises(TypeError, match="do_flip"):
        VivitImageProcessor()(noise(9, 9), do_flip=True)


def test_a_processor_does_not_change():
    mean = [0.1, 0.2, 0.3]
    processor = VivitImageProcessor(image_mean=mean)
    mean[0] = 9.0

    assert processor.image_mean == (0.1, 0.2, 0.3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        processor.do_resize = False
    with pytest.raises(TypeError):
        processor.size["shortest_edge"] = 1


def test_a_processor_can_be_pickled_and_copied():
    processor = VivitImageProcessor(size=(30, 40), resample=3, offset=False, image_mean=0.4)

    assert pickle.loads(pickle.dumps(processor)) == processor
    assert copy.deepcopy(processor) == processor


# Files


PARAMETERS = [
    {},
    {"size": {"height": 30, "width": 40}, "resample": Image.Resampling.BICUBIC, "crop_size": 20},
    {"do_rescale": False, "offset": False, "do_resize": False, "image_mean": 0.3, "image_std": [1, 2, 3]},
]


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_transformers_loads_what_we_save(parameters, tmp_path):
    VivitImageProcessor(**parameters).save_pretrained(tmp_path / "new")

    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "new")

    assert type(theirs) is Published
    frames = list(noise(40, 60))
    assert_same(VivitImageProcessor(**parameters)(frames)["pixel_values"], theirs(frames)["pixel_values"])


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_we_load_what_transformers_saves(parameters, tmp_path):
    Published(**parameters).save_pretrained(tmp_path)

    assert VivitImageProcessor.from_pretrained(tmp_path) == VivitImageProcessor(**parameters)


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_what_we_save_we_load(parameters, tmp_path):
    VivitImageProcessor(**parameters).save_pretrained(tmp_path)

    assert VivitImageProcessor.from_pretrained(str(tmp_path)) == VivitImageProcessor(**parameters)


def test_a_file_of_the_hub_is_read_and_keys_of_others_are_ignored():
    assert VivitImageProcessor.from_dict(HUB_FILE) == VivitImageProcessor(size={"shortest_edge": 224})


def test_null_in_a_file_is_the_default():
    assert VivitImageProcessor.from_dict({"size": None, "image_mean": None}) == VivitImageProcessor()


@pytest.mark.parametrize(
    "size, spelt",
    [
        (224, {"shortest_edge": 224}),
        ([30, 40], {"height": 30, "width": 40}),
        ((30, 40), {"height": 30, "width": 40}),
        ({"width": 40, "height": 30}, {"height": 30, "width": 40}),
    ],
)
def test_sizes_are_spelt_out(size, spelt):
    assert VivitImageProcessor(size=size).size == spelt


def test_a_crop_of_one_number_is_a_square():
    assert VivitImageProcessor(crop_size=20).crop_size == {"height": 20, "width": 20}


@pytest.mark.parametrize(
    "key, name",
    [
        ("image_processor_type", "VivitImageProcessor"),
        ("feature_extractor_type", "VivitFeatureExtractor"),
        ("video_processor_type", "VivitVideoProcessor"),
    ],
)
def test_the_file_of_a_vivit_is_known_by_its_names(key, name):
    assert VivitImageProcessor.from_dict({key: name}) == VivitImageProcessor()


@pytest.mark.parametrize(
    "key, name",
    [
        ("image_processor_type", "VideoMAEImageProcessor"),
        ("feature_extractor_type", "CLIPFeatureExtractor"),
    ],
)
def test_the_file_of_another_processor_is_refused_by_name(key, name, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({key: name, "size": 224}))

    with pytest.raises(CheckpointFileError, match=f"preprocessor_config.json: {key} must be .* got '{name}'"):
        VivitImageProcessor.from_pretrained(tmp_path)


def test_the_file_of_a_video_processor_is_read(tmp_path):
    content = {"video_processor_type": "VivitVideoProcessor", "do_sample_frames": False, "size": 9}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(content))

    assert VivitImageProcessor.from_pretrained(tmp_path) == VivitImageProcessor(size=9)


@pytest.mark.parametrize("content", ["{", "[]", '{"size": -1}'])
def test_a_broken_file_is_named(content, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(content)

    with pytest.raises(CheckpointFileError, match="preprocessor_config.json"):
        VivitImageProcessor.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="preprocessor_config.json"):
        VivitImageProcessor.from_pretrained(tmp_path)


def test_the_hub_is_asked_for_the_file_with_every_option(monkeypatch, tmp_path):
    VivitImageProcessor(size=9).save_pretrained(tmp_path)
    options = {"revision": "v1", "cache_dir": "cache", "token": "secret", "local_files_only": True}
    asked = []

    def fetch(name, filenames, **given):
        asked.append((name, given))
        return tmp_path / filenames[0]

    monkeypatch.setattr(image_processor, "fetch", fetch)

    assert VivitImageProcessor.from_pretrained("owner/name", **options) == VivitImageProcessor(size=9)
    assert asked == [("owner/name", options)]


# The server's way

# Common and odd ones, smaller and larger than the target, and with no common divisor. The tallest, of
# telephones held upright, are resized down before across by Pillow 13.
SIZES = [
    (240, 320),
    (720, 1280),
    (480, 854),
    (1080, 608),
    (2400, 1080),
    (1000, 400),
    (144, 176),
    (61, 67),
    (224, 398),
    (256, 456),
    (577, 1023),
    (300, 224),
    (90, 1000),
]


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"size": 224},
        {"size": (250, 301), "crop_size": (97, 200)},
        {"resample": 3},
        {"resample": 1, "size": 128},
        {"do_resize": False},
        {"do_center_crop": False},
    ],
    ids=str,
)
def test_frames_for_the_server_are_the_8_bit_frames_of_pillow(height, width, parameters):
    frames = noise(height, width, frames=1)
    processor = VivitImageProcessor(**parameters)

    pixels = processor.resize_and_crop(frames)

    oracle = Published(**parameters, **EIGHT_BIT)
    expected = oracle(list(frames), return_tensors="np")["pixel_values"][0]
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.shape == (1, 3, *processor.resize_crop.output_size(height, width))
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("height, width", [(720, 1280), (2400, 1080), (480, 854)])
def test_no_more_is_resized_than_the_crop_needs(height, width, monkeypatch):
    frames = noise(height, width, frames=1)
    processor = VivitImageProcessor()
    processor.resize_and_crop(frames)  # what is tried once for a pair of sizes is behind us
    resize, areas = Image.Image.resize, []

    def spy(picture, *args, **options):
        areas.append(picture.width * picture.height)
        return resize(picture, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    processor.resize_and_crop(frames)

    assert max(areas) < 0.7 * width * height


@pytest.mark.parametrize("resample", resize.FILTER_REACH, ids=lambda resample: resample.name)
def test_a_part_weighs_its_pixels_as_the_whole_does(resample):
    draw = random.Random(0)
    for _ in range(60):
        source, target = draw.randint(20, 2000), draw.randint(10, 500)
        kept = resize._middle(target, draw.randint(1, 300))
        axis = resize._axis(source, target, kept, resize.FILTER_REACH[resample])
        # Combs so wide that a filter sees one tooth at a time, at every place. In Pillow's 32-bit mode a
        # tooth of 2 ** 22 comes out as the weight, of 22 bits, that its 8-bit mode computes with.
        spacing = 2 * int(4 + 3 * max(1, source / target))
        combs = (np.arange(source) % spacing == np.arange(spacing)[:, None]).astype(np.int32) << 22

        whole = np.asarray(Image.fromarray(combs).resize((target, spacing), resample))
        part = resize._resize_across(Image.fromarray(combs[:, axis.read].copy()), axis, resample)

        np.testing.assert_array_equal(np.asarray(part), whole[:, kept.start : kept.stop])


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"do_normalize": False},
        {"offset": False, "rescale_factor": 1 / 255},
        EIGHT_BIT,
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "rescale_factor": 1 / 255, "offset": False},
        {"do_rescale": False, "offset": False, "image_mean": 127.5, "image_std": 127.5},
    ],
    ids=str,
)
def test_the_affine_map_rescales_and_normalises_as_the_processor_does(parameters):
    levels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 16, 16, 3)
    processor = VivitImageProcessor(do_resize=False, do_center_crop=False, **parameters)

    scale, bias = processor.scale_and_bias()

    assert (scale.dtype, bias.dtype, scale.shape, bias.shape) == (np.float32, np.float32, (3,), (3,))
    expected = processor(levels, data_format=LAST, return_tensors="np").pixel_values[0]
    np.testing.assert_allclose(levels * scale + bias, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "frames",
    [
        noise(9, 9)[0],
        noise(9, 9).astype(np.float32),
        noise(9, 9, channels=4),
        list(noise(9, 9)),
    ],
    ids=["one frame", "floats", "four channels", "a list"],
)
def test_the_server_is_told_what_frames_must_be(frames):
    with pytest.raises(TypeError, match=r"frames must be a uint8 array \(T, H, W, 3\), got"):
        VivitImageProcessor().resize_and_crop(frames)


# The fast way


def photograph(height, width):
    """uint8 (1, height, width, 3): smooth, with edges and grain."""
    small = noise(height // 12 + 2, width // 12 + 2, frames=1)[0]
    large = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    grain = np.random.default_rng(1).normal(0, 4, large.shape)
    return np.clip(large + grain, 0, 255).astype(np.uint8)[None]


@pytest.mark.parametrize("height, width", [(480, 640), (480, 854), (720, 1280), (1080, 1920), (2400, 1080)])
def test_the_fast_way_differs_by_one_and_seldom(height, width):
    frames = photograph(height, width)
    exact = ResizeCrop(resize_to=224, resample=2, crop_to=(224, 224))

    fast = replace(exact, is_fast=True).resize_and_crop(frames)

    difference = np.abs(fast.astype(int) - exact.resize_and_crop(frames))
    assert difference.max() <= 1
    assert 0 < (difference > 0).mean() < 2e-3


def test_the_fast_way_takes_pictures_as_a_decoder_hands_them_out(recwarn):
    rows = photograph(90, 160)[0]
    padded = np.frombuffer(np.pad(rows, ((0, 0), (0, 7), (0, 0))).tobytes(), np.uint8).reshape(90, 167, 3)
    fast = ResizeCrop(resize_to=64, resample=2, crop_to=(64, 64), is_fast=True)
    for turned in (lambda rows: rows, lambda rows: rows[::-1, ::-1], lambda rows: rows.transpose(1, 0, 2)):
        expected = fast.resize_and_crop_frame(turned(rows).copy())
        np.testing.assert_array_equal(fast.resize_and_crop_frame(turned(padded[:, :160])), expected)
    assert not recwarn.list


@pytest.mark.parametrize(
    "resample, height",
    [
        (Image.Resampling.BICUBIC, 480),
        (Image.Resampling.NEAREST, 480),
        (Image.Resampling.BILINEAR, 127),
    ],
    ids=["a filter that torch lacks", "another", "hardly smaller"],
)
def test_what_torch_does_no_better_is_exact(resample, height):
    frames = photograph(height, 800)
    exact = ResizeCrop(resize_to=64, resample=resample, crop_to=(64, 64))
    np.testing.assert_array_equal(replace(exact, is_fast=True).resize_and_crop(frames), exact.resize_and_crop(frames))
