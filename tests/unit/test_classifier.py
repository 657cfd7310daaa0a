"""The whole pipeline without a server, against transformers."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter

from handler import (
    Classification,
    VideoClassifier,
    VivitConfig,
    VivitForVideoClassification,
    VivitImageProcessor,
    kernels,
)
from handler.inference import DeviceError, choose_dtype, compiled_sizes, is_out_of_memory
from handler.kernels import cpuinfo, onednn
from handler.options import HandlerOptions, OptionError
from handler.video import EmptyPartError, decode_frames
from tests.support.clips import numbered_frames, varied_clips, write_clip
from tests.support.oracle import assert_scores_match_transformers


@pytest.fixture(scope="module")
def classifier(checkpoint):
    return VideoClassifier.from_pretrained(checkpoint)


@pytest.fixture
def own_classifier(checkpoint):
    """A classifier that the test may change."""
    return VideoClassifier.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def clip_paths(tmp_path_factory):
    return varied_clips(tmp_path_factory.mktemp("clips"))


def random_clips(*views: int) -> list[np.ndarray]:
    """Clips for the checkpoint fixture: uint8 (V, T, C, h, w) for each V in `views`."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (count, 8, 3, 32, 32), np.uint8) for count in views]


BLACK = np.zeros((1, 8, 3, 32, 32), np.uint8)
WHITE = np.full_like(BLACK, 255)


def batches_of(classifier, *, error=lambda pixels: None) -> list[int]:
    """Records the sizes of all micro-batches, and raises what `error` returns for one (B, T, C, h, w)."""
    sizes = []

    def check(model, inputs):
        sizes.append(len(inputs[0]))
        if raised := error(inputs[0]):
            raise raised

    classifier.model.register_forward_pre_hook(check)
    return sizes


def random_classifier(*, image_size, tubelet_size, width, options=HandlerOptions()) -> VideoClassifier:
    """A classifier of 16 frames with random weights."""
    config = VivitConfig(
        image_size=image_size,
        num_frames=16,
        tubelet_size=tubelet_size,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=3 * width,
    )
    crop_size = {"height": image_size, "width": image_size}
    processor = VivitImageProcessor(size={"shortest_edge": image_size}, crop_size=crop_size)
    return VideoClassifier(VivitForVideoClassification(config).eval(), processor, options=options)


def out_of_memory_above_two(pixels):
    return torch.cuda.OutOfMemoryError("CUDA out of memory") if len(pixels) > 2 else None


# Predictions


def test_scores_match_transformers_for_same_frames(classifier, checkpoint, clip_paths):
    for path in clip_paths:
        result = classifier.classify(path, top_k=9)
        assert_scores_match_transformers(
            dict(result.predictions),
            checkpoint=checkpoint,
            clip=path,
            times_s=result.clip.times_s,
            fps=result.clip.info.fps,
        )


def test_twelve_views_are_averaged(classifier, checkpoint, clip_paths):
    processor = transformers.VivitImageProcessor.from_pretrained(checkpoint)
    model = transformers.VivitForVideoClassification.from_pretrained(checkpoint)
    path = clip_paths[3]  # 40 frames of 96x72
    result = classifier.classify(path, top_k=9, views="4x3", stride_frames=2, sampling="dense")
    logits = []
    for offset in (0, 8, 16, 24):
        frames = decode_frames(path, [offset + 2 * step for step in range(8)])
        resized = processor(list(frames), return_tensors="pt", do_center_crop=False).pixel_values  # (1, 8, 3, 40, 53)
        for left in (0, 11, 21):
            with torch.no_grad():
                logits.append(model(pixel_values=resized[..., 4:36, left : left + 32]).logits[0])
    assert len(result.views) == 12
    for view, row, (offset, left) in zip(result.views, logits, itertools.product((0, 8, 16, 24), (0, 11, 21))):
        assert view.frame_indices.tolist() == list(range(offset, offset + 16, 2)) and view.crop == (4, left, 32, 32)
        scores = torch.tensor([score for _, score in view.predictions])
        torch.testing.assert_close(scores, row.softmax(-1).sort(descending=True).values, atol=1e-5, rtol=0)
    expected = torch.stack(logits).mean(0).softmax(-1)
    found = dict(result.predictions)
    ordered = torch.tensor([found[label] for _, label in sorted(model.config.id2label.items())])
    torch.testing.assert_close(ordered, expected, atol=1e-5, rtol=0)
    best = [int(row.argmax()) for row in logits]
    assert result.agreement == pytest.approx(best.count(int(expected.argmax())) / 12)


def test_embeddings_are_features_after_last_layernorm(classifier, checkpoint, clip_paths):
    processor = transformers.VivitImageProcessor.from_pretrained(checkpoint)
    model = transformers.VivitForVideoClassification.from_pretrained(checkpoint)
    path = clip_paths[0]
    clip = classifier.load_clip(path)
    frames = decode_frames(path, clip.frame_indices)
    with torch.no_grad():
        states = model.vivit(**processor(list(frames), return_tensors="pt")).last_hidden_state[0]  # (N, D)
    for pooling, expected in (("cls", states[0]), ("mean", states[1:].mean(0))):
        found = classifier.embed(path, pooling=pooling)
        torch.testing.assert_close(torch.from_numpy(found.vector), expected, atol=1e-5, rtol=1e-4)
        unit = classifier.embed(path, pooling=pooling, normalize=True).vector
        np.testing.assert_allclose(unit, found.vector / np.linalg.norm(found.vector), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(classifier.embed(path).vector, classifier.embed(path, pooling="cls").vector)
    halves = [classifier.embed(path, start_s=start_s, end_s=start_s + 0.6).vector for start_s in (0, 0.6)]
    np.testing.assert_allclose(classifier.embed(path, views="2x1").vector, np.mean(halves, 0), rtol=1e-4, atol=1e-5)


def test_embedding_of_model_without_cls_token_is_mean(clip_paths):
    config = VivitConfig(
        image_size=32,
        num_frames=8,
        tubelet_size=[2, 8, 8],
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        attention_type="factorised_self_attention",
    )
    processor = VivitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    classifier = VideoClassifier(VivitForVideoClassification(config).eval(), processor)
    found = classifier.embed(clip_paths[0])
    np.testing.assert_array_equal(found.vector, classifier.embed(clip_paths[0], pooling="mean").vector)
    assert (found.pooling, found.weights_sha256) == ("mean", None)
    with pytest.raises(ValueError, match="without a CLS token"):
        classifier.embed(clip_paths[0], pooling="cls")


def test_part_of_a_video_equals_a_video_of_its_frames(classifier, clip_paths, tmp_path):
    frames = numbered_frames(40)
    whole = write_clip(tmp_path / "whole.mkv", frames, codec="ffv1")
    part = write_clip(tmp_path / "part.mkv", frames[10:30], codec="ffv1")
    for views in ({}, {"views": "2x3", "sampling": "dense", "stride_frames": 1}):
        found = classifier.classify(whole, start_s=0.4, end_s=1.2, **views)
        expected = classifier.classify(part, **views)
        assert found.predictions == expected.predictions
        assert [view.frame_indices.tolist() for view in found.views] == [
            (view.frame_indices + 10).tolist() for view in expected.views
        ]
    with pytest.raises(EmptyPartError, match="expected a frame from 7 s to 8 s"):
        classifier.classify(whole, start_s=7, end_s=8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"views": "5x3"}, "at most 12 views, got 5x3 = 15"),
        ({"views": "4"}, "views must be clips in time x crops"),
        ({"views": "0x3"}, "views must be clips in time x crops"),
        ({"sampling": "random"}, "sampling must be one of"),
        ({"stride_frames": 2}, "stride_frames must be omitted for sampling uniform"),
        ({"stride_frames": 0, "sampling": "dense"}, "stride_frames must be an integer >= 1"),
        ({"start_s": -1}, "start_s must be a number >= 0"),
        ({"start_s": 3, "end_s": 3}, "end_s must be a number > 3"),
    ],
    ids=str,
)
def test_invalid_views_rejected(classifier, arguments, message):
    with pytest.raises(ValueError, match=message):
        classifier.classify(b"", **arguments)


def test_predictions_sorted_and_limited(classifier, clip_paths):
    everything = classifier.classify(clip_paths[0], top_k=9).predictions
    assert everything == sorted(everything, key=lambda prediction: -prediction[1])
    assert classifier.classify(clip_paths[0].read_bytes(), top_k=4).predictions == everything[:4]
    assert classifier.classify(clip_paths[0]).predictions == everything[: HandlerOptions().top_k]


@pytest.mark.parametrize("top_k", [0, -1, 10])
def test_top_k_out_of_range_rejected(classifier, top_k):
    with pytest.raises(ValueError, match=f"from 1 to 9, got {top_k}"):
        classifier.classify(b"", top_k=top_k)


def test_scores_of_one_and_two_labels(classifier):
    pair = torch.tensor([1.0, 3.0])
    scores = [score for _, score in classifier.top_k(pair, k=2).predictions]
    assert scores == pytest.approx(sorted(pair.softmax(0).tolist(), reverse=True))
    assert classifier.top_k(torch.tensor([2.5]), k=1).predictions[0][1] == 2.5  # a single label: the value itself


def test_multi_label_scores_are_sigmoids(checkpoint):
    config = dataclasses.replace(VivitConfig.from_pretrained(checkpoint), problem_type="multi_label_classification")
    model = VivitForVideoClassification.from_pretrained(checkpoint, config=config)
    classifier = VideoClassifier(model, VivitImageProcessor.from_pretrained(checkpoint))
    assert classifier.top_k(torch.arange(9.0), k=2).predictions == [
        ("LABEL_8", pytest.approx(1 / (1 + np.exp(-8)))),
        ("LABEL_7", pytest.approx(1 / (1 + np.exp(-7)))),
    ]


def test_regression_scores_are_values(own_classifier):
    own_classifier.config = dataclasses.replace(own_classifier.config, problem_type="regression")
    assert own_classifier.top_k(torch.arange(9.0) - 3.5, k=2).predictions == [("LABEL_8", 4.5), ("LABEL_7", 3.5)]


def test_predictions_of_several_label_heads(own_classifier, clip_paths):
    labels = [*("onion", "pan", "cut", "cup", "door"), *("cut", "wash", "open", "take")]
    config = dataclasses.replace(own_classifier.config, label_heads={"noun": 5, "verb": 4}).with_labels(labels)
    own_classifier.config = config
    result = own_classifier.classify(clip_paths[0], top_k=5)
    logits = own_classifier.logits([result.clip.pixels])[0].double().numpy()
    scores = [np.exp(part) / np.exp(part).sum() for part in (logits[:5], logits[5:])]
    products = np.outer(*scores)
    for (label, score), of_heads, index in zip(result.predictions, result.labels, np.argsort(-products, axis=None)):
        noun, verb = np.unravel_index(index, products.shape)
        assert of_heads == {"noun": labels[noun], "verb": labels[5 + verb]}
        assert (label, score) == (f"{labels[noun]} + {labels[5 + verb]}", pytest.approx(products[noun, verb], rel=1e-5))
    assert len(result.predictions) == len(result.heads["noun"]) == 5
    for head, names, expected in zip(("noun", "verb"), (labels[:5], labels[5:]), scores):
        order = np.argsort(-expected)
        assert result.heads[head] == [(names[index], pytest.approx(expected[index], rel=1e-5)) for index in order]
    with pytest.raises(ValueError, match="from 1 to 5, got 6"):
        own_classifier.classify(clip_paths[0], top_k=6)


def test_repr_of_classification_has_no_arrays(classifier, clip_paths):
    result = classifier.classify(clip_paths[0], top_k=1)
    (label, score), text = result.predictions[0], repr(result)
    assert isinstance(result, Classification) and len(text) < 200
    assert label in text and f"{score:.4f}" in text
    assert "8 frames of 32x32" in text and "1.2 s of h264 176x144" in text


# Logits


def test_logits_average_views_across_micro_batches(checkpoint):
    clips = random_clips(1, 3, 1, 2)
    model = transformers.VivitForVideoClassification.from_pretrained(checkpoint)
    scale, bias = VivitImageProcessor.from_pretrained(checkpoint).scale_and_bias()
    pixels = [torch.from_numpy(clip * scale[:, None, None] + bias[:, None, None]) for clip in clips]
    with torch.no_grad():
        expected = torch.stack([model(views).logits.mean(0) for views in pixels])
    for micro_batch_clips in (1, 2, 8):
        options = HandlerOptions(micro_batch_clips=micro_batch_clips)
        classifier = VideoClassifier.from_pretrained(checkpoint, options=options)
        sizes = batches_of(classifier)
        torch.testing.assert_close(classifier.logits(clips), expected, atol=1e-5, rtol=0)
        assert sum(sizes) == 7 and max(sizes) == min(7, micro_batch_clips)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_gpu_gets_clips_from_page_locked_memory(own_classifier, monkeypatch, device):
    clips, copies = random_clips(1, 2), []

    class Staging(torch.Tensor):
        def to(self, device, *, non_blocking):
            copies.append((device.type, non_blocking))
            return self.as_subclass(torch.Tensor)

    def empty(*shape, pin_memory, **options):
        copies.append(pin_memory)
        return empty_without_gpu(*shape, **options).as_subclass(Staging)

    expected = own_classifier.logits(clips)
    empty_without_gpu = torch.empty
    monkeypatch.setattr(torch, "empty", empty)
    own_classifier.runner.device = torch.device(device)
    torch.testing.assert_close(own_classifier.logits(clips), expected)
    assert copies == [device == "cuda", (device, device == "cuda")]


def test_no_clips_give_no_logits(classifier):
    assert classifier.logits([]).shape == (0, 9)


def test_paper_normalization_range(checkpoint):
    classifier = VideoClassifier.from_pretrained(checkpoint, options=HandlerOptions(normalization="paper"))
    (clip,) = random_clips(1)
    with torch.no_grad():
        expected = classifier.model(torch.from_numpy(clip).float() / 127.5 - 1).logits
    torch.testing.assert_close(classifier.logits([clip]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_reduced_precision_close_to_float32(classifier, checkpoint, dtype):
    reduced = VideoClassifier.from_pretrained(checkpoint, options=HandlerOptions(dtype=dtype))
    clips = random_clips(1, 2)
    logits = reduced.logits(clips)
    assert reduced.dtype == getattr(torch, dtype) and logits.dtype == torch.float32
    assert 0 < (logits - classifier.logits(clips)).abs().max() < 0.2


# Errors


def test_out_of_memory_splits_micro_batch_temporarily(own_classifier, monkeypatch):
    clips, now_s = random_clips(*[1] * 8), [1000.0]
    expected = own_classifier.logits(clips)
    sizes = batches_of(own_classifier, error=out_of_memory_above_two)
    monkeypatch.setattr("handler.inference.time.monotonic", lambda: now_s[0])
    torch.testing.assert_close(own_classifier.logits(clips), expected, atol=1e-5, rtol=0)
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    sizes.clear()
    own_classifier.logits(clips)
    assert sizes == [2, 2, 2, 2]
    now_s[0] += 61
    sizes.clear()
    own_classifier.logits(clips[:4])
    assert sizes == [4, 2, 2]


def test_error_limited_to_its_clip(own_classifier):
    clips = [*random_clips(2), np.concatenate([BLACK, WHITE]), *random_clips(1)]
    expected = own_classifier.logits(clips)

    def fail_on_white(pixels):
        is_white = pixels.flatten(1).min(1).values == pixels.max()
        return RuntimeError("white") if is_white.any() else None

    batches_of(own_classifier, error=fail_on_white)
    first, second, third = own_classifier.logits_or_errors(clips)
    assert str(second) == "white"
    torch.testing.assert_close(torch.stack([first, third]), expected[[0, 2]], atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError, match="white"):
        own_classifier.logits(clips)


def test_nonfinite_logits_are_error_of_their_clip(own_classifier):
    def divide_by_zero_for_black(model, inputs, outputs):
        brightness = inputs[0].flatten(1).amax(1) - inputs[0].min()  # (B,)
        return dataclasses.replace(outputs, logits=outputs.logits / brightness[:, None])

    own_classifier.model.register_forward_hook(divide_by_zero_for_black)
    black, white = own_classifier.logits_or_errors([BLACK, WHITE])
    assert isinstance(black, FloatingPointError) and white.isfinite().all()


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("odd"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal address"), False),
    ],
)
def test_out_of_memory_distinguished_from_other_errors(error, expected):
    assert is_out_of_memory(error) == expected


def test_host_allocation_failure_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("is_broken", [True, False])
def test_broken_gpu_raises_device_error_at_once(own_classifier, monkeypatch, is_broken):
    attempts = []

    def synchronize(device):
        attempts.append(device)
        if is_broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    own_classifier.runner.device = torch.device("cuda", 1)  # which fails here, without CUDA
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    if is_broken:
        with pytest.raises(DeviceError, match="cuda:1 no longer works: "):
            own_classifier.logits_or_errors([BLACK, WHITE])
    else:
        errors = own_classifier.logits_or_errors([BLACK, WHITE])
        assert all(isinstance(error, Exception) for error in errors)
    assert len(attempts) == (1 if is_broken else 3)


# Options and compatibility


@pytest.mark.parametrize(
    "name, device, expected",
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.float16),
        ("auto", "mps", torch.float32),
        ("float32", "cuda", torch.float32),
        ("int8", "cpu", torch.int8),
    ],
)
def test_dtype_auto_depends_on_device(classifier, monkeypatch, name, device, expected):
    monkeypatch.setattr(cpuinfo, "CPUINFO_WORDS", frozenset())
    options = HandlerOptions(dtype=name)
    scale, bias = classifier.image_processor.scale_and_bias()
    choice = choose_dtype(classifier.model, options=options, device=torch.device(device), scale=scale, bias=bias)
    assert choice.dtype is expected and ("auto" in choice.reason) == (name == "auto")


def test_int8_rejected_on_gpu(checkpoint):
    with pytest.raises(OptionError, match="int8 requires a CPU, got device cuda"):
        VideoClassifier.from_pretrained(checkpoint, options=HandlerOptions(dtype="int8"), device="cuda")


@pytest.mark.parametrize("device, expected", [("cpu", [1]), ("cuda", [1, 3])])
def test_warm_up_sizes(checkpoint, monkeypatch, device, expected):
    classifier = VideoClassifier.from_pretrained(checkpoint, options=HandlerOptions(micro_batch_clips=3))
    classifier.runner.device = torch.device(device)
    sizes = []

    def record_size(clips):
        sizes.append(len(np.stack(clips)))
        return []

    monkeypatch.setattr(classifier.runner, "view_outputs_or_errors", record_size)
    classifier.warm_up()
    assert sorted(sizes) == expected


@pytest.mark.skipif(not onednn.works(torch.bfloat16), reason="oneDNN multiplies no bfloat16 on this processor")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_code_generated_after_warm_up(monkeypatch, capfd, dtype):
    monkeypatch.setattr(onednn, "is_faster", lambda _: True)
    monkeypatch.setattr(kernels, "is_onednn_faster", lambda _: True)
    # 257 tokens: micro-batches of 1 to 4 clips, with one chunk, or several for each thread. Other tests have no such
    # layers, for which oneDNN would have code already.
    classifier = random_classifier(
        image_size=128, tubelet_size=(8, 8, 16), width=56, options=HandlerOptions(dtype=dtype)
    )
    clip = np.zeros((1, 16, 3, 128, 128), np.uint8)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
        classifier.warm_up()
        in_warm_up = capfd.readouterr().out.count("create:cache_miss")
        for clips in (1, 2, 3, 4):
            classifier.logits([clip] * clips)
        assert capfd.readouterr().out.count("create:cache_miss") == 0 < in_warm_up


@pytest.mark.parametrize("image_size, expected", [(32, 5), (64, 2), (128, 1)])
def test_micro_batches_on_cpu_limited_by_tokens(image_size, expected):
    """8 * (image_size / 8)^2 + 1 tokens each, and about 1024 together."""
    classifier = random_classifier(image_size=image_size, tubelet_size=(2, 8, 8), width=8)
    sizes = batches_of(classifier)
    classifier.logits([np.zeros((5, 16, 3, image_size, image_size), np.uint8)])
    assert sum(sizes) == 5 and max(sizes) == expected


def test_everything_compiled_in_warm_up(classifier, checkpoint, monkeypatch):
    graphs, compile_function = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_function(function, backend=graphs, **how))
    options = HandlerOptions(compile=True, micro_batch_clips=3)
    compiled = VideoClassifier.from_pretrained(checkpoint, options=options)
    compiled.warm_up()
    assert graphs.frame_count == len(compiled_sizes(3))
    clips = random_clips(1, 1, 1, 1)
    for count in (1, 2, 4):
        torch.testing.assert_close(compiled.logits(clips[:count]), classifier.logits(clips[:count]), atol=1e-5, rtol=0)
    assert graphs.frame_count == len(compiled_sizes(3))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "largest, expected",
    [(1, [1]), (2, [1, 2]), (7, [1, 3, 7]), (8, [1, 2, 4, 8]), (1000, [7, 15, 31, 62, 125, 250, 500, 1000])],
)
def test_compiled_sizes_halve(largest, expected):
    assert compiled_sizes(largest) == expected


@pytest.mark.parametrize(
    "processor, message",
    [
        ({}, r"takes frames of \(32, 32\).*makes \(224, 224\)"),
        ({"size": {"shortest_edge": 32}, "do_center_crop": False}, r"makes \(32, 56\) or \(56, 32\)"),
    ],
)
def test_processor_of_other_size_rejected(classifier, processor, message):
    with pytest.raises(ValueError, match=message):
        VideoClassifier(classifier.model, VivitImageProcessor(**processor))


def test_model_without_three_channels_rejected(classifier):
    config = dataclasses.replace(classifier.config, num_channels=1)
    with pytest.raises(ValueError, match="expected a model with num_channels 3, .* got num_channels 1"):
        VideoClassifier(VivitForVideoClassification(config), classifier.image_processor)


def test_useful_threads_of_small_and_large_models(classifier):
    assert classifier.useful_threads == 1
    config = VivitConfig(num_hidden_layers=2, hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    model = VivitForVideoClassification(config)
    for dtype in ("float32", "int8"):
        large = VideoClassifier(model, VivitImageProcessor(), options=HandlerOptions(dtype=dtype))
        assert large.useful_threads == 8
