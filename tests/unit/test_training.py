"""Fine-tuning: data sets, augmentation, the loop, and a run from folders to a checkpoint that serves."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from handler.classifier import VideoClassifier
from handler.cli import finetune
from handler.models.config import VivitConfig
from handler.models.vivit import VivitForVideoClassification
from handler.processing.image_processor import VivitImageProcessor
from handler.training.augmentation import augment_clip, mix_pairs, sample_share, sample_view
from handler.training.data import VideoClips, read_data, start_decoders
from handler.training.distributed import start_group
from handler.training.loop import fit, learning_rate
from handler.training.options import PRESETS, Recipe
from handler.training.state import STATE_FILE
from handler.validation import ConfigError
from handler.video.sampling import sample_stride, sample_uniform
from handler.views import Views
from synthetic import numbered_frames, write_clip

CONFIG = VivitConfig(
    image_size=16,
    num_frames=4,
    tubelet_size=(2, 8, 8),
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    id2label={0: "dark", 1: "light"},
)
PROCESSOR = VivitImageProcessor(size={"shortest_edge": 20}, crop_size=16, do_normalize=False)
LABELS = ("dark room", 'señales "a"')


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    """Threads of torch only slow down such small models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class DrawnClips:
    """Clips of noise whose brightness is the label. Clip `kill_at`, counted in calls, sends a signal to the process."""

    def __init__(self, count=10, *, kill_at=None, signal_number=signal.SIGINT):
        self.names = [f"clip {index}" for index in range(count)]
        self.calls, self.kill_at, self.signal_number = 0, kill_at, signal_number

    def load(self, index, view, rng):
        self.calls += 1
        if self.calls == self.kill_at:
            os.kill(os.getpid(), self.signal_number)
        noise = np.random.default_rng(index).integers(0, 128, (4, 3, 16, 16), dtype=np.uint8)
        return noise + np.uint8(100 * (index % 2)), index % 2


def train_drawn(out, recipe, *, train=None, resume=False):
    """Trains a small model with initial weights from seed 0; returns the final weights."""
    torch.manual_seed(0)
    model = VivitForVideoClassification(dataclasses.replace(CONFIG, drop_path_rate=recipe.drop_path_rate))
    out.mkdir(exist_ok=True)
    with start_group("cpu") as group:
        fit(
            model,
            PROCESSOR,
            train=train or DrawnClips(),
            evaluation=DrawnClips(4),
            out=out,
            recipe=recipe,
            group=group,
            arguments={"init": "seed 0"},
            threads=2,
            resume=resume,
        )
    return model.state_dict()


def assert_same_weights(one, two, *, atol=0.0):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


# Data


def write_video(path, *, seed, brightness=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = numbered_frames(9, height=24, width=32, seed=seed) // 2 + np.uint8(brightness)
    write_clip(path, frames, codec="mpeg4")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two labels with five videos each and a corrupt one."""
    folder = tmp_path_factory.mktemp("videos") / "my videos"
    for index, label in enumerate(LABELS):
        for number in range(5):
            write_video(folder / label / f"{number} ü.mp4", seed=number, brightness=100 * index)
    (folder / LABELS[0] / "corrupt.mp4").write_bytes(b"no video")
    (folder / LABELS[0] / ".hidden").touch()
    return folder


def test_folders_are_labels_with_stratified_hold_out(videos):
    data = read_data(videos, eval_fraction=0.4, seed=0)
    assert data.labels == tuple(sorted(LABELS))
    assert [[s.label for s in split].count(k) for split in (data.train, data.evaluation) for k in (0, 1)] == [
        4,
        3,
        2,
        2,
    ]
    assert not set(data.train) & set(data.evaluation)
    assert data == read_data(videos, eval_fraction=0.4, seed=0) != read_data(videos, eval_fraction=0.4, seed=1)
    assert data.with_label_order(data.labels[::-1]).train[0].label == 1 - data.train[0].label
    assert read_data(videos, eval_fraction=0, seed=0).evaluation == ()


def test_split_folders(tmp_path):
    for name in ("train/a/1.mp4", "train/b/1.mp4", "val/a/2.mp4"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    data = read_data(tmp_path, eval_fraction=0.5, seed=0)
    assert [sample.path for sample in data.evaluation] == [tmp_path / "val" / "a" / "2.mp4"]
    assert [sample.label for sample in data.train] == [0, 1]
    (tmp_path / "c").mkdir()
    with pytest.raises(ConfigError, match="beside it, not 'c'"):
        read_data(tmp_path, eval_fraction=0.5, seed=0)


def test_tables(videos, tmp_path):
    rows = [
        (os.path.relpath(path, tmp_path), path.parent.name, "val" if path.name.startswith("0") else "train")
        for path in sorted(videos.glob("*/*.mp4"))
    ]
    with (tmp_path / "data.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    data = read_data(tmp_path / "data.csv", eval_fraction=0.5, seed=0)
    assert [sample.path.name for sample in data.evaluation] == ["0 ü.mp4"] * 2 and len(data.train) == 9
    assert data.labels == tuple(sorted(LABELS))
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = dict(zip(("path", "label", "split"), map(list, zip(*rows))))
    parquet.write_table(pyarrow.table(columns), tmp_path / "data.parquet")
    assert read_data(tmp_path / "data.parquet", eval_fraction=0.5, seed=0) == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\nno.mp4,a\nno2.mp4,b\n", r"2 files that do not exist:\s+.*no\.mp4\s+.*no2\.mp4"),
        ("path,lable\nx,a\n", "must have the columns path and label"),
        ("path,label,spilt\nx,a,train\n", "unknown column 'spilt': did you mean 'split'"),
        ("path,label\nx,\n", "row 1 has no label"),
        ("path,label,split\nx,a,trian\n", "did you mean 'train'"),
        ("path,label\nx,a,b\n", "more fields than columns"),
        ("path,label\n", "no rows"),
        ("", "found none"),
    ],
)
def test_unusable_tables_rejected(tmp_path, text, message):
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_data(tmp_path / "data.csv", eval_fraction=0.2, seed=0)


def test_unusable_folders_rejected(tmp_path):
    with pytest.raises(ConfigError, match="found no folder"):
        read_data(tmp_path, eval_fraction=0.2, seed=0)
    (tmp_path / "a").mkdir()
    with pytest.raises(ConfigError, match="a has no video"):
        read_data(tmp_path, eval_fraction=0.2, seed=0)
    (tmp_path / "a" / "x.mp4").touch()
    with pytest.raises(ConfigError, match="at least two labels, found only 'a'"):
        read_data(tmp_path, eval_fraction=0.2, seed=0).check_training()
    with pytest.raises(ConfigError, match="neither a folder nor"):
        read_data(tmp_path / "missing.csv", eval_fraction=0.2, seed=0)


def test_label_without_training_video_rejected(tmp_path):
    (tmp_path / "x.mp4").touch()
    (tmp_path / "y.mp4").touch()
    (tmp_path / "data.csv").write_text("path,label,split\nx.mp4,a,train\ny.mp4,b,val\n")
    with pytest.raises(ConfigError, match="every label, found none of 'b'"):
        read_data(tmp_path / "data.csv", eval_fraction=0.2, seed=0).check_training()


# Clips


def test_training_views_and_served_clip(videos, tmp_path):
    VivitForVideoClassification(CONFIG).save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    classifier = VideoClassifier.from_pretrained(tmp_path)
    data = read_data(videos, eval_fraction=0, seed=0)
    pool = start_decoders(CONFIG, PROCESSOR, processes=1)
    try:
        clips, path = VideoClips(data.train[:1], pool), data.train[0].path
        served, _ = clips.load(0)
        assert np.array_equal(served, classifier.load_clip(path).pixels[0])
        # 24 x 32 becomes 20 x 26, and the processor crops the central 16 x 16; here the lower right part, zoomed.
        view = Views(phase=0.99, stride_frames=1, zoom=1.5, crop_at=(1.0, 1.0))
        shown, _ = clips.load(0, view)
        frames = np.stack(list(classifier_frames(path)))[-4:]  # (4, 24, 32, 3)
        zoomed = VivitImageProcessor(size={"height": 30, "width": 39}, do_center_crop=False).resize_and_crop(frames)
        assert np.array_equal(shown, zoomed[:, :, -16:, -16:])
    finally:
        pool.close()


def classifier_frames(path):
    import av

    with av.open(str(path)) as container:
        yield from (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))


@pytest.mark.parametrize("frame_count", [1, 5, 16, 33, 250])
def test_sampled_positions(frame_count):
    assert sample_uniform(frame_count, 16).tolist() == [(2 * part + 1) * frame_count // 32 for part in range(16)]
    for phase in (0.0, 0.3, 0.999, 1.0):
        for indices in (
            sample_uniform(frame_count, 16, phase=phase),
            sample_stride(frame_count, 16, stride_frames=2, phase=phase),
        ):
            assert (
                indices.shape == (16,)
                and indices[0] >= 0
                and indices[-1] < frame_count
                and (np.diff(indices) >= 0).all()
            )
    if frame_count >= 31:
        assert sample_stride(frame_count, 16, stride_frames=2, phase=0.0).tolist() == list(range(0, 32, 2))
        assert sample_stride(frame_count, 16, stride_frames=2, phase=1.0)[-1] == frame_count - 1


STRONG = Recipe(**{**PRESETS["ssv2"], "flip": 0.5, "color_jitter": 0.8, "color_drop": 0.1})


def test_augmentation_same_for_all_frames_and_reproducible():
    frame = np.random.default_rng(0).integers(0, 256, (3, 24, 32), dtype=np.uint8)
    still = np.repeat(frame[None], 4, axis=0)  # (T, 3, h, w)
    results = [augment_clip(still, np.random.default_rng(seed), STRONG) for seed in range(60)]
    assert all((result == result[0]).all() and result.shape == still.shape for result in results)
    assert len({result.tobytes() for result in results}) > 50
    again = augment_clip(still, np.random.default_rng(7), STRONG)
    assert np.array_equal(again, results[7])
    moving = np.random.default_rng(1).integers(0, 256, still.shape, dtype=np.uint8)
    none = Recipe(**PRESETS["none"])
    assert np.array_equal(augment_clip(moving, np.random.default_rng(0), none), moving)
    assert sample_view(np.random.default_rng(0), none) == Views()
    mirrored = augment_clip(moving, np.random.default_rng(0), dataclasses.replace(none, flip=1.0))
    assert np.array_equal(mirrored, moving[..., ::-1])


def test_mixup_of_pairs():
    pixels, targets = torch.rand(4, 2, 3, 4, 4), torch.eye(4)
    weights, shares = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.7, 0.7, 0.6, 0.6])
    mixed, mixed_targets = mix_pairs(pixels, targets, weights, shares)
    torch.testing.assert_close(mixed[1], 0.7 * pixels[1] + 0.3 * pixels[0])
    torch.testing.assert_close(mixed_targets[1], torch.tensor([0.3, 0.7, 0, 0]))
    assert torch.equal(mixed[2], pixels[2]) and torch.equal(mixed_targets[2], targets[2])  # its neighbor is missing
    drawn = [sample_share(np.random.default_rng(seed), Recipe(mixup=0.3)) for seed in range(200)]
    assert all(0.5 <= share <= 1 for share in drawn) and 0.75 < np.mean(drawn) < 0.95


# The recipe


def test_invalid_recipes_rejected():
    with pytest.raises(ConfigError, match="flip must be a number >= 0 and <= 1, got 2"):
        Recipe(flip=2)
    with pytest.raises(ConfigError, match="even for mixup, got"):
        Recipe(batch_size=8, micro_batch_size=3, mixup=0.1)
    for preset in PRESETS.values():
        Recipe(**preset)


def test_learning_rate_warms_up_and_falls():
    recipe = Recipe(epochs=20, learning_rate=1.0, warmup_epochs=2.5)
    rates = [learning_rate(step, recipe, steps_per_epoch=10) for step in range(200)]
    assert rates[0] == pytest.approx(1 / 25) and max(rates) == rates[24] == pytest.approx(0.964, abs=0.001)
    assert rates[-1] < 1e-3 and rates[24:] == sorted(rates[24:], reverse=True)


# The loop

RECIPE = Recipe(epochs=3, batch_size=4, learning_rate=1e-2, mixup=0.2, label_smoothing=0.1, drop_path_rate=0.2)


def test_stopped_run_resumes_bit_identical(tmp_path, monkeypatch):
    expected = train_drawn(tmp_path / "whole", RECIPE)
    with pytest.raises(KeyboardInterrupt):
        train_drawn(tmp_path / "stopped", RECIPE, train=DrawnClips(kill_at=17))  # in the second epoch
    assert 3 < torch.load(tmp_path / "stopped" / STATE_FILE, weights_only=True)["progress"]["step"] < 9
    with pytest.raises(ConfigError, match="--resume continues it"):
        train_drawn(tmp_path / "stopped", RECIPE)
    with pytest.raises(ConfigError, match="the first start: seed is 1, was 0"):
        train_drawn(tmp_path / "stopped", dataclasses.replace(RECIPE, seed=1), resume=True)
    assert_same_weights(train_drawn(tmp_path / "stopped", RECIPE, resume=True), expected)
    assert (tmp_path / "stopped" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert (
        train_drawn(tmp_path / "other", dataclasses.replace(RECIPE, seed=1))["classifier.weight"]
        != expected["classifier.weight"]
    ).any()


@pytest.mark.parametrize(
    "changes", [{"micro_batch_size": 2}, {"checkpoint_activations": True}], ids=lambda changes: next(iter(changes))
)
def test_memory_saving_gives_same_weights(tmp_path, changes):
    recipe = dataclasses.replace(RECIPE, drop_path_rate=0.0)
    expected = train_drawn(tmp_path / "plain", recipe)
    assert_same_weights(train_drawn(tmp_path / "saving", dataclasses.replace(recipe, **changes)), expected, atol=1e-4)


def test_frozen_backbone(tmp_path):
    recipe = Recipe(epochs=1, batch_size=4, freeze_backbone=True, optimizer="sgd")
    trained = train_drawn(tmp_path, recipe)
    torch.manual_seed(0)
    changed = {
        name
        for name, tensor in VivitForVideoClassification(CONFIG).state_dict().items()
        if (tensor != trained[name]).any()
    }
    assert changed == {"classifier.weight", "classifier.bias"}


def run_torchrun(out):
    code = (
        "from pathlib import Path; from tests.unit.test_training import RECIPE, DISTRIBUTED, train_drawn\n"
        f"train_drawn(Path({str(out)!r}), DISTRIBUTED)"
    )
    script = out.with_suffix(".py")
    script.write_text(code)
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'scripts'}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


DISTRIBUTED = dataclasses.replace(RECIPE, drop_path_rate=0.0, epochs=2)


def test_two_processes_give_same_weights_as_one(tmp_path):
    train_drawn(tmp_path / "one", DISTRIBUTED)
    finished = run_torchrun(tmp_path / "two")
    assert finished.returncode == 0, finished.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert_same_weights(one, two, atol=1e-4)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "training" / "log.jsonl").open()] for name in ("one", "two")
    ]
    for first, second in zip(*logs):
        assert first["train_loss"] == pytest.approx(second["train_loss"], abs=1e-5)
        assert first["eval_top1"] == second["eval_top1"]


# The command


def run_finetune(videos, init, out, *more):
    return finetune.main(
        [*("--data", str(videos), "--init", str(init), "--out", str(out), "--device", "cpu", "--workers", "1")]
        + [*("--epochs", "3", "--batch-size", "4", "--learning-rate", "3e-2", "--eval-fraction", "0.4"), *more]
    )


@pytest.fixture(scope="module")
def initial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("initial")
    torch.manual_seed(0)
    VivitForVideoClassification(CONFIG).save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finetuned(videos, initial, tmp_path_factory):
    out = tmp_path_factory.mktemp("finetuned")
    assert run_finetune(videos, initial, out) == 0
    return out


def test_finetuned_checkpoint_serves(videos, finetuned):
    classifier = VideoClassifier.from_pretrained(finetuned)
    for label in LABELS:
        assert classifier.classify(videos / label / "1 ü.mp4").predictions[0][0] == label
    assert len((finetuned / "training" / "log.jsonl").read_text().splitlines()) == 3
    assert (finetuned / "README.md").is_file()


def test_corrupt_file_skipped_and_listed(videos, finetuned):
    with (finetuned / "skipped.csv").open(newline="") as file:
        ((path, code, message),) = [(row["path"], row["code"], row["message"]) for row in csv.DictReader(file)]
    assert Path(path) == videos / LABELS[0] / "corrupt.mp4" and code == "not_a_video" and message


def test_other_checkpoints_not_overwritten(tmp_path):
    VivitForVideoClassification(CONFIG).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="has a checkpoint, which training would replace"):
        train_drawn(tmp_path, Recipe(epochs=1))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_unusable_arguments_reported(videos, tmp_path, capsys):
    arguments = [f"--data={videos}", f"--init={tmp_path / 'missing'}", f"--out={tmp_path}"]
    assert finetune.main([*arguments, "--device=gpu"]) == 1
    assert "torch cannot use the device 'gpu'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        finetune.main([*arguments, "--workers=-1"])
    assert "must be an integer >= 1, got '-1'" in capsys.readouterr().err


def test_killed_run_resumes_bit_identical(videos, initial, finetuned, tmp_path, monkeypatch):
    monkeypatch.setattr("handler.training.report.write_report", lambda *arguments, **options: None)  # saves 2 s
    code = (
        "import os, signal, sys; from tests.unit import test_training as t; from handler.training import data\n"
        "calls, load = [], data.VideoClips.load\n"
        "def load_or_die(self, *arguments):\n"
        "    calls.append(arguments)\n"
        "    if len(calls) == 23: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return load(self, *arguments)\n"
        "data.VideoClips.load = load_or_die\n"
        "t.torch.set_num_threads(1)\n"
        f"t.run_finetune({str(videos)!r}, {str(initial)!r}, {str(tmp_path)!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=300)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert len((tmp_path / "training" / "log.jsonl").read_text().splitlines()) in (1, 2)
    assert run_finetune(videos, initial, tmp_path, "--resume", "--workers", "2") == 0  # their number does not matter
    assert (tmp_path / "model.safetensors").read_bytes() == (finetuned / "model.safetensors").read_bytes()
    killed, whole = (torch.load(out / STATE_FILE, weights_only=True) for out in (tmp_path, finetuned))
    assert_same_weights(killed["model"], whole["model"])
    for line, expected in zip(killed["progress"]["log"], whole["progress"]["log"]):
        assert {**line, "videos_per_s": 0} == {**expected, "videos_per_s": 0}


def test_command_reports_problems(videos, initial, finetuned, tmp_path, capsys):
    assert run_finetune(videos, initial, finetuned) == 1 and "--resume continues it" in capsys.readouterr().err
    assert run_finetune(videos, initial, finetuned, "--resume", "--flip", "0.1") == 1
    assert "flip is 0.1, was 0.5" in capsys.readouterr().err
    for label in "ab":
        (tmp_path / "bad" / label).mkdir(parents=True)
        (tmp_path / "bad" / label / "x.mp4").write_bytes(b"no video")
    assert run_finetune(tmp_path / "bad", initial, tmp_path / "out") == 1
    assert "none of the training videos could be decoded: not_a_video" in capsys.readouterr().err
