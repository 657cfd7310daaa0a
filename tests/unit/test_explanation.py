"""Explanations: against a rollout that keeps all attention weights, in each deployment, and their faithfulness."""

import dataclasses
import json
from functools import reduce
from itertools import islice
from statistics import mean

import av
import numpy as np
import pytest
import torch
from PIL import Image

from demo.faithfulness import draw_clips, measure
from handler import VideoClassifier, VivitConfig, VivitForVideoClassification, VivitImageProcessor
from handler.assets import DEMO_CHECKPOINT
from handler.cli import classify
from handler.cli.explanation_plot import plot_explanation
from handler.clips import Clip
from handler.explanation import rollout as rollout_module
from handler.explanation.occlusion import blocks_of, occlude
from handler.explanation.rollout import rollout
from handler.models.layers import Attention, eager_attention
from handler.options import HandlerOptions
from handler.processing.resize import Crop, ResizeCrop
from handler.protocol import render_explanation
from handler.video import VideoInfo
from tests.support.clips import write_clip

MODELS = {
    "spatiotemporal": {},
    "spatiotemporal, mean": {"classifier_pooling": "mean"},
    "factorised_encoder": {"num_temporal_layers": 2},
    "factorised_encoder, mean": {"num_temporal_layers": 2, "classifier_pooling": "mean"},
    "factorised_self_attention": {},
    "factorised_self_attention, space first": {"attention_order": "space_time"},
    "factorised_dot_product": {},
}


def random_model(name="spatiotemporal", **changes) -> VivitForVideoClassification:
    """A model with a grid of 3 x 4 x 2 tubelets and large random weights."""
    torch.manual_seed(0)
    fields = {
        "num_frames": 6,
        "image_size": (32, 16),
        "tubelet_size": (2, 8, 8),
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_labels": 5,
        "attention_type": name.partition(",")[0],
    }
    model = VivitForVideoClassification(VivitConfig(**{**fields, **MODELS[name], **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def direct_rollout(model, pixel_values, label):
    """The product of all layers' matrices over all tokens of a clip, from attention weights with autograd."""
    config, heads = model.config, model.config.num_attention_heads
    time, height, width = config.grid
    is_factorised_encoder = config.attention_type == "factorised_encoder"
    space = height * width + (config.has_cls_token and is_factorised_encoder)
    kept = []

    def keep(q, k, v, **_):
        kept.append(eager_attention(q, k, v, dropout_prob=0, training=False)[1])
        return kept[-1] @ v, kept[-1]

    slow = VivitForVideoClassification(config, attn_implementation="eager").eval()
    slow.load_state_dict(model.state_dict())
    for module in slow.modules():
        if isinstance(module, Attention):
            module.attention_function = keep
    logits = slow(pixel_values, output_attentions=True).logits[0]
    gradients = torch.autograd.grad(logits[label], kept)
    weighted = [(weights * gradient).clamp(min=0).sum(1) / heads for weights, gradient in zip(kept, gradients)]

    def over_grid(each):
        """From (S, T', T') along time or (T', S, S) along space to all pairs of tokens."""
        tokens = torch.arange(time * space).view(time, space)
        sequences = tokens if each.shape[-1] == space and len(each) == time else tokens.t()
        matrix = torch.zeros(time * space, time * space)
        for sequence, weights in zip(sequences, each):
            matrix[sequence[:, None], sequence] = weights
        return matrix

    def multiply(matrices):
        return reduce(lambda result, matrix: result + matrix @ result, matrices, torch.eye(len(matrices[0])))

    def pool(result):
        return result[0, 1:] if config.has_cls_token else result.mean(0)

    if config.attention_type == "spatiotemporal":
        return pool(multiply([each[0] for each in weighted]))
    if is_factorised_encoder:
        layers = config.num_hidden_layers
        of_steps = pool(multiply([each[0] for each in weighted[layers:]]))  # (T',)
        rows = multiply([over_grid(each) for each in weighted[:layers]]).view(time, space, time, space)
        rows = rows[:, 0] if config.has_cls_token else rows.mean(1)  # (T', T', S)
        return torch.einsum("t,tus->us", of_steps, rows)[:, space - height * width :]
    matrices = [over_grid(each) for each in weighted]
    if config.attention_type == "factorised_dot_product":
        matrices = [first + second for first, second in zip(matrices[::2], matrices[1::2])]
    return pool(multiply(matrices))


@pytest.mark.parametrize("block_weights", [2**17, 40])
@pytest.mark.parametrize("name", MODELS)
def test_rollout_equals_product_of_kept_attentions(name, block_weights, monkeypatch):
    monkeypatch.setattr(rollout_module, "CPU_BLOCK_WEIGHTS", block_weights)
    monkeypatch.setattr(rollout_module, "CPU_BLOCK_KEYS", max(5, block_weights // 100))
    model = random_model(name)
    pixel_values = torch.randn(1, 6, 3, 32, 16)
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    logits, heat = rollout(model, pixel_values, lambda logits: [2])
    torch.testing.assert_close(heat, direct_rollout(model, pixel_values, 2).view(3, 4, 2), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(logits, model(pixel_values).logits[0].detach())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


PROCESSOR = VivitImageProcessor(do_resize=True, size={"height": 32, "width": 16}, do_center_crop=False)


def random_clip(frames=6, height=32, width=16) -> Clip:
    info = VideoInfo(
        frame_count=frames,
        duration_s=1.0,
        fps=6.0,
        width=64,
        height=48,
        rotation=0,
        codec="h264",
        container="mp4",
        stream=0,
    )
    pixels = np.random.default_rng(0).integers(0, 256, (frames, 3, height, width), np.uint8)
    return Clip(
        frames=pixels,
        info=info,
        frame_indices=np.arange(frames),
        times_s=np.arange(frames) / frames,
        crops=(Crop(0, 0, height, width),),
        num_frames=frames,
        warnings=(),
        decoded_frames=0,
        decode_s=0,
        resize_s=0,
    )


@pytest.mark.parametrize(
    "options, tolerance",
    [({}, 1e-6), ({"attn_implementation": "eager"}, 1e-5), ({"dtype": "int8"}, 0.05)]
    + [({"dtype": dtype}, tolerance) for dtype, tolerance in (("float16", 0.01), ("bfloat16", 0.1))],
    ids=str,
)
def test_explanations_of_each_deployment(options, tolerance):
    expected = VideoClassifier(random_model(), PROCESSOR).explain_clip(random_clip(), indices=[3])
    classifier = VideoClassifier(random_model(), PROCESSOR, options=HandlerOptions(**options))
    with torch.inference_mode():
        explanation = classifier.explain_clip(random_clip(), indices=[3])
    assert abs(explanation.heat - expected.heat).sum() < tolerance  # each heat map has the sum 1
    np.testing.assert_allclose(explanation.logits, expected.logits, atol=0.1)


def test_explanation_of_each_label_and_of_combinations():
    classifier = VideoClassifier(random_model(), PROCESSOR)
    best = classifier.explain_clip(random_clip())
    scores = best.logits.softmax(-1)
    assert best.label == f"LABEL_{int(scores.argmax())}" and best.score == pytest.approx(float(scores.max()))
    assert classifier.label_indices("LABEL_3") == [3]
    other = classifier.explain_clip(random_clip(), indices=[int(scores.argmin())])
    assert abs(best.heat - other.heat).sum() > 0.01
    with pytest.raises(ValueError, match="LABEL_3"):
        classifier.label_indices("label_3")
    labels = dict(enumerate(("cut", "wash", "tomato", "cut", "pan")))
    heads = VideoClassifier(random_model(label_heads={"verb": 2, "noun": 3}, id2label=labels), PROCESSOR)
    assert heads.label_indices("wash + pan") == [1, 4] and heads.label_indices("tomato") == [2]
    for unknown in ("cut", "pan + wash", "wash + tomato + pan"):
        with pytest.raises(ValueError):
            heads.label_indices(unknown)
    combination = heads.explain_clip(random_clip())
    assert (combination.label, combination.score) == pytest.approx(heads.top_k(combination.logits, k=1).predictions[0])


def test_first_of_several_views_explained():
    classifier, clip = VideoClassifier(random_model(), PROCESSOR), random_clip()
    several = dataclasses.replace(
        clip,
        frames=np.random.default_rng(1).integers(0, 256, (4, 3, 32, 20), np.uint8),
        frame_indices=np.array([4, 4, 4, 6, 6, 9, 4, 5, 5, 6, 6, 9]),
        times_s=np.arange(12.0),
        crops=(Crop(3, 4, 32, 16), Crop(3, 8, 32, 16)),
    )
    explanation = classifier.explain_clip(several)
    assert np.array_equal(explanation.clip.pixels, several.pixels[:1]) and len(several.pixels) == 4
    torch.testing.assert_close(explanation.logits, classifier.logits([several.pixels[:1]])[0])
    assert explanation.step_times_s.tolist() == [0.5, 2.5, 4.5]
    assert explanation.region == (4 * 64 / 16, 3 * 48 / 32, 64, 48)


def test_times_and_region_of_explanation():
    explanation = VideoClassifier(random_model(), PROCESSOR).explain_clip(random_clip())
    np.testing.assert_allclose(explanation.step_times_s, [0.5 / 6, 2.5 / 6, 4.5 / 6])
    assert explanation.region == (0, 0, 64, 48) and explanation.grid == (3, 4, 2)
    sampled = random_model(tubelet_embedding="uniform_frames")
    np.testing.assert_allclose(
        VideoClassifier(sampled, PROCESSOR).explain_clip(random_clip()).step_times_s, np.array([2, 3, 4]) / 6, atol=0.2
    )


@pytest.mark.parametrize("size", [(480, 640), (641, 480), (100, 90), (225, 301)])
def test_region_of_crop(size):
    """The pixel in the middle of the region is the one in the middle of the output, also if the output is padded."""
    height, width = size
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    for crop in (
        ResizeCrop(resize_to=None, resample=2, crop_to=(224, 224)),
        ResizeCrop(resize_to=256, resample=2, crop_to=(224, 224)),
    ):
        left, top, shown_width, shown_height = crop.region(height, width, crop.crops(height, width)[0])
        scale = crop.resized_size(height, width)[0] / height
        assert shown_height == pytest.approx(224 / scale, rel=0.01)
        for positions, start, length in ((rows, top, shown_height), (columns, left, shown_width)):
            ramp = np.repeat((positions / 1000)[..., None], 3, -1)
            center = crop.resize_and_crop_frame(ramp)[111:113, 111:113].mean() * 1000
            assert center == pytest.approx(start + length / 2 - 0.5, abs=5)  # 8 bits


def test_heat_in_answer_bounded_and_normalized():
    heat = np.random.default_rng(0).random((16, 14, 14), np.float32)
    answer = render_explanation(
        label="a", score=0.5, heat=heat / heat.sum(), step_times_s=np.arange(16) / 3, region=(0, 0, 64.04, 48)
    )
    assert np.max(answer["heat"]) == 1 and np.shape(answer["heat"]) == (16, 14, 14)
    assert sum(step["score"] for step in answer["time_steps"]) == pytest.approx(1, abs=0.001)
    assert len(json.dumps({"explanation": answer}, indent=2)) < 20 * heat.size + 2000  # TorchServe's format
    empty = render_explanation(label="a", score=0.5, heat=0 * heat, step_times_s=np.arange(16), region=(0, 0, 1, 1))
    assert np.max(empty["heat"]) == 0


# Faithfulness


@pytest.fixture(scope="module")
def demo():
    return VideoClassifier.from_pretrained(DEMO_CHECKPOINT)


@pytest.fixture
def single_thread():
    """Limits torch to one thread, which is faster for small models on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_explanations_of_demo_are_faithful(demo, single_thread):
    drawn = list(islice(draw_clips(demo, seed=1), 12))
    results = [measure(demo, each, demo.explain_clip(each.clip)) for each in drawn]
    assert mean(each.drop for each in results) > 4 * mean(each.random_drop for each in results)
    assert mean(each.pointed_at for each in results) >= 0.9 > 2 * mean(each.chance for each in results)
    assert mean(each.density_ratio > 2 for each in results) >= 0.9


def test_occlusion_finds_what_a_model_looks_at():
    """The logit of label 1 is the brightness of one tubelet; label 0 prefers darkness."""
    pixels = np.random.default_rng(0).integers(0, 100, (1, 6, 3, 32, 16), np.uint8)
    pixels[:, 2:4, :, 8:16, 8:16] = 255

    def logits(clips):
        seen = [clip[:, 2:4, :, 8:16, 8:16].mean() for clip in clips]
        return torch.tensor([[-brightness, brightness] for brightness in seen])

    heat = occlude(logits, pixels, labels=[1], grid=(3, 4, 2))
    assert heat[1, 1, 1] > 100 and heat.sum() == heat[1, 1, 1]
    assert not occlude(logits, pixels, labels=[0], grid=(3, 4, 2)).any()


@pytest.mark.parametrize("grid", [(2, 8, 8), (16, 14, 14), (1, 1, 500), (3, 5, 7)])
def test_blocks_cover_grid_once(grid):
    covered = np.zeros(grid, int)
    blocks = list(blocks_of(grid))
    for block in blocks:
        covered[block] += 1
    assert (covered == 1).all() and len(blocks) <= 256


# Images


@pytest.fixture
def gray_video(tmp_path):
    return str(write_clip(tmp_path / "gray.mp4", np.full((16, 96, 128, 3), 128, np.uint8)))


def answer_with_heat_at(t, y, x):
    """Of a model that sees the middle 96 x 96 pixels of a video of 128 x 96."""
    heat = np.zeros((2, 4, 4), np.float32)
    heat[t, y, x] = 1
    explanation = render_explanation(label="a", score=0.5, heat=heat, step_times_s=[0.1, 0.4], region=(16, 0, 96, 96))
    video = {"stream": 0, "frame_times_s": [number / 25 for number in range(16)]}
    return {"video": video, "explanation": explanation}


def red_pixels(image):
    """(rows, columns) of red pixels."""
    red, green, _ = np.moveaxis(np.asarray(image.convert("RGB")).astype(int), -1, 0)
    return np.nonzero((red > 150) & (green < 90))


def test_heat_drawn_where_it_is(gray_video, tmp_path):
    plot_explanation(gray_video, answer_with_heat_at(1, 0, 3), tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 16
        for number in (0, 12):
            image.seek(number)
            rows, columns = red_pixels(image.crop((12, 44, 460, 380)))  # the frame, at 3.5 times its size
            assert (len(rows) > 1000) == (number == 12)
        assert 0 <= rows.mean() < 84 and 308 < columns.mean() < 392  # the right of the four columns of the middle


def test_animation_as_video(gray_video, tmp_path):
    plot_explanation(gray_video, answer_with_heat_at(0, 1, 1), tmp_path / "a.mp4")
    with av.open(tmp_path / "a.mp4") as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    assert len(frames) == 3 * 16
    assert len(red_pixels(frames[3].crop((12, 44, 460, 380)))[0]) > 1000


def test_explanation_drawn_by_command(tmp_path, capsys):
    video = DEMO_CHECKPOINT.parent / "clips" / "moving-left.mp4"
    path = tmp_path / "heat.png"
    arguments = [str(video), "--checkpoint", "demo", "--explain", "--label", "moving up", "--plot", str(path)]
    assert classify.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "moving left 9" in printed and "(moving up: " in printed
    with Image.open(path) as image:
        assert image.width > 1000 and image.height > 300


@pytest.mark.parametrize(
    "arguments",
    [["--plot", "a.png"], ["--label", "a"], ["--explain", "--grpc", "a:1"], ["--explain", "--plot", "a.jpg"]],
)
def test_invalid_arguments_of_explanations_rejected(arguments, capsys):
    with pytest.raises(SystemExit):
        classify.main(["a.mp4", *arguments])
    assert "--explain" in capsys.readouterr().err or "a" in arguments
