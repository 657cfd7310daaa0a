"""The whole pipeline without a server, against transformers and against itself."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter

from handler import VivitConfig, VivitForVideoClassification, VivitImageProcessor
from handler.classifier import DeviceError, VideoClassifier, compiled_sizes, is_out_of_memory, resolve_dtype
from handler.options import HandlerOptions, OptionError
from handler.video import decode_frames
from tests.support.clips import numbered_frames, write_clip


@pytest.fixture(scope="module")
def classifier(checkpoint):
    return VideoClassifier.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def clip_paths(tmp_path_factory):
    """Videos of different sizes, containers and lengths."""
    folder = tmp_path_factory.mktemp("clips")
    return [
        write_clip(folder / "a.mp4", numbered_frames(30, seed=1)),
        write_clip(folder / "b.webm", numbered_frames(21, height=90, width=64, seed=2), codec="libvpx"),
        write_clip(folder / "c.mkv", numbered_frames(12, height=48, width=48, seed=3)),
    ]


def transformers_logits(checkpoint, frames):
    """What transformers' processor and model make of frames (T, H, W, 3)."""
    processor = transformers.VivitImageProcessor.from_pretrained(checkpoint)
    model = transformers.VivitForVideoClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        return model(**processor(list(frames), return_tensors="pt")).logits[0]


def test_scores_are_those_of_transformers_for_the_same_frames(classifier, checkpoint, clip_paths):
    for path in clip_paths:
        result = classifier.classify(path, top_k=9)
        indices = np.rint(result.clip.times_s * result.clip.info.fps).astype(int)
        expected = transformers_logits(checkpoint, decode_frames(path, indices)).softmax(-1)
        scores = dict(result.predictions)
        got = torch.tensor([scores[classifier.config.id2label[index]] for index in range(9)])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_predictions_come_best_first_and_as_many_as_asked(classifier, clip_paths):
    predictions = classifier.classify(clip_paths[0], top_k=4).predictions
    scores = [score for _, score in predictions]
    assert len(predictions) == 4
    assert scores == sorted(scores, reverse=True)


def test_bytes_and_a_path_give_the_same(classifier, clip_paths):
    path = clip_paths[0]
    assert classifier.classify(path).predictions == classifier.classify(path.read_bytes()).predictions


@pytest.mark.parametrize("micro_batch_clips", [1, 2, 3, 8])
def test_a_clips_logits_do_not_depend_on_its_batch(checkpoint, clip_paths, micro_batch_clips):
    options = HandlerOptions(micro_batch_clips=micro_batch_clips)
    classifier = VideoClassifier.from_pretrained(checkpoint, options=options)
    clips = [classifier.load_clip(path).pixels for path in clip_paths]
    together = classifier.logits(clips)
    alone = torch.cat([classifier.logits([clip]) for clip in clips])
    assert together.shape == (3, 9)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_no_clips_give_no_logits(classifier):
    assert classifier.logits([]).shape == (0, 9)


def let_two_clips_fit(classifier, monkeypatch):
    """Has larger micro-batches run out of memory; returns the sizes of all, as they are tried."""
    sizes, forward = [], classifier._forward

    def forward_two_at_most(pixels):
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(pixels)

    monkeypatch.setattr(classifier, "_forward", forward_two_at_most)
    return sizes


def test_a_micro_batch_that_runs_out_of_memory_is_halved_until_it_fits(checkpoint, clip_paths, monkeypatch):
    classifier = VideoClassifier.from_pretrained(checkpoint)
    clips = [classifier.load_clip(clip_paths[index % 3]).pixels for index in range(7)]
    expected = classifier.logits(clips)
    sizes = let_two_clips_fit(classifier, monkeypatch)
    torch.testing.assert_close(classifier.logits(clips), expected, atol=1e-5, rtol=0)
    assert max(sizes) == 7


def test_after_want_of_memory_micro_batches_are_smaller_for_a_while(checkpoint, clip_paths, monkeypatch):
    classifier = VideoClassifier.from_pretrained(checkpoint)
    clips = [classifier.load_clip(clip_paths[0]).pixels] * 8
    now_s = [1000.0]
    sizes = let_two_clips_fit(classifier, monkeypatch)
    monkeypatch.setattr("handler.classifier.time.monotonic", lambda: now_s[0])
    classifier.logits(clips)
    assert sizes[:3] == [8, 4, 2]
    sizes.clear()
    classifier.logits(clips)
    assert sizes == [2, 2, 2, 2]
    now_s[0] += 61
    classifier.logits(clips[:4])
    assert sizes[4:6] == [4, 2]


def test_a_clip_that_fails_alone_is_an_error_in_its_own_place(checkpoint, clip_paths, monkeypatch):
    classifier = VideoClassifier.from_pretrained(checkpoint)
    clips = [classifier.load_clip(path).pixels for path in clip_paths]
    expected, forward = classifier.logits(clips), classifier._forward

    def fail_on_the_second(pixels):
        if any(np.array_equal(clip, clips[1]) for clip in pixels):
            raise RuntimeError("out of luck")
        return forward(pixels)

    monkeypatch.setattr(classifier, "_forward", fail_on_the_second)
    first, second, third = classifier.logits_or_errors(clips)
    assert str(second) == "out of luck"
    torch.testing.assert_close(torch.stack([first, third]), expected[[0, 2]], atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError, match="out of luck"):
        classifier.logits(clips)


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("odd"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal address"), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
    ],
)
def test_want_of_memory_is_told_from_other_faults(error, expected):
    assert is_out_of_memory(error) == expected


def test_what_torch_raises_for_want_of_host_memory_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


def test_sampled_times_spread_over_the_whole_video(classifier, clip_paths):
    clip = classifier.load_clip(clip_paths[0])  # 30 frames at 25 fps
    assert len(clip.times_s) == 8
    assert clip.times_s[0] < 1.2 / 8 and clip.times_s[-1] > 1.2 - 1.2 / 8
    assert np.ptp(np.diff(clip.times_s)) <= 0.04 + 1e-9


def test_a_short_video_repeats_frames_and_says_so(classifier, tmp_path):
    path = write_clip(tmp_path / "short.mp4", numbered_frames(3))
    clip = classifier.load_clip(path)
    assert clip.pixels.shape == (8, 3, 32, 32)
    assert any("3 frames and the model takes 8" in warning for warning in clip.warnings)


def test_a_long_enough_video_gives_no_warning(classifier, clip_paths):
    assert classifier.load_clip(clip_paths[0]).warnings == ()


def test_the_papers_normalisation_feeds_the_model_minus_one_to_one(checkpoint, clip_paths):
    paper = VideoClassifier.from_pretrained(checkpoint, options=HandlerOptions(normalization="paper"))
    clip = paper.load_clip(clip_paths[0])
    with torch.no_grad():
        expected = paper.model(torch.from_numpy(clip.pixels)[None].float() / 127.5 - 1).logits
    torch.testing.assert_close(paper.logits([clip.pixels]), expected, atol=1e-5, rtol=0)


def test_several_labels_at_once_are_scored_each_for_itself(checkpoint, clip_paths):
    config = dataclasses.replace(VivitConfig.from_pretrained(checkpoint), problem_type="multi_label_classification")
    model = VivitForVideoClassification.from_pretrained(checkpoint, config=config)
    classifier = VideoClassifier(model, VivitImageProcessor.from_pretrained(checkpoint))
    result = classifier.classify(clip_paths[0], top_k=9)
    logits = classifier.logits([result.clip.pixels])[0]
    assert [score for _, score in result.predictions] == logits.sigmoid().sort(descending=True).values.tolist()


def test_half_precision_stays_near_single(checkpoint, clip_paths):
    half = VideoClassifier.from_pretrained(checkpoint, options=HandlerOptions(dtype="bfloat16"))
    single = VideoClassifier.from_pretrained(checkpoint)
    assert half.model.dtype == torch.bfloat16
    clip = single.load_clip(clip_paths[0]).pixels
    logits = half.logits([clip])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, single.logits([clip]), atol=0.2, rtol=0)


def test_eight_bits_stay_near_single_precision(checkpoint, clip_paths):
    eight_bits = VideoClassifier.from_pretrained(checkpoint, options=HandlerOptions(dtype="int8"))
    single = VideoClassifier.from_pretrained(checkpoint)
    clips = [single.load_clip(path).pixels for path in clip_paths]
    difference = (eight_bits.logits(clips) - single.logits(clips)).abs().max()
    assert eight_bits.dtype == torch.int8
    assert 0 < difference < 0.2


def test_eight_bits_are_refused_where_they_are_not_for(checkpoint):
    with pytest.raises(OptionError, match="int8 is for CPUs, got the device cuda"):
        VideoClassifier.from_pretrained(checkpoint, options=HandlerOptions(dtype="int8"), device="cuda")


@pytest.mark.parametrize(
    "name, device, expected",
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.float16),
        ("auto", "mps", torch.float32),
        ("float32", "cuda", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
        ("int8", "cpu", torch.int8),
    ],
)
def test_auto_is_half_precision_on_cuda_only_and_names_are_obeyed(name, device, expected):
    assert resolve_dtype(name, torch.device(device)) == expected


@pytest.mark.parametrize("device, expected", [("cpu", [1]), ("cuda", [1, 3])])
def test_warming_up_runs_one_clip_and_on_a_gpu_the_largest_micro_batch(checkpoint, monkeypatch, device, expected):
    classifier = VideoClassifier.from_pretrained(checkpoint, options=HandlerOptions(micro_batch_clips=3))
    sizes = []
    monkeypatch.setattr(classifier, "_forward", lambda pixels: sizes.append(len(pixels)) or torch.zeros(len(pixels), 9))
    monkeypatch.setattr(classifier, "device", torch.device(device))
    classifier.warm_up()
    assert sorted(sizes) == expected


@pytest.fixture
def graphs(monkeypatch):
    """Compiles without a compiler; `frame_count` is how many graphs were made."""
    counter, compile_by = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_by(function, backend=counter, **how))
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("micro_batch_clips", [1, 3, 5])
def test_all_that_requests_need_is_compiled_before_the_first(checkpoint, clip_paths, graphs, micro_batch_clips):
    plain = VideoClassifier.from_pretrained(checkpoint)
    options = HandlerOptions(compile=True, micro_batch_clips=micro_batch_clips)
    compiled = VideoClassifier.from_pretrained(checkpoint, options=options)
    compiled.warm_up()
    assert graphs.frame_count == len(compiled_sizes(micro_batch_clips))
    clips = [plain.load_clip(clip_paths[index % 3]).pixels for index in range(7)]
    for count in range(1, 8):
        expected = plain.logits(clips[:count])
        torch.testing.assert_close(compiled.logits(clips[:count]), expected, atol=1e-5, rtol=0)
    assert graphs.frame_count == len(compiled_sizes(micro_batch_clips))


KEPT_GRAPHS = 8  # torch.compile's default for one function


@pytest.mark.parametrize("largest", [1, 2, 7, 8, 100, 1000])
def test_compiled_sizes_are_few_and_reach_the_largest_micro_batch(largest):
    sizes = compiled_sizes(largest)
    assert sizes == sorted(set(sizes)) and sizes[-1] == largest
    assert len(sizes) <= KEPT_GRAPHS
    assert all(larger <= 2 * smaller + 1 for smaller, larger in zip(sizes, sizes[1:]))
    assert sizes[0] == 1 or len(sizes) == KEPT_GRAPHS


def test_a_gpu_that_has_failed_for_good_is_not_tried_again(checkpoint, clip_paths, monkeypatch):
    classifier = VideoClassifier.from_pretrained(checkpoint)
    clips, attempts = [classifier.load_clip(path).pixels for path in clip_paths], []

    def fail(*_):
        attempts.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    classifier.device = torch.device("cuda", 1)
    monkeypatch.setattr(classifier, "_forward", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(DeviceError, match="cuda:1 has failed for good: CUDA error: an illegal memory access"):
        classifier.logits_or_errors(clips)
    assert len(attempts) == 2


def test_an_error_that_leaves_the_gpu_usable_is_halved_as_any_other(checkpoint, clip_paths, monkeypatch):
    classifier = VideoClassifier.from_pretrained(checkpoint)
    clips = [classifier.load_clip(path).pixels for path in clip_paths]

    def fail(_):
        raise RuntimeError("CUDA error: CUBLAS_STATUS")

    classifier.device = torch.device("cuda")
    monkeypatch.setattr(classifier, "_forward", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert [str(error) for error in classifier.logits_or_errors(clips)] == ["CUDA error: CUBLAS_STATUS"] * 3


def test_a_processor_that_does_not_fit_the_model_is_refused(checkpoint):
    model = VivitForVideoClassification.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"takes pictures of \(32, 32\).*makes \(224, 224\)"):
        VideoClassifier(model, VivitImageProcessor())


def test_a_processor_that_lets_the_video_decide_is_refused(checkpoint):
    model = VivitForVideoClassification.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=" or "):
        VideoClassifier(model, VivitImageProcessor(size={"shortest_edge": 32}, do_center_crop=False))


def test_logits_that_are_not_finite_are_an_error_of_their_clip_alone(classifier, monkeypatch):
    config = classifier.config
    shape = (config.num_frames, 3, config.image_height, config.image_width)
    clips = [np.full(shape, value, np.uint8) for value in (0, 9)]
    forward = classifier._forward
    monkeypatch.setattr(classifier, "_forward", lambda pixels: forward(pixels) / torch.tensor(pixels[:, 0, 0, 0, :1]))
    first, second = classifier.logits_or_errors(clips)
    assert isinstance(first, FloatingPointError) and second.isfinite().all()


def test_scores_of_a_regression_are_its_values(classifier, monkeypatch):
    monkeypatch.setattr(classifier, "config", dataclasses.replace(classifier.config, problem_type="regression"))
    values = torch.arange(classifier.config.num_labels) - 3.5
    assert [score for _, score in classifier.top_k(values, k=2)] == values.sort(descending=True).values[:2].tolist()


@pytest.mark.parametrize("top_k", [0, -1, 1000])
def test_a_top_k_out_of_range_is_refused(classifier, top_k):
    with pytest.raises(ValueError, match=f"from 1 to {classifier.config.num_labels}, got {top_k}"):
        classifier.classify(b"", top_k=top_k)


def test_a_model_of_other_than_three_channels_is_refused(classifier):
    config = dataclasses.replace(classifier.config, num_channels=1)
    with pytest.raises(ValueError, match="3 colour channels, but the model takes num_channels 1"):
        VideoClassifier(VivitForVideoClassification(config), classifier.image_processor)


def test_small_models_are_worth_one_thread_and_large_ones_many(classifier):
    assert classifier.useful_threads == 1
    config = VivitConfig(num_hidden_layers=2)  # a sixth of ViViT-B/16x2
    large = VideoClassifier(VivitForVideoClassification(config), VivitImageProcessor())
    assert large.useful_threads > 16
    int8 = VideoClassifier(large.model, VivitImageProcessor(), options=HandlerOptions(dtype="int8"))
    assert int8.useful_threads == large.useful_threads
