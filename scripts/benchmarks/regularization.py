"""Compare the accuracy of models that were fine-tuned with different regularization, on a small set of drawn videos.

The demo model learns four motions there and back from few videos: sideways, up and down, growing and shrinking, and
turning. All runs start from the same weights and take the same number of steps. `default` is the recipe of
`vivit finetune`; `all` adds RandAugment, mixup, label smoothing and stochastic depth, which are off by default. Their
strengths are those of the recipe epic-kitchens.

`train %` and `top-1 %` are the accuracies of the last epoch's weights on the clips that serving makes, of the videos
trained on and of those held out. Each repetition has its own seed and training videos, and the same held-out videos.
`gain` is the difference from training without regularization. `+-` is a standard error: of top-1, and of the difference
on the same videos. It covers the choice of the held-out videos, not that of the training videos and the seed, which
`min-max` over the repetitions shows.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.report import Report
from benchmarks.timing import Spread
from demo.draw_new_motions import draw
from demo.scenes import TRAINING
from handler.assets import DEMO_CHECKPOINT
from handler.cli.command import choose_device
from handler.sandbox import DecoderPool
from handler.threads import available_cores
from handler.training.data import Sample, VideoClips, start_decoders
from handler.training.distributed import Group, start_group
from handler.training.forward import Answers, ClipModel, classify_clips
from handler.training.initialization import initialize_model, initialize_processor
from handler.training.loop import fit
from handler.training.options import PRESETS, Recipe

HELP = "compare the accuracy that regularization in training brings"
QUICK = {"videos": 1, "held_out": 1, "epochs": 1, "repetitions": 1, "variants": ["none", "all"]}
# Mirroring does not change these labels.
MOTIONS = MappingProxyType(
    {
        "sideways": ("moving left", "moving right"),
        "up and down": ("moving up", "moving down"),
        "pulsing": ("growing", "shrinking"),
        "swinging": ("turning clockwise", "turning counterclockwise"),
    }
)
SETTINGS = replace(TRAINING, turn_degrees=(60.0, 180.0))
HELD_OUT_SEED = 1_000_003

NONE = PRESETS["none"]
DEFAULTS = Recipe()


def _pick(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}


_DEFAULT = _pick(DEFAULTS.to_dict(), *NONE)
_STRONG = PRESETS["epic-kitchens"]
_RAND_AUGMENT = _pick(_STRONG, "rand_augment_layers", "rand_augment_magnitude")
_TARGETS = _pick(_STRONG, "mixup", "label_smoothing", "drop_path_rate")
# Fields of Recipe that differ from the recipe "none".
VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "none": {},
        "random crop": _pick(_DEFAULT, "random_crop"),
        "flip": _pick(_DEFAULT, "flip"),
        "scale jitter": _pick(_DEFAULT, "scale_jitter"),
        "color jitter": _pick(_DEFAULT, "color_jitter", "color_drop"),
        "RandAugment": _RAND_AUGMENT,
        "mixup": _pick(_STRONG, "mixup"),
        "label smoothing": _pick(_STRONG, "label_smoothing"),
        "stochastic depth": _pick(_STRONG, "drop_path_rate"),
        "default": _DEFAULT,
        "all": {**_DEFAULT, **_RAND_AUGMENT, **_TARGETS},
    }
)

RUNS, SUMMARY = "runs", "regularization"
RUN_COLUMNS = (
    ("repetition", "{repetition}"),
    ("regularization", "{regularization}"),
    ("train %", "{train_percent:.1f}"),
    ("top-1 %", "{top1_percent:.1f}"),
    ("loss", "{loss:.2f}"),
    ("CPU s", "{cpu_s:.0f}"),
)
COLUMNS = (
    ("regularization", "{regularization}"),
    ("train %", "{train_percent:.1f}"),
    ("top-1 %", "{top1_percent:.1f}"),
    ("+-", "{top1_error:.1f}"),
    ("min-max", "{top1_low_percent:.1f}-{top1_high_percent:.1f}"),
    ("gain", "{gain:+.1f}"),
    ("+-", "{gain_error:.1f}"),
    ("min-max", "{gain_low:+.1f} to {gain_high:+.1f}"),
    ("loss", "{loss:.2f}"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--videos", type=int, default=8, metavar="N", help="videos of each motion to train on (default: 8)")
    add("--held-out", type=int, default=50, metavar="N", help="videos of each motion to evaluate on (default: 50)")
    add("--epochs", type=int, default=12, metavar="N", help="default: 12")
    add("--batch-size", type=int, default=8, metavar="N", help="default: 8")
    add("--learning-rate", type=float, default=1e-3, metavar="X", help="default: 1e-3")
    add("--repetitions", type=int, default=2, metavar="N", help="training sets and seeds (default: 2)")
    add("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), metavar="NAME", help="default: all")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if torch finds a GPU, otherwise cpu)")


def run(arguments: argparse.Namespace, report: Report) -> None:
    model = initialize_model(DEMO_CHECKPOINT, labels=list(MOTIONS), changes={})
    processor = initialize_processor(DEMO_CHECKPOINT, config=model.config)
    processes = available_cores()
    with (
        tempfile.TemporaryDirectory(prefix="regularization-") as temporary,
        start_group(choose_device(arguments.device)) as group,
        contextlib.closing(start_decoders(model.config, processor, processes=processes)) as pool,
    ):
        held_out = draw_videos(Path(temporary, "held out"), arguments.held_out, seed=HELD_OUT_SEED)
        for seed in range(arguments.repetitions):
            train = draw_videos(Path(temporary, f"train {seed}"), arguments.videos, seed=seed)
            for name in arguments.variants:
                report.progress(f"repetition {seed + 1} of {arguments.repetitions}: {name}")
                out = Path(temporary, f"{name} {seed}")
                recipe = make_recipe(name, arguments, seed=seed)
                found = measure(recipe, train, held_out, pool=pool, processes=processes, group=group, out=out)
                row = {"repetition": seed + 1, "regularization": name, **found}
                report.table(RUNS, RUN_COLUMNS, [row], title=f"run {len(report.tables.get(RUNS, [])) + 1}")
    report.table(SUMMARY, COLUMNS, summarize(report.tables[RUNS]))
    report.note(
        f"{len(train)} videos to train on, {len(held_out)} held out, {len(MOTIONS)} motions. "
        "A gain of less than twice its standard error may be chance"
    )


def draw_videos(folder: Path, count: int, *, seed: int) -> list[Sample]:
    """Draws `count` videos of each motion."""
    folder.mkdir()
    samples = []
    for label, there in enumerate(MOTIONS.values()):
        for number in range(label * count, (label + 1) * count):
            samples.append(Sample(folder / f"{number:03}.mp4", label))
            samples[-1].path.write_bytes(draw(there, number, seed=seed, settings=SETTINGS))
    return samples


def make_recipe(name: str, arguments: argparse.Namespace, *, seed: int) -> Recipe:
    return Recipe(
        **{**NONE, **VARIANTS[name]},
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        seed=seed,
    )


def measure(
    recipe: Recipe,
    train: Sequence[Sample],
    held_out: Sequence[Sample],
    *,
    pool: DecoderPool,
    processes: int,
    group: Group,
    out: Path,
) -> dict[str, Any]:
    """Trains a model, evaluates its last weights and returns a row."""
    started_s, started_cpu_s = time.monotonic(), time.process_time()
    torch.manual_seed(recipe.seed)
    changes = {"drop_path_rate": recipe.drop_path_rate}
    model = initialize_model(DEMO_CHECKPOINT, labels=list(MOTIONS), changes=changes)
    processor = initialize_processor(DEMO_CHECKPOINT, config=model.config)
    out.mkdir()
    fit(
        model,
        processor,
        train=VideoClips(train, pool),
        evaluation=VideoClips((), pool),  # the best epoch would be chosen by the videos that it is evaluated on
        out=out,
        recipe=recipe,
        group=group,
        arguments={},
        threads=processes,
        resume=False,
    )
    clip_model = ClipModel(model, processor, group, precision=recipe.precision)

    def classify(samples: Sequence[Sample]) -> Answers:
        return classify_clips(
            clip_model,
            VideoClips(samples, pool),
            group,
            batch_size=recipe.batch_size,
            threads=processes,
            is_stopped=lambda: False,
        )

    trained, answers = classify(train), classify(held_out)
    is_right = answers.logits.argmax(1) == answers.labels  # (N,)
    return {
        "train_percent": 100 * float((trained.logits.argmax(1) == trained.labels).double().mean()),
        "top1_percent": 100 * float(is_right.double().mean()),
        "is_right": is_right.tolist(),
        "loss": float(torch.nn.functional.cross_entropy(answers.logits, answers.labels)),
        "wall_s": time.monotonic() - started_s,
        "cpu_s": time.process_time() - started_cpu_s,
    }


def summarize(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Averages the repetitions.

    Args:
        runs: rows of `measure` with the name of their variant, in the order of the repetitions. `is_right` says which
            of the N held-out videos were classified correctly.

    Returns:
        A row per variant.
    """
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row in runs:
        by_name.setdefault(row["regularization"], []).append(row)
    shares = {name: np.mean([row["is_right"] for row in mine], axis=0) for name, mine in by_name.items()}  # (N,) each
    rows = []
    for name, share in shares.items():
        mine = by_name[name]
        row = {
            "regularization": name,
            "train_percent": float(np.mean([row["train_percent"] for row in mine])),
            "top1_percent": 100 * float(share.mean()),
            "top1_error": standard_error_percent(share),
            "top1_low_percent": min(row["top1_percent"] for row in mine),
            "top1_high_percent": max(row["top1_percent"] for row in mine),
            "loss": float(np.mean([row["loss"] for row in mine])),
        }
        if name != "none" and "none" in shares:
            difference = share - shares["none"]  # (N,)
            gains = [row["top1_percent"] - none["top1_percent"] for row, none in zip(mine, by_name["none"])]
            row |= {
                "gain": 100 * float(difference.mean()),
                "gain_error": standard_error_percent(difference),
                "gain_low": min(gains),
                "gain_high": max(gains),
            }
        rows.append(row)
    return rows


def standard_error_percent(values: NDArray[np.float64]) -> float:
    """Returns the standard error of the mean of values (N,), in percent."""
    return 100 * float(values.std(ddof=1) / np.sqrt(len(values)))


def plot(report: Report):
    from benchmarks.plots import bar_chart

    bars = {
        row["regularization"]: Spread(row["top1_percent"], row["top1_low_percent"], row["top1_high_percent"])
        for row in report.tables[SUMMARY]
    }
    return bar_chart({"top-1": bars}, title="Accuracy on held-out videos", unit="top-1 in %")
