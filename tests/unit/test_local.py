"""`vivit classify --checkpoint`: classification without a server."""

import json
import shutil
import zipfile

import psutil
import pytest

from handler import VideoClassifier
from handler.assets import DEMO_CHECKPOINT, DEMO_CLIPS
from handler.cli import classify

CLIPS = [DEMO_CLIPS / "moving-left.mp4", DEMO_CLIPS / "growing.webm"]


@pytest.fixture(autouse=True)
def no_process_is_left():
    before = psutil.Process().children()
    yield
    assert psutil.Process().children() == before


def run(capsys, *arguments):
    """(exit status, answers, error output) of `vivit classify --json`."""
    status = classify.main(["--json", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else [], err


def test_answers_without_server_are_those_of_the_classifier(capsys):
    status, answers, _ = run(capsys, "--checkpoint", "demo", *CLIPS)
    assert status == 0
    classifier = VideoClassifier.from_pretrained(DEMO_CHECKPOINT)
    for answer, clip in zip(answers, CLIPS):
        expected = classifier.classify(clip)
        assert [each["label"] for each in answer["predictions"]] == [label for label, _ in expected.predictions]
        assert [each["score"] for each in answer["predictions"]] == pytest.approx(
            [score for _, score in expected.predictions], abs=1e-5
        )
        assert answer["video"]["frame_times_s"] == pytest.approx(expected.clip.times_s, abs=1e-3)


def test_views_of_command_line(capsys):
    clip = DEMO_CLIPS / "moving-left.mp4"
    options = ["--views", "3x1", "--sampling", "dense", "--stride-frames", "1", "--start-s", "0.1"]
    status, (answer,), _ = run(capsys, clip, "--checkpoint", "demo", *options)
    classifier = VideoClassifier.from_pretrained(DEMO_CHECKPOINT)
    expected = classifier.classify(clip, views="3x1", sampling="dense", stride_frames=1, start_s=0.1)
    assert status == 0 and answer["agreement"] == expected.agreement
    assert [view["label"] for view in answer["views"]] == [view.predictions[0][0] for view in expected.views]


def test_options_in_archive_apply(tmp_path, capsys):
    archive = tmp_path / "model.mar"
    with zipfile.ZipFile(archive, "w") as file:
        for path in DEMO_CHECKPOINT.iterdir():
            file.write(path, path.name)
        file.writestr("model-config.yaml", "responseTimeout: 300\nhandler:\n  top_k: 2\n")
    _, (answer,), _ = run(capsys, "--checkpoint", archive, CLIPS[0])
    assert len(answer["predictions"]) == 2
    _, (answer,), _ = run(capsys, "--checkpoint", archive, "--top-k", 3, CLIPS[0])
    assert len(answer["predictions"]) == 3


def test_errors_of_videos_do_not_affect_others(tmp_path, capsys):
    (tmp_path / "text.mp4").write_text("text")
    status, answers, _ = run(capsys, "--checkpoint", "demo", tmp_path / "text.mp4", tmp_path / "none.mp4", CLIPS[0])
    assert status == 1
    assert [answer.get("error", {}).get("code") for answer in answers] == ["not_a_video", "no_file", None]


@pytest.mark.parametrize("damaged", ["config.json", "model.safetensors"])
def test_unusable_checkpoint_is_reported(tmp_path, capsys, damaged):
    shutil.copytree(DEMO_CHECKPOINT, tmp_path, dirs_exist_ok=True)
    (tmp_path / damaged).write_text("damaged")
    status, answers, err = run(capsys, "--checkpoint", tmp_path, CLIPS[0])
    assert (status, answers) == (1, [])
    assert err.startswith(f"vivit classify: {tmp_path} cannot be used: ") and damaged in err


def test_file_that_is_no_archive_is_reported(tmp_path, capsys):
    (tmp_path / "model.mar").write_text("text")
    status, _, err = run(capsys, "--checkpoint", tmp_path / "model.mar", CLIPS[0])
    assert (status, "model.mar cannot be used: File is not a zip file" in err) == (1, True)
