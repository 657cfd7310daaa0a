"""Measures how well a checkpoint classifies labeled videos.

    vivit evaluate my-model --data videos --plot confusion.png

--data is as for `vivit finetune`: a folder with a folder of videos per label, or a .csv or .parquet file with the
columns path, label and optionally split. Prints the top-1 and top-5 accuracy, the labels with the lowest accuracy, and
the videos that could not be decoded, which are not counted. The exit status is 1 if no video could be decoded.
"""

import argparse
import functools
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from handler.classifier import VideoClassifier
from handler.cli.command import (
    VIEW_ARGUMENTS,
    CommandError,
    add_view_arguments,
    choose_device,
    given,
    integer,
    run_command,
)
from handler.clips import Clip
from handler.options import DTYPES, HandlerOptions
from handler.threads import available_cores
from handler.training.data import Data, Sample, VideoClips, read_data, start_decoders
from handler.training.evaluation import TOP, Evaluation, evaluate
from handler.training.examples import in_order
from handler.validation import ConfigError, describe_unknown
from handler.video import VideoError
from handler.views import Views

logger = logging.getLogger(__name__)

SPLITS = ("train", "eval", "all")
BATCH_CLIPS = 16  # the classifier divides them into micro-batches
MAX_WORST_LABELS = 10
PLOT_DPI = 120


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vivit evaluate ARGV` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="vivit evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a directory, or an id on the Hugging Face hub")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="folder, .csv or .parquet file")
    parser.add_argument("--split", choices=SPLITS, help="default: eval if --data has it, otherwise all")
    parser.add_argument(
        "--eval-fraction",
        type=float,
        default=0.0,
        metavar="X",
        help="that of `vivit finetune`: eval is what it held out of data without a split (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="that of `vivit finetune` (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results, with the confusion matrix")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the confusion matrix: .png, .svg, .pdf")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="compute dtype (default: float32)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if torch finds a GPU, otherwise cpu)")
    parser.add_argument(
        "--workers", type=integer(minimum=1), metavar="N", help="decoder processes (default: one per core)"
    )
    add_view_arguments(parser, default="one view, uniform")
    arguments = parser.parse_args(argv)
    return run_command("evaluate", lambda: run_evaluation(arguments))


def run_evaluation(arguments: argparse.Namespace) -> int:
    """Prints and writes the accuracy of a checkpoint. Returns 0, or 1 if no video could be decoded."""
    if arguments.plot:
        _check_matplotlib()
    classifier = VideoClassifier.from_pretrained(
        arguments.checkpoint,
        options=HandlerOptions(dtype=arguments.dtype),
        device=choose_device(arguments.device),
    )
    try:
        views = classifier.options.view_defaults.resolve(**given(arguments, VIEW_ARGUMENTS))
    except ConfigError as error:
        raise CommandError(str(error)) from error
    if classifier.config.label_heads:
        raise CommandError("expected a checkpoint with one label per video, this one has several label heads")
    data = read_data(arguments.data, eval_fraction=arguments.eval_fraction, seed=arguments.seed)
    samples = _choose_samples(data, split=arguments.split, label2id=classifier.config.label2id)
    processes = arguments.workers or available_cores()
    pool = start_decoders(classifier.config, classifier.image_processor, processes=processes)
    try:
        evaluation = _evaluate_clips(classifier, VideoClips(samples, pool), views=views, threads=processes)
    finally:
        pool.close()
    labels = list(classifier.config.id2label.values())
    _print_evaluation(evaluation, labels)
    if arguments.json:
        arguments.json.write_text(json.dumps(evaluation.to_dict(labels), indent=2) + "\n", encoding="utf-8")
    if arguments.plot and evaluation.count:
        from handler.training.figures import draw_confusion  # matplotlib is optional

        draw_confusion(evaluation.confusion, labels).savefig(arguments.plot, dpi=PLOT_DPI, facecolor="white")
    return 0 if evaluation.count else 1


def _check_matplotlib() -> None:
    """Raises CommandError before the work begins, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CommandError("--plot needs matplotlib: pip install matplotlib") from error


def _choose_samples(data: Data, *, split: str | None, label2id: Mapping[str, int]) -> list[Sample]:
    """Returns the videos of a split, with the label indices of the model.

    Raises:
        CommandError: the model lacks a label of the data, or the split has no video.
    """
    for label in data.labels:
        if label not in label2id:
            hint = describe_unknown(label, label2id)
            raise CommandError(f"--data has the label {label!r}, which the checkpoint does not have: {hint}")
    parts = {"train": data.train, "eval": data.evaluation, "all": (*data.train, *data.evaluation)}
    chosen = split or ("eval" if data.evaluation else "all")
    if not parts[chosen]:
        raise CommandError(f"--data has no video in the split {chosen!r}")
    logger.info("%d videos, split: %s", len(parts[chosen]), chosen)
    return [Sample(sample.path, label2id[data.labels[sample.label]]) for sample in parts[chosen]]


def _evaluate_clips(classifier: VideoClassifier, clips: VideoClips, *, views: Views, threads: int) -> Evaluation:
    """Classifies videos as serving does."""

    def load(index: int) -> tuple[Clip, int] | VideoError:
        try:
            return clips.load_views(index, views)
        except VideoError as error:
            return error

    logits: list[torch.Tensor] = []
    labels: list[int] = []
    errors: dict[str, str] = {}
    count = len(clips.names)
    results = zip(clips.names, in_order((functools.partial(load, index) for index in range(count)), threads=threads))
    with tqdm(total=count, unit="video", leave=False, disable=None) as progress:
        while batch := list(islice(results, BATCH_CLIPS)):
            decoded: list[Clip] = []
            for name, result in batch:
                if isinstance(result, VideoError):
                    errors[name] = f"{result.code}: {result}"
                else:
                    decoded.append(result[0])
                    labels.append(result[1])
            logits.append(classifier.logits([clip.inputs for clip in decoded]))  # (B, labels)
            progress.update(len(batch))
    return evaluate(
        torch.cat(logits),
        torch.tensor(labels, dtype=torch.int64),
        num_labels=classifier.config.num_labels,
        errors=errors,
    )


def _print_evaluation(evaluation: Evaluation, labels: Sequence[str]) -> None:
    counts, accuracies = evaluation.confusion.sum(1), evaluation.per_class
    if evaluation.count:
        print(f"top-1  {evaluation.top1:6.1%}  of {evaluation.count:,} videos")
        if len(labels) > TOP:
            print(f"top-{TOP}  {evaluation.top5:6.1%}")
        worst = [int(index) for index in np.argsort(accuracies, kind="stable") if counts[index]][:MAX_WORST_LABELS]
        print("\nlabels with the lowest top-1 accuracy:")
        for index in worst:
            print(f"  {accuracies[index]:6.1%}  of {counts[index]:<5,}  {labels[index]}")
    if evaluation.errors:
        print(f"\nnot decoded: {len(evaluation.errors):,}")
        for path, message in sorted(evaluation.errors.items()):
            print(f"  {path}: {message}")


if __name__ == "__main__":
    sys.exit(main())
