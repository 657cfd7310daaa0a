"""Time the forward pass, compare its logits with transformers, and relate its speed to the machine's peak.

    ours                our model called with normalized pixels, like that of transformers
    ours, served        what a worker does with a batch: bytes in, logits out, `micro_batch_clips` per forward pass
    ours, int8          the same with `dtype: int8`; on a CPU, listed with float32
    transformers sdpa   its VivitForVideoClassification with SDPA attention
    transformers eager  the same with eager attention
    matmul              a product of large square matrices in the same dtype: the rate that the machine can reach
    matmul, oneDNN      the same with oneDNN, on processors where torch's default, MKL, does not use AVX-512

`of matmul` and `of oneDNN` are the median rate as a share of the fastest repetition of these products. The rate
counts the floating-point operations of the task: 0.90 TFLOP per clip for ViViT-B/16x2. `x sdpa` is the speed relative
to transformers sdpa, `x float32 sdpa` relative to it in float32, `logit difference` the largest difference from it in
float32.

With `--size demo` a second table lists, for each dtype, the accuracy on clips of the independent renderer and on hard
clips of the training renderer, and the number of clips whose top label is not that of float32.

`--variants` compares the paper's four models instead, with random weights and as a worker runs them. `work`, `time`
and `CPU time` are relative to the spatiotemporal model, as are those of table 2 of the paper, measured on a TPU.
"""

import argparse
import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import checkpoints, libraries
from benchmarks.report import Report
from benchmarks.timing import OURS, Candidate, Spread, Timing, limit_cores, ratio_to_ours, time_interleaved
from handler.classifier import VideoClassifier
from handler.kernels import onednn
from handler.kernels.cpuinfo import HALF_PRECISION_FEATURES, half_precision_features
from handler.models.config import VivitConfig
from handler.models.cost import count_multiply_adds, count_parameters
from handler.models.vivit import VivitForVideoClassification
from handler.options import HandlerOptions
from handler.processing.image_processor import VivitImageProcessor

HELP = "the forward pass"
QUICK = {
    "size": "tiny",
    "device": "cpu",
    "dtypes": ["float32"],
    "batches": [1, 2],
    "threads": 1,
    "matmul_side": 256,
    "repetitions": 1,
}
TABLE, AGREEMENT, VARIANTS = "model", "agreement", "variants"
MATMUL, ONEDNN = "matmul", "matmul, oneDNN"
SERVED, INT8 = "ours, served", "ours, int8"
SDPA = "transformers sdpa"
MATMULS_PER_CALL = {"cpu": 1, "cuda": 20}  # several, so that kernel launches do not dominate on a GPU
COLUMNS = (
    ("dtype", "{dtype}"),
    ("batch", "{batch}"),
    ("model", "{model}"),
    ("ms", "{wall_ms:.1f}"),
    ("min-max", "{wall_low_ms:.1f}-{wall_high_ms:.1f}"),
    ("x ours", "{wall_ratio:.2f}"),
    ("x sdpa", "{sdpa_factor:.2f}"),
    ("x float32 sdpa", "{float32_sdpa_factor:.2f}"),
    ("clips/s", "{clips_per_s:.2f}"),
    ("TFLOP/s", "{tflops_per_s:.3f}"),
    ("of matmul", "{matmul_share:.0%}"),
    ("of oneDNN", "{onednn_share:.0%}"),
    ("logit difference", "{logit_difference:.1e}"),
)
AGREEMENT_COLUMNS = (
    ("renderer", "{renderer}"),
    ("dtype", "{dtype}"),
    ("clips", "{clips}"),
    ("correct", "{right_share:.1%}"),
    ("other label than float32", "{changed_clips}"),
    ("logit difference", "{logit_difference:.1e}"),
)
VARIANTS_COLUMNS = (
    ("dtype", "{dtype}"),
    ("batch", "{batch}"),
    ("attention type", "{attention_type}"),
    ("parameters", "{parameters_millions:.1f} M"),
    ("multiply-adds", "{multiply_adds_billions:.1f} G"),
    ("ms", "{wall_ms:.1f}"),
    ("min-max", "{wall_low_ms:.1f}-{wall_high_ms:.1f}"),
    ("work", "{work_ratio:.2f}"),
    ("time", "{time_ratio:.2f}"),
    ("CPU time", "{cpu_ratio:.2f}"),
    ("paper's work", "{paper_work_ratio:.2f}"),
    ("paper's time", "{paper_time_ratio:.2f}"),
)
# Table 2 of the paper, for B/16x2 at 32 x 224 x 224: billions of multiply-adds, and milliseconds on a TPU.
PAPER_VARIANTS = {
    "spatiotemporal": (455.2, 58.9),
    "factorised_encoder": (284.4, 17.4),
    "factorised_self_attention": (372.3, 31.7),
    "factorised_dot_product": (277.1, 22.9),
}
# Letters in shapes: B clips, T frames, C channels, h and w pixels.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoints.add_model_arguments(parser, batches="1 2 4 8 16 32 on a GPU, 1 2 on a CPU")
    checkpoints.add_matmul_argument(parser)
    parser.add_argument(
        "--repetitions", type=int, metavar="N", help="timed calls per model (default: 20 on a GPU, 3 on a CPU)"
    )
    parser.add_argument(
        "--agreement-clips",
        type=int,
        default=324,
        metavar="N",
        help="clips per renderer of the second table with --size demo (default: 324)",
    )
    parser.add_argument("--variants", action="store_true", help="compare the paper's four models")


def run(arguments: argparse.Namespace, report: Report) -> None:
    on_gpu = arguments.device == "cuda"
    dtypes = arguments.dtypes or (["float16", "float32"] if on_gpu else ["float32", *half_precision_names()])
    batches = arguments.batches or ([1, 2, 4, 8, 16, 32] if on_gpu else [1, 2])
    repetitions = arguments.repetitions or (20 if on_gpu else 3)
    matmul_side = checkpoints.matmul_side(arguments)
    report.add_settings({"dtypes": dtypes, "batches": batches, "repetitions": repetitions, "matmul_side": matmul_side})
    if arguments.variants:
        with limit_cores(arguments.threads):
            config = checkpoints.load_config(arguments.size)
            compare_variants(config, torch.device(arguments.device), dtypes, batches, repetitions, report)
        return
    report.note(f"torch.get_float32_matmul_precision() is {torch.get_float32_matmul_precision()!r}")
    transformers = libraries.load("transformers", report)
    if transformers:
        transformers.logging.disable_progress_bar()
    with (
        tempfile.TemporaryDirectory(prefix="vivit-checkpoint-") as folder,
        limit_cores(arguments.threads),
        torch.inference_mode(),
    ):
        checkpoint = checkpoints.save_checkpoint(arguments.size, Path(folder))
        device = torch.device(arguments.device)
        benchmark = ModelBenchmark(checkpoint, device, max(batches), matmul_side, transformers, report)
        for dtype in dtypes:
            benchmark.measure(dtype, batches, repetitions)
        if arguments.size == "demo":
            dtypes = ("float32", "float16", "bfloat16") if on_gpu else ("float32", "float16", "bfloat16", "int8")
            report_agreement(checkpoint, device, dtypes, arguments.agreement_clips, report)


def compare_variants(
    config: VivitConfig,
    device: torch.device,
    dtypes: Sequence[str],
    batches: Sequence[int],
    repetitions: int,
    report: Report,
) -> None:
    """Adds a table per dtype and batch size, with a row for each of the paper's models."""
    pixels = checkpoints.draw_input_clips(config, max(batches))  # uint8 (B, T, C, h, w)
    configs = {
        name: dataclasses.replace(config, attention_type=name, classifier_pooling=None) for name in PAPER_VARIANTS
    }
    work = {name: count_multiply_adds(variant) for name, variant in configs.items()}
    side = {"shortest_edge": min(config.image_height, config.image_width)}
    processor = VivitImageProcessor(size=side, crop_size=(config.image_height, config.image_width))
    baseline, (paper_work, paper_ms) = next(iter(PAPER_VARIANTS.items()))
    for dtype in dtypes:
        classifiers = {}
        for name, variant in configs.items():
            model = VivitForVideoClassification(variant)
            classifiers[name] = VideoClassifier(model, processor, options=HandlerOptions(dtype=dtype), device=device)
            classifiers[name].warm_up()
        for batch in batches:
            report.progress(f"{dtype}, batch {batch}")
            clips = list(pixels[:batch, None])
            candidates = [
                Candidate(name, functools.partial(classifier.logits, clips)) for name, classifier in classifiers.items()
            ]
            timings, failures = time_interleaved(candidates, repetitions=repetitions)
            for name, reason in failures.items():
                report.note(f"{name} failed in {dtype} at batch {batch}: {reason}")
            spreads = {name: Spread.of(timing.wall_ms) for name, timing in timings.items()}
            cpu_ms = {name: statistics.median(timing.cpu_ms) for name, timing in timings.items()}
            rows = [
                {
                    "dtype": dtype,
                    "batch": batch,
                    "attention_type": name,
                    "parameters_millions": count_parameters(configs[name]) / 1e6,
                    "multiply_adds_billions": work[name] / 1e9,
                    **spread.to_row("wall", "ms"),
                    "work_ratio": work[name] / work[baseline],
                    "time_ratio": spread.median / spreads[baseline].median if baseline in spreads else None,
                    "cpu_ratio": cpu_ms[name] / cpu_ms[baseline] if baseline in cpu_ms else None,
                    "paper_work_ratio": PAPER_VARIANTS[name][0] / paper_work,
                    "paper_time_ratio": PAPER_VARIANTS[name][1] / paper_ms,
                }
                for name, spread in spreads.items()
            ]
            report.table(VARIANTS, VARIANTS_COLUMNS, rows, title=f"{dtype}, batch {batch}")


def half_precision_names() -> list[str]:
    """The names of the half-precision dtypes that this CPU has units for."""
    return [str(dtype).removeprefix("torch.") for dtype in HALF_PRECISION_FEATURES if half_precision_features(dtype)]


def report_agreement(checkpoint: Path, device: torch.device, dtypes: Sequence[str], clips: int, report: Report) -> None:
    """Adds a row per renderer and dtype; all are compared with the first dtype."""
    from demo.evaluate import DEFAULT_SEED, draw_evaluation_clip, draw_independent_clip

    classifiers = [
        VideoClassifier.from_pretrained(checkpoint, options=HandlerOptions(dtype=dtype), device=device)
        for dtype in dtypes
    ]
    rows = []
    for renderer, draw, seed in (
        ("independent", draw_independent_clip, 0),
        ("training, hard", draw_evaluation_clip, DEFAULT_SEED),
    ):
        report.progress(f"drawing and classifying {clips} clips ({renderer})")
        labels, logits_by_clip = [], []
        for number in range(clips):
            clip = draw(seed, number)
            pixels = classifiers[0].load_clip(clip.video).pixels
            labels.append(classifiers[0].config.label2id[clip.label])
            logits_by_clip.append(torch.cat([classifier.logits([pixels]) for classifier in classifiers]))
        all_logits = torch.stack(logits_by_clip, dim=1)  # (dtypes, clips, labels)
        expected = torch.tensor(labels)  # (clips,)
        top_1 = all_logits.argmax(-1)  # (dtypes, clips)
        rows += [
            {
                "renderer": renderer,
                "dtype": dtype,
                "clips": clips,
                "right_share": float((predicted == expected).float().mean()),
                "changed_clips": int((predicted != top_1[0]).sum()),
                "logit_difference": float((logits - all_logits[0]).abs().max()),
            }
            for dtype, predicted, logits in zip(dtypes, top_1, all_logits)
        ]
    report.table(AGREEMENT, AGREEMENT_COLUMNS, rows)


class ModelBenchmark:
    """The models on one device, and the logits they are compared with.

    Args:
        checkpoint: A checkpoint's directory.
        device: The models' device.
        clips: Number of different input clips, the largest batch.
        matmul_side: Rows and columns of the matrices in the matrix products.
        transformers: The module; None if it is missing.
        report: Receives the table.
    """

    def __init__(
        self,
        checkpoint: Path,
        device: torch.device,
        clips: int,
        matmul_side: int,
        transformers: ModuleType | None,
        report: Report,
    ):
        self.checkpoint, self.device, self.matmul_side = checkpoint, device, matmul_side
        self.transformers, self.report = transformers, report
        self.float32_sdpa_ms: dict[int, float] = {}  # median by batch size, once measured
        processor = VivitImageProcessor.from_pretrained(checkpoint)
        model = VivitForVideoClassification.from_pretrained(checkpoint)
        self.flops = 2 * count_multiply_adds(model.config)
        report.note(f"{self.flops / 1e12:.3g} TFLOP per clip")
        self.pixels = checkpoints.draw_input_clips(model.config, clips)  # uint8 (B, T, C, h, w)
        scale, bias = (torch.from_numpy(values)[:, None, None] for values in processor.scale_and_bias())  # (C, 1, 1)
        self.inputs = torch.addcmul(bias, torch.from_numpy(self.pixels).float(), scale)  # (B, T, C, h, w)
        reference = model if transformers is None else self._load_theirs("sdpa", "float32")
        reference = reference.to(device)
        # One clip per call, which fits into the memory of any device.
        self.expected = torch.cat([reference(clip.to(device)).logits.cpu() for clip in self.inputs.split(1)])

    def measure(self, dtype: str, batches: list[int], repetitions: int) -> None:
        """Times all models in one dtype and adds a table per batch size to the report."""
        forwards = self._forwards(dtype)
        matmuls = [Candidate(name, multiply) for name, multiply in self._matmuls(dtype).items()]
        for batch in batches:
            self.report.progress(f"{dtype}, batch {batch}")
            models = [Candidate(name, forward(batch)) for name, forward in forwards.items()]
            logits: dict[str, torch.Tensor] = {}
            timings, failures = time_interleaved(
                [*models, *matmuls], repetitions=repetitions, inspect=logits.__setitem__
            )
            for name, reason in failures.items():
                self.report.note(f"{name} failed in {dtype} at batch {batch}: {reason}")
            expected = self.expected[:batch]
            differences = {
                name: float((logits[name].float().cpu() - expected).abs().max()) for name in forwards if name in logits
            }
            self._report(dtype, batch, timings, differences)

    def _forwards(self, dtype: str) -> dict[str, Callable[[int], Callable[[], torch.Tensor]]]:
        """Returns, by model name, a function that takes a batch size and returns the call to time."""

        def with_floats(model):
            def forward(batch):
                inputs = self.inputs[:batch].to(self.device, getattr(torch, dtype))
                return lambda: model(inputs).logits

            return forward

        ours = VivitForVideoClassification.from_pretrained(self.checkpoint, torch_dtype=dtype).to(self.device)
        forwards = {OURS: with_floats(ours), SERVED: self._with_bytes(HandlerOptions(dtype=dtype))}
        if dtype == "float32" and self.device.type == "cpu":
            forwards[INT8] = self._with_bytes(HandlerOptions(dtype="int8"))
        if self.transformers is not None:
            for attention in ("sdpa", "eager"):
                theirs = self._load_theirs(attention, dtype).to(self.device)
                forwards[f"transformers {attention}"] = with_floats(theirs)
        return forwards

    def _with_bytes(self, options: HandlerOptions) -> Callable[[int], Callable[[], torch.Tensor]]:
        served = VideoClassifier.from_pretrained(self.checkpoint, options=options, device=self.device)
        served.warm_up()  # like a worker before it accepts requests
        return lambda batch: lambda: served.logits(list(self.pixels[:batch, None]))

    def _load_theirs(self, attention: str, dtype: str) -> torch.nn.Module:
        return self.transformers.VivitForVideoClassification.from_pretrained(
            self.checkpoint, attn_implementation=attention, torch_dtype=getattr(torch, dtype)
        ).eval()

    def _matmuls(self, dtype: str) -> dict[str, Callable[[], None]]:
        square = torch.randn(self.matmul_side, self.matmul_side).to(self.device, getattr(torch, dtype))
        functions = {MATMUL: torch.matmul}
        if self.device.type == "cpu" and dtype == "float32" and onednn.is_faster(torch.float32):
            functions[ONEDNN] = onednn.linear

        def repeated(function):
            for _ in range(MATMULS_PER_CALL[self.device.type]):
                function(square, square)

        return {name: functools.partial(repeated, function) for name, function in functions.items()}

    def _report(self, dtype: str, batch: int, timings: dict[str, Timing], differences: dict[str, float]) -> None:
        spreads = {name: Spread.of(timing.wall_ms) for name, timing in timings.items()}
        tflops_per_s = {name: batch * self.flops / spread.median / 1e9 for name, spread in spreads.items()}
        matmul_flops = 2 * self.matmul_side**3 * MATMULS_PER_CALL[self.device.type]
        matmuls = [name for name in (MATMUL, ONEDNN) if name in spreads]
        tflops_per_s |= {name: matmul_flops / spreads[name].low / 1e9 for name in matmuls}
        ours, sdpa = (spreads[name].median if name in spreads else None for name in (OURS, SDPA))
        if dtype == "float32" and sdpa is not None:
            self.float32_sdpa_ms[batch] = sdpa
        float32_sdpa = self.float32_sdpa_ms.get(batch)
        rows = []
        for name, spread in spreads.items():
            row = {
                "dtype": dtype,
                "batch": batch,
                "model": name,
                **spread.to_row("wall", "ms"),
                "tflops_per_s": tflops_per_s[name],
            }
            if name not in matmuls:
                row |= {
                    "wall_ratio": ratio_to_ours(spread.median, ours),
                    "clips_per_s": batch / spread.median * 1e3,
                    "sdpa_factor": sdpa and sdpa / spread.median,
                    "float32_sdpa_factor": float32_sdpa and float32_sdpa / spread.median,
                    "matmul_share": tflops_per_s[name] / tflops_per_s[MATMUL],
                    "onednn_share": (tflops_per_s[name] / tflops_per_s[ONEDNN] if ONEDNN in tflops_per_s else None),
                    "logit_difference": differences[name],
                }
            rows.append(row)
        self.report.table(TABLE, COLUMNS, rows, title=f"{dtype}, batch {batch}")


def plot(report: Report):
    from benchmarks.plots import bar_chart

    groups: dict[str, dict[str, Spread]] = {}
    for row in report.tables.get(VARIANTS) or report.tables[TABLE]:
        name = row.get("attention_type") or row["model"]
        if name not in (MATMUL, ONEDNN):
            rates = [row["batch"] / row[key] * 1e3 for key in ("wall_ms", "wall_high_ms", "wall_low_ms")]
            groups.setdefault(f"{row['dtype']}, batch {row['batch']}", {})[name] = Spread(*rates)
    return bar_chart(groups, title="The forward pass (higher is better)", unit="clips/s")
