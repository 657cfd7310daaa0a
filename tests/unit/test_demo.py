"""The demo model tells motions apart that no single frame can, also in clips that another renderer drew."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from demo import drifts, encoding, independent_renderer, motions, scenes, train
from handler import VivitForVideoClassification
from handler.classifier import VideoClassifier

DEMO = Path(motions.__file__).parent
BUNDLED = sorted((DEMO / "clips").iterdir())
SIDE = 96


@pytest.fixture(scope="module")
def classifier():
    return VideoClassifier.from_pretrained(DEMO / "checkpoint")


def best(classifier, frames):
    """The label of frames uint8 (T, H, W, 3), as many as the model looks at."""
    pixels = classifier.image_processor.resize_and_crop(frames)
    return classifier.top_k(classifier.logits([pixels[None]])[0], k=1)[0][0]


def scene(label, seed):
    settings = replace(scenes.TRAINING, plain_share=1.0)
    return scenes.sample_scene(np.random.default_rng((987, seed)), label=label, settings=settings)


def frames_of(a_scene, count=16):
    return motions.render(a_scene, np.linspace(0, 1, count), height=SIDE, width=SIDE)


def middle_and_area(frame, background):
    """Where the pixels are that differ from the background, in pixels, and how many of them there are."""
    y, x = np.nonzero(np.abs(frame.astype(int) - background).max(-1) > 20)
    return x.mean(), y.mean(), len(x)


# The checkpoint


def test_checkpoint_names_every_label(classifier):
    assert tuple(classifier.config.id2label.values()) == motions.LABELS


def test_checkpoint_is_small_float32_and_has_a_card():
    model = VivitForVideoClassification.from_pretrained(DEMO / "checkpoint")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (DEMO / "checkpoint" / "model.safetensors").stat().st_size < 9_000_000
    assert "license: apache-2.0" in (DEMO / "checkpoint" / "README.md").read_text()


def test_a_model_that_gets_more_layers_gives_the_same_logits_at_first(classifier):
    clips = torch.rand(2, 16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    deep = train.deepened(classifier.model, classifier.config.num_hidden_layers + 2).eval()
    assert len(deep.vivit.layers) == len(classifier.model.vivit.layers) + 2
    with torch.inference_mode():
        torch.testing.assert_close(deep(clips).logits, classifier.model(clips).logits, atol=1e-5, rtol=0)


def test_nothing_of_a_picture_is_cropped_away(classifier):
    picture = np.zeros((16, 90, 160, 3), np.uint8)
    picture[:, :, :4] = picture[:, :, -4:] = 255
    pixels = classifier.image_processor.resize_and_crop(picture)
    assert (pixels[..., 0] > 200).all() and (pixels[..., -1] > 200).all() and (pixels[..., 32] < 50).all()


# The bundled clips


def test_bundled_clips_show_every_label_in_several_containers():
    assert {path.stem.replace("-", " ") for path in BUNDLED} == set(motions.LABELS)
    assert {path.suffix for path in BUNDLED} == {".mp4", ".webm", ".mkv"}
    assert all(path.stat().st_size < 60_000 for path in BUNDLED)


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.name)
def test_bundled_clip_gets_the_label_in_its_name(classifier, path):
    assert classifier.classify(path).predictions[0][0] == path.stem.replace("-", " ")


# Motion, not pictures


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.name)
def test_a_clip_played_backwards_shows_the_opposite(classifier, path):
    pixels = classifier.load_clip(path).pixels[0]
    label = classifier.top_k(classifier.logits([pixels[None, ::-1].copy()])[0], k=1)[0][0]
    assert label == motions.REVERSED[path.stem.replace("-", " ")]


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.name)
def test_one_frame_for_ever_is_still(classifier, path):
    pixels = classifier.load_clip(path).pixels[0]
    for number in (0, 8, 15):
        frozen = np.repeat(pixels[number : number + 1], len(pixels), axis=0)
        assert classifier.top_k(classifier.logits([frozen[None]])[0], k=1)[0][0] == "still"


def share_right(classifier, styles):
    """Of one clip a label and style by the other renderer."""
    right = [
        classifier.classify(
            independent_renderer.to_bytes(independent_renderer.draw(label, style, seed=1)), top_k=1
        ).predictions[0][0]
        == label
        for style in styles
        for label in motions.LABELS
    ]
    return sum(right) / len(right)


def test_plain_shapes_of_another_renderer_are_told_apart(classifier):
    assert share_right(classifier, independent_renderer.PLAIN_STYLES) >= 0.98


def test_most_harder_clips_of_another_renderer_are_told_apart(classifier):
    assert share_right(classifier, independent_renderer.HARD_STYLES) >= 0.95


# The generator


@pytest.mark.parametrize("label", motions.LABELS)
def test_the_same_seed_draws_the_same_clip(label):
    one, two = (scenes.sample_scene(np.random.default_rng(5), label=label) for _ in range(2))
    assert np.array_equal(frames_of(one), frames_of(two))
    assert not np.array_equal(frames_of(one), frames_of(scenes.sample_scene(np.random.default_rng(6), label=label)))


@pytest.mark.parametrize("label", list(motions.DIRECTIONS))
def test_what_moves_goes_where_its_label_says(label):
    for seed in range(5):
        a_scene = scene(label, seed)
        layer = a_scene.objects[0]
        x, y, _, _ = layer.path.pose(layer.timing.progress(np.array([0.0, 1.0])))
        along, across = np.diff(x)[0], np.diff(y)[0]
        if motions.DIRECTIONS[label][1]:
            along, across = across, along
        assert along * sum(motions.DIRECTIONS[label]) > 0 and abs(along) > 2 * abs(across)


def disc(**path):
    """A white disc on black on its way."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    alpha = (x**2 + y**2 < 0.8).float()
    thing = motions.Layer(alpha.expand(4, 64, 64), motions.Path(half_size=0.15, **path), motions.Timing())
    black = motions.opaque(torch.zeros(3, 4, 4), motions.Path(half_size=1.0), motions.Timing())
    return motions.Scene("still", 1.0, black, (thing,), motions.Effects(), 0)


def test_a_shift_moves_pixels_by_that_share_of_the_picture():
    first, last = frames_of(disc(shift=(-0.5, 0.25)), count=2)
    (x0, y0, _), (x1, y1, _) = (middle_and_area(frame, 0) for frame in (first, last))
    assert (x1 - x0, y1 - y0) == pytest.approx((-0.5 * SIDE, 0.25 * SIDE), abs=1)


def test_growth_multiplies_the_area():
    first, last = frames_of(disc(log_growth=np.log(2)), count=2)
    assert middle_and_area(last, 0)[2] / middle_and_area(first, 0)[2] == pytest.approx(4, rel=0.15)


def test_a_positive_turn_is_clockwise_as_seen():
    # The pivot is left of the disc, which starts right of the middle and, turned by 90 degrees, is below it.
    first, last = frames_of(disc(turn=np.pi / 2, pivot=(-1.5, 0.0)), count=2)
    (x0, y0, _), (x1, y1, _) = (middle_and_area(frame, 0) for frame in (first, last))
    assert x0 - x1 > 10 and y1 - y0 > 10


@pytest.mark.parametrize("label", ["turning clockwise", "turning counterclockwise"])
def test_turns_stay_clear_of_aliasing(label):
    for seed in range(30):
        a_scene = scenes.sample_scene(np.random.default_rng((4, seed)), label=label)
        layers = a_scene.objects or (a_scene.background,)
        moving = [layer for layer in layers if layer.path.turn]
        steps = [np.diff(layer.timing.progress(np.linspace(0, 1, 16))).max() * layer.path.turn for layer in moving]
        assert steps and all(0 < abs(step) < np.pi and (step > 0) == (label == "turning clockwise") for step in steps)


def test_drifts_move_as_their_flow_says():
    # Followed along the flow a picture keeps its values; where it is not followed they change, unless it is still.
    generator = torch.Generator().manual_seed(0)
    clips, labels, flow = drifts.draw_drifts(60, generator, frames=16, side=64, cells=16)
    line = (torch.arange(16) + 0.5) / 8 - 1
    places = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).expand(60, -1, -1, -1)  # (B, 16, 16, 2)
    inner = places[0].abs().amax(-1) < 0.6

    def values(frame, where):
        return F.grid_sample(clips[:, frame], where, align_corners=False)[..., inner]

    before = values(7, places)
    followed = (values(8, places + 2 * flow[:, 7, :, :, :2]) - before).abs().mean((1, 2))
    left_alone = (values(8, places) - before).abs().mean((1, 2))
    moving = labels != motions.LABELS.index("still")
    assert 0 < moving.sum() < 60
    assert followed[moving].sum() < 0.5 * left_alone[moving].sum()
    assert torch.allclose(followed[~moving], left_alone[~moving])


def test_drifts_go_where_their_labels_say():
    clips, labels, flow = drifts.draw_drifts(200, torch.Generator().manual_seed(1), frames=16, side=8, cells=4)
    x, y, growth, turn = flow.mean((1, 2, 3)).unbind(1)
    for label, (along_x, along_y) in motions.DIRECTIONS.items():
        chosen = labels == motions.LABELS.index(label)
        assert (x[chosen] * along_x + y[chosen] * along_y > 0).all() and chosen.any()
    for label, rate, sign in (
        ("growing", growth, 1),
        ("shrinking", growth, -1),
        ("turning clockwise", turn, 1),
        ("turning counterclockwise", turn, -1),
    ):
        chosen = labels == motions.LABELS.index(label)
        assert (rate[chosen] * sign > 0).all() and (rate[~chosen] * sign <= 0).all()


def test_still_scenes_hold_still():
    for seed in range(10):
        frames = frames_of(scene("still", seed))
        assert (frames == frames[:1]).all()


def test_encoding_keeps_frames_and_their_number():
    frames = frames_of(scene("growing", 0), count=20)
    for number in range(8):
        file = encoding.encode(frames, encoding=encoding.sample_encoding(np.random.default_rng(number)), fps=25)
        decoded = encoding.decode_all(file)
        assert decoded.shape == frames.shape
        assert np.abs(decoded.astype(int) - frames).mean() < 20
