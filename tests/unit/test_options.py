"""A deployment's options: their defaults, and clear refusals."""

import dataclasses

import pytest

from handler.options import HandlerOptions, OptionError


def test_no_settings_give_the_defaults():
    assert HandlerOptions.from_dict({}) == HandlerOptions()


def test_settings_are_obeyed():
    options = HandlerOptions.from_dict({"dtype": "bfloat16", "normalization": "paper", "top_k": 3})
    assert (options.dtype, options.normalization, options.top_k) == ("bfloat16", "paper", 3)


def test_an_unknown_option_is_answered_with_the_nearest():
    with pytest.raises(OptionError, match="unknown option 'topk': did you mean 'top_k'"):
        HandlerOptions.from_dict({"topk": 3})


def test_an_option_unlike_any_is_answered_with_all():
    with pytest.raises(OptionError) as caught:
        HandlerOptions.from_dict({"colour": "blue"})
    assert all(field.name in str(caught.value) for field in dataclasses.fields(HandlerOptions))


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "fp16"},
        {"dtype": None},
        {"dtype": ["float16"]},
        {"attn_implementation": "flash"},
        {"normalization": True},
        {"top_k": 0},
        {"top_k": "5"},
        {"top_k": True},
        {"micro_batch_clips": -1},
        {"micro_batch_clips": 2.5},
        {"sampling": "random"},
        {"resize": "fastest"},
        {"max_upload_bytes": 0},
        {"max_video_s": float("nan")},
        {"max_video_s": 0},
        {"max_frame_pixels": "4K"},
        {"max_frames": -5},
        {"max_decode_s": 1e9},
    ],
)
def test_a_bad_value_is_refused_with_field_and_value(settings):
    ((name, value),) = settings.items()
    with pytest.raises(OptionError) as caught:
        HandlerOptions.from_dict(settings)
    assert name in str(caught.value) and repr(value) in str(caught.value)


@pytest.mark.parametrize("settings", [{"compile": 1}, {"compile": "yes"}, {"inference_threads": -1}])
def test_a_bad_choice_of_how_to_compute_is_refused(settings):
    with pytest.raises(OptionError, match=f"{next(iter(settings))} must be"):
        HandlerOptions.from_dict(settings)


def test_eight_bits_are_not_compiled():
    assert HandlerOptions.from_dict({"compile": True, "dtype": "float16"}).compile
    with pytest.raises(OptionError, match="compile must be false where dtype is int8"):
        HandlerOptions.from_dict({"compile": True, "dtype": "int8"})


def test_options_cannot_change_once_made():
    with pytest.raises(dataclasses.FrozenInstanceError):
        HandlerOptions().top_k = 3
