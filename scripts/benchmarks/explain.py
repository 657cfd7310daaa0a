"""Measure explanations: what they cost, and whether they are faithful.

`cost` has the time of an explanation as a multiple of a forward pass of the same clip, and the memory that each needs
at most in addition to the model. `faithfulness` is measured with the demo model on clips in which objects move, drawn
in shapes and textures that it was not trained on: how much the score falls without the hottest fifth of the tubelets
and without a random fifth, in how many clips the hottest tubelet is on a moving object or beside it (`pointed`), and in
how many the heat per area is at least twice as high on the objects as elsewhere (`on object`). `shared` is the share of
the hottest fifth that both methods agree on, 20 % by chance.
"""

import argparse
import dataclasses
import statistics
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.checkpoints import CONFIGS
from benchmarks.report import Report
from benchmarks.timing import Candidate, Spread, time_interleaved
from handler.assets import DEMO_CHECKPOINT
from handler.classifier import VideoClassifier
from handler.explanation.result import METHODS
from handler.models.config import VivitConfig
from handler.models.vivit import VivitForVideoClassification
from handler.options import HandlerOptions
from handler.processing.image_processor import VivitImageProcessor

HELP = "what explanations cost and whether they are faithful"
QUICK = {"size": "tiny", "repetitions": 1, "clips": 2}
COST, FAITHFULNESS = "cost", "faithfulness"
COST_COLUMNS = (
    ("model", "{model}"),
    ("forward ms", "{forward_ms:.0f}"),
    ("explanation ms", "{explanation_ms:.0f}"),
    ("min-max", "{explanation_low_ms:.0f}-{explanation_high_ms:.0f}"),
    ("ratio", "{ratio:.2f}"),
    ("forward MB", "{forward_mb:.0f}"),
    ("explanation MB", "{explanation_mb:.0f}"),
)
FAITHFULNESS_COLUMNS = (
    ("method", "{method}"),
    ("clips", "{clips}"),
    ("drop", "{drop:.3f}"),
    ("random", "{random_drop:.3f}"),
    ("pointed", "{pointed_at:.1%}"),
    ("by chance", "{chance:.1%}"),
    ("on object", "{on_object:.1%}"),
    ("shared", "{shared:.1%}"),
)
ATTENTION_TYPES = (
    "spatiotemporal",
    "factorised_encoder",
    "factorised_self_attention",
    "factorised_dot_product",
)
SEED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=tuple(CONFIGS), default="base", help="the model (default: base)")
    parser.add_argument(
        "--models", nargs="+", choices=ATTENTION_TYPES, default=ATTENTION_TYPES, help="attention types (default: all)"
    )
    parser.add_argument("--dtype", default="float32", help="default: float32")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="timed calls (default: 3)")
    parser.add_argument("--clips", type=int, default=200, metavar="N", help="explained clips (default: 200)")


def run(arguments: argparse.Namespace, report: Report) -> None:
    rows = []
    for attention_type in arguments.models if arguments.repetitions else ():
        report.progress(f"timing {attention_type}")
        rows.append(measure_cost(attention_type, arguments))
    if rows:
        report.table(COST, COST_COLUMNS, rows)
    if arguments.clips:
        report.progress("explaining clips of the demo model")
        report.table(FAITHFULNESS, FAITHFULNESS_COLUMNS, measure_faithfulness(arguments.clips))


def measure_cost(attention_type: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns a row with times and memory of one model."""
    base = CONFIGS[arguments.size]
    pooling = "cls" if attention_type in ("spatiotemporal", "factorised_encoder") else "mean"
    layers = 4 if attention_type == "factorised_encoder" else None
    config = dataclasses.replace(
        base, attention_type=attention_type, classifier_pooling=pooling, num_temporal_layers=layers
    )
    classifier = make_classifier(config, dtype=arguments.dtype, device=arguments.device)
    shape = (1, config.num_frames, config.num_channels, config.image_height, config.image_width)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)  # (1, T, C, h, w)
    from demo.faithfulness import as_clip

    clip = as_clip(pixels[0], height=config.image_height, width=config.image_width)
    calls = {"forward": partial(classifier.logits, [pixels]), "explanation": partial(classifier.explain_clip, clip)}
    timings, failures = time_interleaved(
        [Candidate(name, call) for name, call in calls.items()], repetitions=arguments.repetitions
    )
    if failures:
        raise RuntimeError(f"explaining failed: {failures}")
    row: dict[str, Any] = {"model": attention_type}
    for name, timing in timings.items():
        row |= Spread.of(timing.wall_ms).to_row(name, "ms")
        row[f"{name}_mb"] = peak_mb(calls[name], device=classifier.device)
    pairs = zip(timings["explanation"].wall_ms, timings["forward"].wall_ms)
    return {**row, "ratio": statistics.median(explanation / forward for explanation, forward in pairs)}


def make_classifier(config: VivitConfig, *, dtype: str, device: str) -> VideoClassifier:
    """A classifier with random weights."""
    torch.manual_seed(0)
    size = {"height": config.image_height, "width": config.image_width}
    processor = VivitImageProcessor(size=size, do_center_crop=False)
    options = HandlerOptions(dtype=dtype)
    return VideoClassifier(VivitForVideoClassification(config).eval(), processor, options=options, device=device)


def peak_mb(call: Any, *, device: torch.device) -> float | None:
    """Memory that a call needs at most in addition to what is in use, in 10^6 bytes. On a CPU None outside Linux."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None
    reset.write_text("5")  # sets the peak to what is in use
    before = psutil.Process().memory_info().rss
    call()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return (int(line.split()[1]) * 1024 - before) / 1e6


def measure_faithfulness(count: int) -> list[dict[str, Any]]:
    """Returns a row for each method."""
    from demo.faithfulness import DELETED_SHARE, draw_clips, measure

    classifier = VideoClassifier.from_pretrained(DEMO_CHECKPOINT)
    results: dict[str, list[Any]] = {method: [] for method in METHODS}
    shared = []
    for drawn in islice(draw_clips(classifier, seed=SEED), count):
        hottest = []
        for method in METHODS:
            explanation = classifier.explain_clip(drawn.clip, method=method)
            results[method].append(measure(classifier, drawn, explanation))
            hottest.append(set(explanation.heat.ravel().argsort()[-round(DELETED_SHARE * explanation.heat.size) :]))
        shared.append(len(set.intersection(*hottest)) / len(hottest[0]))
    return [
        {
            "method": method,
            "clips": len(found),
            "drop": statistics.mean(each.drop for each in found),
            "random_drop": statistics.mean(each.random_drop for each in found),
            "pointed_at": statistics.mean(each.pointed_at for each in found),
            "chance": statistics.mean(each.chance for each in found),
            "on_object": statistics.mean(each.density_ratio >= 2 for each in found),
            "shared": statistics.mean(shared),
        }
        for method, found in results.items()
    ]


def plot(report: Report):
    from benchmarks.plots import bar_chart

    rows = report.tables[COST]
    groups = {
        row["model"]: {name: Spread.from_row(row, name, "ms") for name in ("forward", "explanation")} for row in rows
    }
    return bar_chart(groups, title="One clip (lower is better)", unit="time in ms")
