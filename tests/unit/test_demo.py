"""The demo model recognizes motion, also in clips of an independent renderer; the renderers draw what labels state."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from demo import drawn_clips, encoding, evaluate, independent_renderer, motions, scenes
from handler.classifier import VideoClassifier
from handler.views import Views

DEMO = Path(motions.__file__).parent
BUNDLED = sorted((DEMO / "clips").iterdir())
SIDE = 96


@pytest.fixture(scope="module")
def classifier():
    return VideoClassifier.from_pretrained(DEMO / "checkpoint")


def classify_pixels(classifier, *clips):
    """The top labels of clips uint8 (T, C, h, w)."""
    logits = classifier.logits([clip[None] for clip in clips])
    return [classifier.top_k(row, k=1).predictions[0][0] for row in logits]


def render_uniform(scene, count=16):
    return motions.render(scene, np.linspace(0, 1, count), height=SIDE, width=SIDE)


# The checkpoint and the bundled clips


def test_checkpoint_labels_size_and_card(classifier):
    assert tuple(classifier.config.id2label.values()) == motions.LABELS
    assert {parameter.dtype for parameter in classifier.model.parameters()} == {torch.float32}
    assert (DEMO / "checkpoint" / "model.safetensors").stat().st_size < 9_000_000
    assert "license: apache-2.0" in (DEMO / "checkpoint" / "README.md").read_text()


def test_image_processor_keeps_frame_edges(classifier):
    frames = np.zeros((16, 90, 160, 3), np.uint8)
    frames[:, :, :4] = frames[:, :, -4:] = 255
    pixels = classifier.image_processor.resize_and_crop(frames)
    assert (pixels[..., 0] > 200).all() and (pixels[..., -1] > 200).all() and (pixels[..., 32] < 50).all()


def test_bundled_clips_cover_labels_and_containers():
    assert {path.stem.replace("-", " ") for path in BUNDLED} == set(motions.LABELS)
    assert {path.suffix for path in BUNDLED} == {".mp4", ".webm", ".mkv"}
    assert all(path.stat().st_size < 60_000 for path in BUNDLED)


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_bundled_clip_forward_reversed_frozen(classifier, path):
    label = path.stem.replace("-", " ")
    pixels = classifier.load_clip(path).pixels[0]  # (T, C, h, w)
    frozen = [np.repeat(pixels[number : number + 1], len(pixels), axis=0) for number in (0, 8, 15)]
    found = classify_pixels(classifier, pixels, pixels[::-1].copy(), *frozen)
    assert found == [label, motions.REVERSED[label], "still", "still", "still"]


def test_clips_of_independent_renderer_recognized(classifier):
    pixels, labels = [], []
    for number, style in enumerate(independent_renderer.PLAIN_STYLES + independent_renderer.HARD_STYLES):
        for label in motions.LABELS[number % 3 :: 3]:
            frames = independent_renderer.draw(label, style, seed=1)
            chosen = frames[np.linspace(0, len(frames) - 1, 16).round().astype(int)]
            pixels.append(classifier.image_processor.resize_and_crop(chosen))
            labels.append(label)
    found = classify_pixels(classifier, *pixels)
    wrong = [pair for pair in zip(labels, found) if pair[0] != pair[1]]
    assert len(labels) == 54 and len(wrong) <= 2, wrong


def test_example_in_readme(classifier):
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    label, percent = re.search(r"^moving-left\.mp4  ([a-z ]+) ([\d.]+)%, ", readme, re.MULTILINE).groups()
    found, score = classifier.classify(DEMO / "clips" / "moving-left.mp4", top_k=1).predictions[0]
    assert found == label and 100 * score == pytest.approx(float(percent), abs=0.2)


# Evaluation and training


def test_evaluation_report_counts():
    results = [
        evaluate.Result("growing", "growing", ("mp4",)),
        evaluate.Result("growing", "still", ("mkv",)),
        evaluate.Result("still", "still", ("mkv",)),
    ]
    lines = [" ".join(line.split()) for line in evaluate.report(results).splitlines()]
    assert lines[0] == "2 of 3 correct: 66.7%"
    assert "growing 50.0% 2 still (1)" in lines and "still 100.0% 1 -" in lines and "shrinking - 0 -" in lines
    assert "mkv 50.0% 2" in lines and "mp4 100.0% 1" in lines


def test_drawn_clips_labeled_and_reproducible(classifier):
    for kinds, most in ((drawn_clips.Kinds(easy=1.0), 21), (drawn_clips.Kinds(textures=1.0), 20)):
        drawn = [drawn_clips.draw_clip(drawn_clips.DRAWN_LABELS[k % 11], (5, k), kinds) for k in range(22)]
        found = classify_pixels(classifier, *(clip for clip, _ in drawn))
        assert sum(motions.LABELS[label] == name for (_, label), name in zip(drawn, found)) >= most
    again, label = drawn_clips.draw_clip("growing", (5, 3), kinds)
    assert label == drawn[3][1] and np.array_equal(again, drawn[3][0])


def test_drawn_clips_new_in_each_epoch():
    with ThreadPoolExecutor(1) as executor:
        clips = drawn_clips.DrawnClips(2, seed=0, kinds=drawn_clips.Kinds(easy=1.0), executor=executor)
        epochs = [clips.load(0, Views(), np.random.default_rng(epoch))[0] for epoch in (0, 1)]
        served = [clips.load(0, Views(), None)[0] for _ in range(2)]
    assert not np.array_equal(*epochs) and np.array_equal(*served)


# The renderer


def disc(**path):
    """A scene with a white disc on black."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    alpha = (x**2 + y**2 < 0.8).float()
    layer = motions.Layer(alpha.expand(4, 64, 64), motions.Path(half_size=0.15, **path), motions.Timing())
    black = motions.opaque(torch.zeros(3, 4, 4), motions.Path(half_size=1.0), motions.Timing())
    return motions.Scene("still", 1.0, black, (layer,), motions.Effects(), 0)


@pytest.mark.parametrize(
    "path, moved, area_ratio",
    [
        ({"shift": (-0.5, 0.25)}, (-0.5 * SIDE, 0.25 * SIDE), 1),
        ({"log_growth": np.log(2)}, (0, 0), 4),
        # The pivot is left of the disc, which a clockwise quarter turn moves from the right to the bottom.
        ({"turn": np.pi / 2, "pivot": (-1.5, 0.0)}, (-0.225 * SIDE, 0.225 * SIDE), 1),
    ],
    ids=["shift", "growth", "turn"],
)
def test_path_moves_pixels(path, moved, area_ratio):
    coordinates = [np.nonzero(frame.max(-1) > 20) for frame in render_uniform(disc(**path), count=2)]
    (x0, y0), (x1, y1) = ((x.mean(), y.mean()) for y, x in coordinates)
    assert (x1 - x0, y1 - y0) == pytest.approx(moved, abs=1)
    assert len(coordinates[1][0]) / len(coordinates[0][0]) == pytest.approx(area_ratio, rel=0.15)


@pytest.mark.parametrize("label", motions.LABELS)
def test_scene_matches_label_and_seed(label):
    for seed in range(5):
        scene = scenes.sample_scene(
            np.random.default_rng((987, seed)), label=label, settings=replace(scenes.TRAINING, plain_share=1.0)
        )
        layer = scene.objects[0]
        if label == "still":
            frames = render_uniform(scene, count=4)
            assert (frames == frames[:1]).all()
        elif label in motions.DIRECTIONS:
            x, y, _, _ = layer.path.pose(np.array([0.0, 1.0]))
            displacement, direction = np.array([x[1] - x[0], y[1] - y[0]]), motions.DIRECTIONS[label]
            assert displacement @ direction > 2 * abs(displacement @ direction[::-1])
        elif label.startswith("turning"):
            assert (layer.path.turn > 0) == (label == "turning clockwise")
        else:
            assert (layer.path.log_growth > 0) == (label == "growing")
    one, two, other = (scenes.sample_scene(np.random.default_rng(seed), label=label) for seed in (5, 5, 6))
    assert np.array_equal(render_uniform(one, count=3), render_uniform(two, count=3))
    assert not np.array_equal(render_uniform(one, count=3), render_uniform(other, count=3))


def test_turns_not_aliased():
    for seed in range(30):
        label = motions.LABELS[6 + seed % 2]
        scene = scenes.sample_scene(np.random.default_rng((4, seed)), label=label)
        layers = scene.objects or (scene.background,)
        steps = [layer.timing.longest_step(16) * layer.path.turn for layer in layers if layer.path.turn]
        assert steps and all(0 < abs(step) < np.pi for step in steps)


def test_encoding_keeps_frames():
    frames = render_uniform(disc(shift=(0.4, 0.1)), count=20)
    for number in range(8):
        file = encoding.encode(frames, encoding=encoding.sample_encoding(np.random.default_rng(number)), fps=25)
        decoded = encoding.decode_all(file)
        assert decoded.shape == frames.shape
        assert np.abs(decoded.astype(int) - frames).mean() < 20
