"""HandlerOptions: defaults and error messages."""

import dataclasses

import pytest

from handler.options import HandlerOptions, OptionError


def test_settings_replace_defaults():
    options = HandlerOptions.from_dict({"dtype": "bfloat16", "normalization": "paper", "top_k": 3})

    assert options == HandlerOptions(dtype="bfloat16", normalization="paper", top_k=3)
    assert (options.dtype, options.normalization, options.top_k) == ("bfloat16", "paper", 3)
    assert HandlerOptions.from_dict({}) == HandlerOptions()


def test_unknown_option_suggests_nearest():
    with pytest.raises(OptionError, match=r"unknown option 'topk': did you mean 'top_k'\?"):
        HandlerOptions.from_dict({"topk": 3})


@pytest.mark.parametrize("name", ["color", 7])
def test_unknown_option_lists_all(name):
    with pytest.raises(OptionError, match="known are ") as caught:
        HandlerOptions.from_dict({name: "blue"})
    assert all(field.name in str(caught.value) for field in dataclasses.fields(HandlerOptions))


@pytest.mark.parametrize(
    "name, value, rule",
    [
        ("dtype", "fp16", "one of auto, float32, float16, bfloat16, int8"),
        ("dtype", ["float16"], "one of auto"),
        ("attn_implementation", "flash", "one of sdpa, eager"),
        ("normalization", True, "one of checkpoint, paper"),
        ("sampling", "random", "one of uniform, segment, keyframes"),
        ("resize", None, "one of exact, fast"),
        ("compile", 1, "true or false"),
        ("top_k", 0, "an integer >= 1 and <= 1000000"),
        ("top_k", "5", "an integer"),
        ("top_k", True, "an integer"),
        ("micro_batch_clips", 2.5, "an integer"),
        ("inference_threads", -1, "an integer >= 0"),
        ("max_upload_bytes", 2**31, "an integer >= 1 and <= 2147483647"),
        ("max_video_s", float("nan"), "a number > 0,"),
        ("max_video_s", 0, "a number > 0,"),
        ("max_video_s", "60", "a number > 0,"),
        ("max_decode_gigapixels", 0, "a number > 0,"),
        ("max_decode_s", 3601, "a number > 0 and <= 3600,"),
        ("max_decode_s", True, "a number"),
        ("max_batch_decode_s", 0, "a number > 0 and <= 3600,"),
    ],
)
def test_invalid_value(name, value, rule):
    with pytest.raises(OptionError) as caught:
        HandlerOptions.from_dict({name: value})
    assert f"{name} must be {rule}" in str(caught.value)
    assert str(caught.value).endswith(f"got {value!r}")


def test_limits_are_inclusive():
    HandlerOptions(inference_threads=0, top_k=10**6, max_upload_bytes=2**31 - 1, max_decode_s=3600)
    HandlerOptions(max_video_s=float("inf"))


def test_int8_cannot_be_compiled():
    assert HandlerOptions(compile=True, dtype="float16").compile
    with pytest.raises(OptionError, match="compile must be false if dtype is int8"):
        HandlerOptions(compile=True, dtype="int8")


def test_even_is_former_name_of_uniform():
    assert HandlerOptions(sampling="even") == HandlerOptions(sampling="uniform")


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        HandlerOptions().top_k = 3
