"""The command `vivit evaluate`."""

import json
import shutil

import pytest

from handler.assets import DEMO_CHECKPOINT, DEMO_CLIPS
from handler.classifier import VideoClassifier
from handler.cli.main import main


@pytest.fixture
def labeled_clips(tmp_path):
    """Clips of the demo: two are right, one has a wrong label, and one is truncated."""
    for label, clips in {"moving left": ["moving-left.mp4", "moving-up.mkv"], "shrinking": ["shrinking.mkv"]}.items():
        (tmp_path / "data" / label).mkdir(parents=True)
        for clip in clips:
            shutil.copy(DEMO_CLIPS / clip, tmp_path / "data" / label)
    (tmp_path / "data" / "shrinking" / "broken.mp4").write_bytes((DEMO_CLIPS / "still.mkv").read_bytes()[:100])
    return tmp_path / "data"


def test_evaluate_command_reports_accuracy_and_broken_files(labeled_clips, tmp_path, capsys):
    files = {"json": tmp_path / "result.json", "plot": tmp_path / "confusion.png"}
    options = [f"--{name}={path}" for name, path in files.items()]
    assert main(["evaluate", str(DEMO_CHECKPOINT), f"--data={labeled_clips}", "--workers=1", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["top-1", "66.7%", "of", "3", "videos"]
    assert lines[lines.index("labels with the lowest top-1 accuracy:") + 1].split()[-2:] == ["moving", "left"]
    assert f"  {labeled_clips / 'shrinking' / 'broken.mp4'}: " in lines[-1]
    result = json.loads(files["json"].read_text())
    assert result["per_class"] == dict.fromkeys(result["labels"]) | {"moving left": 0.5, "shrinking": 1.0}
    row = result["confusion"][result["labels"].index("moving left")]
    assert {result["labels"][index] for index, count in enumerate(row) if count} == {"moving left", "moving up"}
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


def test_evaluate_command_averages_views(labeled_clips, tmp_path, capsys, monkeypatch):
    counts = []
    forward = VideoClassifier.view_logits_or_errors

    def counted(self, clips):
        counts.extend(len(clip) for clip in clips)
        return forward(self, clips)

    monkeypatch.setattr(VideoClassifier, "view_logits_or_errors", counted)
    options = ["--views=2x3", "--sampling=dense", "--stride-frames=1", "--workers=1"]
    assert main(["evaluate", str(DEMO_CHECKPOINT), f"--data={labeled_clips}", *options]) == 0
    assert counts == [6, 6, 6] and "of 3 videos" in capsys.readouterr().out
    assert main(["evaluate", str(DEMO_CHECKPOINT), f"--data={labeled_clips}", "--views=5x5"]) == 1
    assert "at most 12 views, got 5x5 = 25" in capsys.readouterr().err


def test_evaluate_command_rejects_unknown_labels(labeled_clips, capsys):
    (labeled_clips / "shrinking").rename(labeled_clips / "shrinks")
    assert main(["evaluate", str(DEMO_CHECKPOINT), f"--data={labeled_clips}"]) == 1
    assert "did you mean 'shrinking'?" in capsys.readouterr().err


def test_evaluate_command_reads_table_without_training_videos(tmp_path, capsys):
    splits = {"moving-left.mp4": "eval", "moving-up.mkv": "val", "still.mkv": "test"}
    rows = [f"{DEMO_CLIPS / clip},{clip[:-4].replace('-', ' ')},{split}\n" for clip, split in splits.items()]
    (tmp_path / "data.csv").write_text("path,label,split\n" + "".join(rows))
    assert main(["evaluate", str(DEMO_CHECKPOINT), f"--data={tmp_path / 'data.csv'}", "--workers=1"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["top-1", "100.0%", "of", "3", "videos"]
