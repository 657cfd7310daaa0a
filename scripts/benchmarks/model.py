"""The forward pass, ours and that of transformers with the same weights, beside the machine's matrix product.

    ours                the model called with normalised pixels, as that of transformers is
    ours, served        what a worker does with a batch, `micro_batch_clips` at a time: bytes in, logits out
    ours, int8          the same with `dtype: int8`, on a CPU, beside float32
    ours, compiled      the same with `compile: true`, on a GPU
    transformers sdpa   its VivitForVideoClassification
    transformers eager  the same with attention written out
    matmul              large square matrices in the same dtype, for the rate that the machine can reach
    matmul, oneDNN      the same by oneDNN, on processors for which torch's own choice, MKL, has no AVX-512

`of matmul` is the share of that rate, of its fastest repetition, that a contestant reaches in the median, and `of
oneDNN` that of the other one. The operations of the whole task are counted: 0.90 TFLOP a clip for ViViT-B/16x2.
`x sdpa` is how many times as fast as transformers' sdpa it is, `logit difference` the largest to that in float32.

With `--size demo` a last table tells for each dtype how many clips of an independent renderer the server gets right,
and how many it answers as float32 does.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import checkpoints, peers
from benchmarks.measuring import (
    OURS,
    Contestant,
    Spread,
    on_cores,
    ratio_to_ours,
    take_turns,
)
from benchmarks.report import Report, bars
from handler.classifier import VideoClassifier
from handler.kernels import onednn
from handler.models.vivit import VivitForVideoClassification
from handler.options import HandlerOptions
from handler.processing.image_processor import VivitImageProcessor
from handler.threads import available_cores

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
TABLE, AGREEMENT = "model", "agreement"
MATMUL, ONEDNN = "matmul", "matmul, oneDNN"
SERVED, INT8, COMPILED = "ours, served", "ours, int8", "ours, compiled"
SDPA = "transformers sdpa"
MATMULS = {"cpu": 1, "cuda": 20}  # in a row, so that starting them does not count either
COLUMNS = (
    ("dtype", "{dtype}"),
    ("batch", "{batch}"),
    ("model", "{model}"),
    ("ms", "{wall_ms:.1f}"),
    ("min-max", "{wall_low_ms:.1f}-{wall_high_ms:.1f}"),
    ("x ours", "{wall_ratio:.2f}"),
    ("x sdpa", "{sdpa_factor:.2f}"),
    ("clips/s", "{clips_per_s:.2f}"),
    ("TFLOP/s", "{tflops_per_s:.3f}"),
    ("of matmul", "{matmul_share:.0%}"),
    ("of oneDNN", "{onednn_share:.0%}"),
    ("logit difference", "{logit_difference:.1e}"),
)
AGREEMENT_COLUMNS = (
    ("dtype", "{dtype}"),
    ("clips", "{clips}"),
    ("right", "{right_share:.1%}"),
    ("as float32", "{agreeing_share:.1%}"),
    ("logit difference", "{logit_difference:.1e}"),
)
# Letters in shapes: B clips, T frames, C channels, h and w pixels.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoints.add_arguments(parser)
    checkpoints.add_device_argument(parser)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "float16", "bfloat16"),
        metavar="DTYPE",
        help="default: float16 float32 on a GPU, float32 on a CPU",
    )
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        metavar="N",
        help="clips at once (default: 1 2 4 8 16 32 on a GPU, 1 2 on a CPU)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=available_cores(),
        metavar="N",
        help="of torch, on a CPU (default: the available cores)",
    )
    parser.add_argument(
        "--matmul-side",
        type=int,
        metavar="N",
        help="rows and columns of the matrices (default: 8192 on a GPU, 4096 on a CPU)",
    )
    parser.add_argument("--repetitions", type=int, metavar="N", help="default: 20 on a GPU, 3 on a CPU")
    parser.add_argument(
        "--agreement-clips", type=int, default=324, metavar="N", help="of the last table of --size demo (default: 324)"
    )


def run(arguments: argparse.Namespace, report: Report) -> None:
    on_gpu = arguments.device == "cuda"
    dtypes = arguments.dtypes or (["float16", "float32"] if on_gpu else ["float32"])
    batches = arguments.batches or ([1, 2, 4, 8, 16, 32] if on_gpu else [1, 2])
    repetitions = arguments.repetitions or (20 if on_gpu else 3)
    matmul_side = arguments.matmul_side or (8192 if on_gpu else 4096)  # so that nothing but arithmetic counts
    chosen = {"dtypes": dtypes, "batches": batches, "repetitions": repetitions, "matmul_side": matmul_side}
    report.choose(chosen)
    report.note(f"float32 matrix products have torch's precision {torch.get_float32_matmul_precision()!r}")
    transformers = peers.load("transformers", report)
    if transformers:
        transformers.logging.disable_progress_bar()
    with (
        tempfile.TemporaryDirectory(prefix="vivit-checkpoint-") as folder,
        on_cores(arguments.threads),
        torch.inference_mode(),
    ):
        checkpoint = checkpoints.save_checkpoint(arguments.size, Path(folder))
        device = torch.device(arguments.device)
        bench = Bench(checkpoint, device, max(batches), matmul_side, transformers, report)
        for dtype in dtypes:
            bench.measure(dtype, batches, repetitions)
        if arguments.size == "demo":
            dtypes = ("float32", "float16", "bfloat16") if on_gpu else ("float32", "bfloat16", "int8")
            report_agreement(checkpoint, device, dtypes, arguments.agreement_clips, report)


def report_agreement(checkpoint: Path, device: torch.device, dtypes: Sequence[str], clips: int, report: Report) -> None:
    """A row for each of `dtypes`, the first of which is what the others are compared with."""
    from demo.evaluate import independent_clip

    report.progress(f"drawing {clips} clips")
    classifiers = [
        VideoClassifier.from_pretrained(checkpoint, options=HandlerOptions(dtype=dtype), device=device)
        for dtype in dtypes
    ]
    labels, logits = [], []
    for number in range(clips):
        video, label, _ = independent_clip(0, number)
        pixels = classifiers[0].load_clip(video).pixels
        labels.append(classifiers[0].config.label2id[label])
        logits.append(torch.cat([classifier.logits([pixels]) for classifier in classifiers]))
    logits, labels = torch.stack(logits, dim=1), torch.tensor(labels)  # (dtypes, clips, classes) and (clips,)
    answers = logits.argmax(-1)  # (dtypes, clips)
    report.table(
        AGREEMENT,
        AGREEMENT_COLUMNS,
        [
            {
                "dtype": dtype,
                "clips": clips,
                "right_share": float((answer == labels).float().mean()),
                "agreeing_share": float((answer == answers[0]).float().mean()),
                "logit_difference": float((found - logits[0]).abs().max()),
            }
            for dtype, answer, found in zip(dtypes, answers, logits)
        ],
    )


class Bench:
    """The contestants on one device, and what they are compared with."""

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
        self.processor = VivitImageProcessor.from_pretrained(checkpoint)
        model = VivitForVideoClassification.from_pretrained(checkpoint)
        self.flops = checkpoints.clip_flops(model.config)
        report.note(f"{self.flops / 1e12:.3g} TFLOP a clip")
        self.pixels = checkpoints.draw_clips(model.config, clips)  # uint8 (B, T, C, h, w)
        scale, bias = (torch.from_numpy(each)[:, None, None] for each in self.processor.scale_and_bias())  # (C, 1, 1)
        self.inputs = torch.addcmul(bias, torch.from_numpy(self.pixels).float(), scale)  # (B, T, C, h, w)
        reference = model if transformers is None else self._load_theirs("sdpa", "float32")
        reference = reference.to(device)
        # One clip at a time, for which any device has the memory.
        self.expected = torch.cat([reference(clip.to(device)).logits.cpu() for clip in self.inputs.split(1)])

    def measure(self, dtype: str, batches: list[int], repetitions: int) -> None:
        forwards = self._forwards(dtype)
        matmuls = [Contestant(name, multiply) for name, multiply in self._matmuls(dtype).items()]
        for batch in batches:
            self.report.progress(f"{dtype}, batch {batch}")
            differences = {}

            def inspect(name, logits):
                if name not in (MATMUL, ONEDNN):
                    difference = (logits.float().cpu() - self.expected[:batch]).abs().max()
                    differences[name] = float(difference)

            contestants = [Contestant(name, forward(batch)) for name, forward in forwards.items()]
            timings, failures = take_turns([*contestants, *matmuls], repetitions=repetitions, inspect=inspect)
            for name, reason in failures.items():
                self.report.note(f"{name} failed in {dtype} at batch {batch}: {reason}")
            self._report(dtype, batch, timings, differences)

    def _forwards(self, dtype: str) -> dict[str, Callable[[int], Callable[[], torch.Tensor]]]:
        """By name: a function of the batch size to the function that is timed."""

        def on_floats(model):
            def forward(batch):
                inputs = self.inputs[:batch].to(self.device, getattr(torch, dtype))
                return lambda: model(inputs).logits

            return forward

        ours = VivitForVideoClassification.from_pretrained(self.checkpoint, torch_dtype=dtype).to(self.device)
        forwards = {OURS: on_floats(ours), SERVED: self._on_bytes(HandlerOptions(dtype=dtype))}
        if dtype == "float32" and self.device.type == "cpu":
            forwards[INT8] = self._on_bytes(HandlerOptions(dtype="int8"))
        if self.device.type == "cuda":
            forwards[COMPILED] = self._on_bytes(HandlerOptions(dtype=dtype, compile=True))
        if self.transformers is not None:
            for attention in ("sdpa", "eager"):
                theirs = self._load_theirs(attention, dtype).to(self.device)
                forwards[f"transformers {attention}"] = on_floats(theirs)
        return forwards

    def _on_bytes(self, options: HandlerOptions) -> Callable[[int], Callable[[], torch.Tensor]]:
        served = VideoClassifier.from_pretrained(self.checkpoint, options=options, device=self.device)
        served.warm_up()  # as a worker does before it is ready
        return lambda batch: lambda: served.logits(list(self.pixels[:batch, None]))

    def _load_theirs(self, attention: str, dtype: str) -> torch.nn.Module:
        return self.transformers.VivitForVideoClassification.from_pretrained(
            self.checkpoint, attn_implementation=attention, torch_dtype=getattr(torch, dtype)
        ).eval()

    def _matmuls(self, dtype: str) -> dict[str, Callable[[], None]]:
        square = torch.randn(self.matmul_side, self.matmul_side).to(self.device, getattr(torch, dtype))
        functions = {MATMUL: torch.matmul}
        if self.device.type == "cpu" and dtype == "float32" and onednn.IS_FASTER:
            functions[ONEDNN] = onednn.linear

        def repeated(function):
            for _ in range(MATMULS[self.device.type]):
                function(square, square)

        return {name: functools.partial(repeated, function) for name, function in functions.items()}

    def _report(self, dtype: str, batch: int, timings: dict, differences: dict[str, float]) -> None:
        spreads = {name: Spread.of(timing.wall_ms) for name, timing in timings.items()}
        # TFLOP/s
        rates = {name: batch * self.flops / spread.median / 1e9 for name, spread in spreads.items()}
        matmul_flops = 2 * self.matmul_side**3 * MATMULS[self.device.type]
        matmuls = [name for name in (MATMUL, ONEDNN) if name in spreads]
        rates |= {name: matmul_flops / spreads[name].low / 1e9 for name in matmuls}
        ours, sdpa = (spreads[name].median if name in spreads else None for name in (OURS, SDPA))
        rows = []
        for name, spread in spreads.items():
            row = {
                "dtype": dtype,
                "batch": batch,
                "model": name,
                **spread.in_row("wall", "ms"),
                "tflops_per_s": rates[name],
            }
            if name not in matmuls:
                row |= {
                    "wall_ratio": ratio_to_ours(spread.median, ours),
                    "clips_per_s": batch / spread.median * 1e3,
                    "sdpa_factor": sdpa and sdpa / spread.median,
                    "matmul_share": rates[name] / rates[MATMUL],
                    "onednn_share": rates[name] / rates[ONEDNN] if ONEDNN in rates else None,
                    "logit_difference": differences[name],
                }
            rows.append(row)
        self.report.table(TABLE, COLUMNS, rows, title=f"{dtype}, batch {batch}")


def plot(report: Report):
    groups = {}
    for row in report.tables[TABLE]:
        if row["model"] not in (MATMUL, ONEDNN):
            rates = [row["batch"] / row[key] * 1e3 for key in ("wall_ms", "wall_high_ms", "wall_low_ms")]
            groups.setdefault(f"{row['dtype']}, batch {row['batch']}", {})[row["model"]] = Spread(*rates)
    return bars(groups, title="the forward pass; longer is better", unit="clips/s")
