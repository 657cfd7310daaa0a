"""Accuracy, figures and model cards of training runs."""

import hashlib
import itertools
import json
import logging
import sys

import numpy as np
import pytest
import torch
import yaml

import handler.training
from handler import VivitConfig, VivitForVideoClassification, VivitImageProcessor
from handler.training.evaluation import Evaluation, evaluate
from handler.training.report import write_report

LABELS = ["walk|run", "jump", "sit  down", "unused"]
LOG = [
    {
        "epoch": epoch,
        "train_loss": 2 / epoch,
        "train_accuracy": 0.2 * epoch,
        "eval_loss": float("nan") if epoch == 2 else 2.5 / epoch,
        "eval_top1": None if epoch == 2 else min(0.45, 0.15 * epoch),  # epochs 3 and 4 are equally accurate
        "eval_top5": 0.9,
        "learning_rate": 1e-4 / epoch,
        "videos_per_s": 10.0 + epoch,
    }
    for epoch in range(1, 5)
]
RECIPE = {"init": "owner/model", "seed": 7, "label_smoothing": 0.3, "train_crop": [0.5, 1.0]}
DATA = {"train": {"walk|run": 1200, "jump": 34, "sit  down": 5}, "val": {"walk|run": 3, "jump": 2, "sit  down": 1}}


@pytest.fixture
def checkpoint(tmp_path):
    """A directory with a model for LABELS, not trained."""
    directory = tmp_path / "my checkpoint"
    config = VivitConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, id2label=dict(enumerate(LABELS)))
    VivitForVideoClassification(config).save_pretrained(directory)
    VivitImageProcessor().save_pretrained(directory)
    return directory


def some_evaluation() -> Evaluation:
    confusion = np.array([[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    return Evaluation(confusion=confusion, top5=1.0)


def test_accuracies_match_sorting_every_row():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(200, 12, generator=generator)
    labels = torch.randint(0, 11, (200,), generator=generator)  # no video has label 11
    evaluation = evaluate(logits, labels, num_labels=12)
    ranked = [sorted(range(12), key=lambda label: -row[label]) for row in logits.tolist()]
    pairs = list(zip(labels.tolist(), ranked))
    assert evaluation.count == 200
    assert evaluation.top1 == np.mean([best[0] == label for label, best in pairs])
    assert evaluation.top5 == np.mean([label in best[:5] for label, best in pairs])
    for true, predicted in itertools.product(range(12), repeat=2):
        assert evaluation.confusion[true, predicted] == sum((true, predicted) == (t, best[0]) for t, best in pairs)
    assert np.isnan(evaluation.per_class[11])
    assert evaluation.per_class[4] == np.mean([best[0] == 4 for label, best in pairs if label == 4])


def test_equal_logits_do_not_all_count_as_top5():
    evaluation = evaluate(torch.zeros(10, 10), torch.arange(10), num_labels=10)
    assert (evaluation.top1, evaluation.top5) == (0.1, 0.5)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.full((2, 3), torch.nan), [0, 1], "finite"),
        (torch.zeros(2, 3), [0, 3], "0 to 3"),
        (torch.zeros(2, 3), [-1, 0], "-1 to 0"),
        (torch.zeros(2, 4), [0, 1], r"\(N, 3\)"),
        (torch.zeros(2, 3), [0, 1, 2], r"\(3,\)"),
    ],
)
def test_invalid_logits_and_labels_rejected(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate(logits, torch.tensor(labels), num_labels=3)


def test_evaluation_without_videos_is_valid_json():
    evaluation = evaluate(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), num_labels=3)
    values = json.loads(json.dumps(evaluation.to_dict(["a", "b", "c"]), allow_nan=False))
    assert (values["videos"], values["top1"], values["top5"]) == (0, None, None)
    assert values["per_class"] == {"a": None, "b": None, "c": None}


def test_model_card_describes_the_run(checkpoint):
    write_report(checkpoint, log=LOG, evaluation=some_evaluation(), recipe=RECIPE, data=DATA, skipped=3)
    _, header, text = (checkpoint / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["pipeline_tag"] == "video-classification"
    assert metadata["library_name"] == "transformers"
    assert metadata["base_model"] == "owner/model"
    assert "license" not in metadata
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "| top-1 | 66.7% |" in rows
    assert not any("top-5" in row for row in rows)  # there are four labels
    worst_first = [row for row in rows if "%" in row and "top" not in row and "chance" not in row]
    assert worst_first == ["| sit down | 0.0% | 1 |", "| walk\\|run | 66.7% | 3 |", "| jump | 100.0% | 2 |"]
    assert "| all | 1,239 | 6 |" in rows
    assert "| walk\\|run | 1,200 | 3 |" in rows
    assert "| unused | 0 | 0 |" in rows
    for name, value in RECIPE.items():
        assert f"| `{name}` | `{json.dumps(value)}` |" in rows
    digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert any(digest in row for row in rows)
    assert "3 of these videos could not be decoded" in text
    for name in ("curves.png", "confusion.png"):
        assert f"({name})" in text
        assert (checkpoint / name).read_bytes().startswith(b"\x89PNG")


def test_model_card_without_matplotlib_evaluation_and_hub_id(checkpoint, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)  # as if not installed
    monkeypatch.delitem(sys.modules, "handler.training.figures", raising=False)
    monkeypatch.delattr(handler.training, "figures", raising=False)
    with caplog.at_level(logging.WARNING):
        write_report(checkpoint, log=LOG, evaluation=None, recipe={"init": str(checkpoint)}, data=DATA, skipped=0)
    assert [record.message for record in caplog.records if "pip install matplotlib" in record.message]
    text = (checkpoint / "README.md").read_text()
    assert "was not evaluated" in text
    assert "base_model" not in text
    assert ".png" not in text
    assert not list(checkpoint.glob("*.png"))


@pytest.mark.parametrize("count", [2, 30, 400])
def test_labels_of_confusion_matrix_readable(count):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from handler.training.figures import draw_confusion

    labels = [f"{index}: doing something that has a long description" for index in range(count)]
    rng = np.random.default_rng(0)
    confusion = rng.poisson(3 / count, (count, count)) + 50 * np.eye(count, dtype=np.int64)
    confusion[count - 1, 0] = 40  # the most frequent confusion
    figure = draw_confusion(confusion, labels)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # only makes the layout
    matrix = figure.axes[0]
    shown = [text.get_text() for text in matrix.get_yticklabels()]
    assert len(shown) == min(count, 30)
    assert shown[0].startswith("0: ")
    assert shown[-1].startswith(f"{count - 1}: ")
    boxes = [text.get_window_extent(renderer) for text in matrix.get_yticklabels()]
    assert all(below.y1 < above.y0 for above, below in itertools.pairwise(boxes))
    for box in boxes + [text.get_window_extent(renderer) for text in matrix.get_xticklabels()]:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_curves_show_the_best_epoch_and_leave_out_missing_values():
    from handler.training.figures import draw_curves

    loss, accuracy, rate = draw_curves(LOG).axes
    evaluation = next(line for line in loss.lines if line.get_label() == "evaluation")
    assert list(evaluation.get_xdata()) == [1, 3, 4]
    assert "45.0% after epoch 4" in accuracy.get_title(loc="left")
    assert list(rate.lines[0].get_ydata()) == [entry["learning_rate"] for entry in LOG]
