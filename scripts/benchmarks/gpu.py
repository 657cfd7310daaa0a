"""Measure the alternatives that a GPU offers, to decide between them. `--experiments` selects some.

    attention      torch's SDPA kernels, in the model and alone
    launches       eager kernel launches, torch.compile, and CUDA graphs, for fixed batches
    micro-batches  clips per forward pass of one large batch, with the peak memory
    copies         clips in pageable and in page-locked memory, copied before or during the forward pass
    resize         our exact resize on the CPU, and torch's on the device, from decoded frames
    fp8            linear layers with 8-bit floats: speed, and answers of the demo model
    serving        TorchServe with several numbers of workers per GPU and of decoder processes per worker

`TFLOP/s` counts the floating-point operations of the task, `of matmul` is its share of the rate of large square matrix
products in the same dtype, and `error` the distance of the logits from those in float32, relative to their norm.
`of bound` is the share of the smaller rate of the model alone and of decoding alone. With `--device cpu` the
alternatives that need a GPU are listed as failed.
"""

import argparse
import copy
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import checkpoints, serve
from benchmarks.load_generator import generate_load, latency_percentiles_ms
from benchmarks.report import Report
from benchmarks.timing import Candidate, Spread, limit_cores, time_interleaved
from benchmarks.upper_bounds import Workload, measure_decoding, measure_model
from benchmarks.videos import VideoSpec, draw_clip, video_files
from benchmarks.videos import add_arguments as add_video_arguments
from handler.assets import MODEL_CONFIG
from handler.classifier import VideoClassifier
from handler.cli.build import build_archive, read_options
from handler.cli.properties import default_settings
from handler.models.cost import count_multiply_adds
from handler.models.layers import MLP, Attention
from handler.models.vivit import VivitForVideoClassification
from handler.options import HandlerOptions
from handler.processing.image_processor import VivitImageProcessor
from handler.processing.resize import ResizeCrop
from handler.threads import available_cores

HELP = "alternatives that a GPU offers: attention, launches, micro-batches, copies, resizing, fp8, workers"
QUICK = {
    "size": "tiny",
    "device": "cpu",
    "batches": [2],
    "threads": 1,
    "matmul_side": 256,
    "repetitions": 1,
    "frame_heights": [96],
    "accuracy_clips": 2,
    "heights": [96],
    "seconds_a_clip": 1.5,
    "workers": [1],
    "decoders": [1],
    "clients": 2,
    "seconds": 1.0,
    "warm_up_s": 0.2,
}
ATTENTION, LAUNCHES, MICRO_BATCHES = "attention", "launches", "micro-batches"
COPIES, RESIZE, FP8, FP8_ACCURACY, SERVING = "copies", "resize", "fp8", "fp8 accuracy", "serving"
DISTINCT_CLIPS = 3  # a batch repeats them
BATCHES_IN_A_ROW = 4  # copies overlap with the forward pass of the batch before
MATMULS_PER_CALL = {"cpu": 1, "cuda": 20}  # several, so that kernel launches do not dominate on a GPU
FP8_DTYPE = torch.float8_e4m3fn
COLUMNS = (
    ("what", "{what}"),
    ("dtype", "{dtype}"),
    ("batch", "{batch}"),
    ("ms", "{wall_ms:.2f}"),
    ("min-max", "{wall_low_ms:.2f}-{wall_high_ms:.2f}"),
    ("clips/s", "{clips_per_s:.1f}"),
    ("TFLOP/s", "{tflops_per_s:.3f}"),
    ("of matmul", "{matmul_share:.0%}"),
    ("GB/s", "{gb_per_s:.1f}"),
    ("first call s", "{first_call_s:.1f}"),
    ("peak MB", "{peak_mb:.0f}"),
    ("error", "{error:.1e}"),
)
RESIZE_COLUMNS = (
    ("what", "{what}"),
    ("from", "{size}"),
    ("ms", "{wall_ms:.2f}"),
    ("min-max", "{wall_low_ms:.2f}-{wall_high_ms:.2f}"),
    ("clips/s", "{clips_per_s:.1f}"),
    ("largest difference", "{largest_difference:.0f}"),
    ("values that differ", "{differing_share:.2%}"),
)
ACCURACY_COLUMNS = (
    ("model", "{what}"),
    ("clips", "{clips}"),
    ("correct", "{right_share:.1%}"),
    ("same as float32", "{agreeing_share:.1%}"),
    ("error", "{error:.1e}"),
)
SERVING_COLUMNS = (
    ("workers", "{workers}"),
    ("decoders each", "{decoders}"),
    ("clients", "{clients}"),
    ("clips/s", "{clips_per_s:.2f}"),
    ("of bound", "{limit_share:.0%}"),
    ("p50 ms", "{p50_ms:.0f}"),
    ("p95 ms", "{p95_ms:.0f}"),
    ("responses", "{answers}"),
    ("errors", "{errors}"),
    ("worker start-up s", "{start_s:.1f}"),
)
# Letters in shapes: B clips, T frames, C channels, h and w pixels, H and W pixels of decoded frames, N tokens,
# D hidden size, a attention heads, d channels per head.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoints.add_model_arguments(parser, batches="1 8 16 on a GPU, 1 on a CPU")
    parser.add_argument(
        "--experiments",
        nargs="+",
        choices=EXPERIMENTS,
        default=list(EXPERIMENTS),
        metavar="NAME",
        help=f"what to measure: {' '.join(EXPERIMENTS)} (default: everything)",
    )
    checkpoints.add_matmul_argument(parser)
    parser.add_argument(
        "--repetitions", type=int, metavar="N", help="timed calls per candidate (default: 10 on a GPU, 2 on a CPU)"
    )
    parser.add_argument(
        "--frame-heights",
        type=int,
        nargs="+",
        default=[240, 720, 1080],
        metavar="PIXELS",
        help="heights of the frames that are resized (default: 240 720 1080)",
    )
    parser.add_argument(
        "--accuracy-clips", type=int, default=54, metavar="N", help="clips of the demo for fp8 (default: 54)"
    )
    add_video_arguments(parser, heights=[240, 720, 1080], seconds=10)
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[2, 4, 1], metavar="N", help="worker processes (default: 2 4 1)"
    )
    parser.add_argument(
        "--decoders",
        type=int,
        nargs="+",
        default=[0, 4],
        metavar="N",
        help="decode_processes of each worker, 0 for one per core (default: 0 4)",
    )
    parser.add_argument("--clients", type=int, default=32, metavar="N", help="concurrent clients (default: 32)")
    parser.add_argument(
        "--seconds", type=float, default=6, metavar="S", help="duration of each measurement of serving (default: 6)"
    )
    parser.add_argument(
        "--warm-up-s", type=float, default=2, metavar="S", help="warm-up before each of them (default: 2)"
    )


def run(arguments: argparse.Namespace, report: Report) -> None:
    on_gpu = arguments.device == "cuda"
    dtypes = arguments.dtypes or (["float16"] if on_gpu else ["float32"])
    batches = arguments.batches or ([1, 8, 16] if on_gpu else [1])
    repetitions = arguments.repetitions or (10 if on_gpu else 2)
    matmul_side = checkpoints.matmul_side(arguments)
    report.add_settings({"dtypes": dtypes, "batches": batches, "repetitions": repetitions, "matmul_side": matmul_side})
    with tempfile.TemporaryDirectory(prefix="vivit-checkpoint-") as folder:
        checkpoint = checkpoints.save_checkpoint(arguments.size, Path(folder))
        if models := [name for name in arguments.experiments if name in MODEL_EXPERIMENTS]:
            with limit_cores(arguments.threads), torch.inference_mode():
                for dtype in dtypes:
                    subject = Subject(
                        checkpoint,
                        device=torch.device(arguments.device),
                        dtype=dtype,
                        batches=batches,
                        matmul_side=matmul_side,
                        repetitions=repetitions,
                        report=report,
                    )
                    for name in models:
                        report.progress(f"{name}, {dtype}")
                        MODEL_EXPERIMENTS[name](subject, arguments)
        if RESIZE in arguments.experiments:
            measure_resizing(checkpoint, arguments, repetitions, report)
        if SERVING in arguments.experiments:
            measure_serving(checkpoint, arguments, report)


class Subject:
    """The model on the device in one dtype, and what its times are related to.

    Args:
        checkpoint: A checkpoint's directory.
        device: The model's device.
        dtype: Name of the torch dtype.
        batches: Numbers of clips per forward pass.
        matmul_side: Rows and columns of the matrices in the matrix products.
        repetitions: Timed calls per candidate.
        report: Receives the tables.

    Attributes:
        model: The model.
        flops: Floating-point operations per clip.
        expected: Logits of DISTINCT_CLIPS clips in float32, (DISTINCT_CLIPS, labels).
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        device: torch.device,
        dtype: str,
        batches: list[int],
        matmul_side: int,
        repetitions: int,
        report: Report,
    ):
        self.checkpoint, self.device, self.dtype_name, self.batches = checkpoint, device, dtype, batches
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.repetitions, self.report = repetitions, report
        self.model = VivitForVideoClassification.from_pretrained(checkpoint).to(device).eval()
        self.config = self.model.config
        self.flops = 2 * count_multiply_adds(self.config)
        self.clips = checkpoints.draw_input_clips(self.config, DISTINCT_CLIPS)  # uint8 (DISTINCT_CLIPS, T, C, h, w)
        scale, bias = VivitImageProcessor.from_pretrained(checkpoint).scale_and_bias()
        self._scale = torch.from_numpy(scale).to(device)[:, None, None]  # (C, 1, 1)
        self._bias = torch.from_numpy(bias).to(device)[:, None, None]  # (C, 1, 1)
        self.expected = torch.cat(
            [self.forward(torch.from_numpy(clip[None]).to(device)).float().cpu() for clip in self.clips]
        )
        self.model = self.model.to(self.dtype)
        self._scale, self._bias = self._scale.to(self.dtype), self._bias.to(self.dtype)
        self.matmul_tflops_per_s = self._measure_matmul(matmul_side)
        report.note(f"matmul in {dtype}: {self.matmul_tflops_per_s:.3g} TFLOP/s")

    def host_batch(self, batch: int) -> list[np.ndarray]:
        """Returns `batch` clips, uint8 (T, C, h, w) each."""
        return [self.clips[index % DISTINCT_CLIPS] for index in range(batch)]

    def device_batch(self, batch: int) -> torch.Tensor:
        """Returns `batch` clips on the device, uint8 (B, T, C, h, w)."""
        return torch.from_numpy(np.stack(self.host_batch(batch))).to(self.device)

    def forward(self, pixels: torch.Tensor, *, model: nn.Module | None = None) -> torch.Tensor:
        """Returns the logits (B, labels) of clips on the device, uint8 (B, T, C, h, w)."""
        inputs = torch.addcmul(self._bias, pixels.to(self._scale.dtype), self._scale)  # (B, T, C, h, w)
        return (model or self.model)(inputs).logits

    def error(self, logits: torch.Tensor) -> float:
        """Returns the distance of logits (B, labels) of a batch from the expected ones, relative to their norm."""
        expected = self.expected[torch.arange(len(logits)) % DISTINCT_CLIPS]  # (B, labels)
        return float((logits.float().cpu() - expected).norm() / expected.norm())

    def measure(
        self, table: str, batch: int, calls: dict[str, Callable[[], torch.Tensor]], *, clips: int | None = None
    ) -> None:
        """Times calls that return the logits of `clips` clips, by default `batch`, and adds a row for each."""
        results: dict[str, dict[str, Any]] = {}

        def inspect(name: str, logits: torch.Tensor) -> None:
            results[name] = {"error": self.error(logits)}

        for name, row in self._time(calls, clips or batch, inspect=inspect):
            results[name] |= row | {"what": name, "batch": batch}
            self._add_rates(results[name], (clips or batch) * self.flops)
        self.report.table(table, COLUMNS, list(results.values()), title=f"{table}, {self.dtype_name}, batch {batch}")

    def measure_alone(
        self, table: str, batch: int, calls: dict[str, Callable[[], object]], *, flops: float = 0, size_bytes: int = 0
    ) -> None:
        """Times calls that do a part of the work for `batch` clips: `flops` operations, or a copy of `size_bytes`."""
        rows = []
        for name, row in self._time(calls, batch):
            row |= {"what": name, "batch": batch}
            if flops:
                self._add_rates(row, flops)
            if size_bytes:
                row["gb_per_s"] = size_bytes / row["wall_ms"] / 1e6
            rows.append(row)
        self.report.table(table, COLUMNS, rows, title=f"{table}, {self.dtype_name}, batch {batch}")

    def _time(self, calls, clips, inspect=None) -> Iterator[tuple[str, dict[str, Any]]]:
        timed = {name: _TimedFirstCall(call, self.device) for name, call in calls.items()}
        candidates = [Candidate(name, call) for name, call in timed.items()]
        timings, failures = time_interleaved(candidates, repetitions=self.repetitions, inspect=inspect)
        for name, reason in failures.items():
            self.report.note(f"{name} failed in {self.dtype_name} with {clips} clips: {reason}")
        for name, timing in timings.items():
            spread = Spread.of(timing.wall_ms)
            yield (
                name,
                {
                    "dtype": self.dtype_name,
                    **spread.to_row("wall", "ms"),
                    "clips_per_s": clips / spread.median * 1e3,
                    "first_call_s": timed[name].first_call_s,
                    "peak_mb": timed[name].peak_mb,
                },
            )

    def _add_rates(self, row: dict[str, Any], flops: float) -> None:
        row["tflops_per_s"] = flops / row["wall_ms"] / 1e9
        row["matmul_share"] = row["tflops_per_s"] / self.matmul_tflops_per_s

    def _measure_matmul(self, side: int) -> float:
        square = torch.randn(side, side).to(self.device, self.dtype)
        count = MATMULS_PER_CALL[self.device.type]

        def multiply() -> None:
            for _ in range(count):
                torch.matmul(square, square)

        timings, failures = time_interleaved([Candidate("matmul", multiply)], repetitions=self.repetitions)
        if failures:
            raise RuntimeError(f"the matrix product failed: {failures['matmul']}")
        return 2 * side**3 * count / min(timings["matmul"].wall_ms) / 1e9


class _TimedFirstCall:
    """A call that records the time and the peak memory of its first execution, which includes compilation."""

    def __init__(self, call: Callable[[], Any], device: torch.device):
        self.call, self.device = call, device
        self.first_call_s: float | None = None
        self.peak_mb: float | None = None

    def __call__(self) -> Any:
        if self.first_call_s is not None:
            return self.call()
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start_s = time.perf_counter()
        result = self.call()
        if on_gpu:
            torch.cuda.synchronize()
            self.peak_mb = torch.cuda.max_memory_allocated() / 1e6
        self.first_call_s = time.perf_counter() - start_s
        return result


# Attention


def measure_attention(subject: Subject, arguments: argparse.Namespace) -> None:
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }

    def restricted(call, backend):
        def call_with_backend():
            with sdpa_kernel(backend):
                return call()

        return call_with_backend

    def with_backends(name, call):
        chosen = {f"{name}, {backend}": restricted(call, value) for backend, value in backends.items()}
        return {f"{name}, torch's choice": call, **chosen}

    config = subject.config
    tokens = 1 + config.num_patches
    heads, channels = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for batch in subject.batches:
        pixels = subject.device_batch(batch)
        subject.measure(ATTENTION, batch, with_backends("model", functools.partial(subject.forward, pixels)))
        # The memory layout is that of the model: one product makes queries, keys and values.
        qkv = torch.randn(batch, tokens, 3, heads, channels).to(subject.device, subject.dtype)  # (B, N, 3, a, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, a, N, d)
        attend = functools.partial(F.scaled_dot_product_attention, q, k, v)
        flops = 4 * batch * tokens * tokens * config.hidden_size
        subject.measure_alone(ATTENTION, batch, with_backends("one layer's attention", attend), flops=flops)


# Launches


def measure_launches(subject: Subject, arguments: argparse.Namespace) -> None:
    for batch in subject.batches:
        pixels = subject.device_batch(batch)
        compiled, reduced = compile_forward(subject), compile_forward(subject, mode="reduce-overhead")
        graph = GraphedForward(subject.forward, pixels)
        subject.measure(
            LAUNCHES,
            batch,
            {
                "eager": functools.partial(subject.forward, pixels),
                "CUDA graph": functools.partial(graph, pixels),
                "torch.compile": functools.partial(compiled, pixels),
                "torch.compile, CUDA graph": functools.partial(reduced, pixels),
            },
        )


def compile_forward(
    subject: Subject, *, model: nn.Module | None = None, mode: str | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a compiled forward pass of (B, T, C, h, w); it is compiled in the first call."""
    if mode == "reduce-overhead" and subject.device.type != "cuda":
        return _need_gpu
    torch._dynamo.reset()  # the limit of recompilations counts for the function, not for each compiled one
    forward = functools.partial(subject.forward, model=model)
    compiled = torch.compile(lambda pixels: forward(pixels), fullgraph=True, dynamic=False, mode=mode)
    return lambda pixels: compiled(pixels).clone()  # the next replay of a graph overwrites its result


class GraphedForward:
    """A forward pass of one batch size, captured in a CUDA graph in the first call.

    Args:
        forward: Computes (B, labels) from (B, T, C, h, w).
        pixels: A batch of this size, uint8 (B, T, C, h, w).
    """

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor):
        self.forward, self.pixels = forward, pixels.clone()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.graph is None:
            self._capture()
        self.pixels.copy_(pixels)
        self.graph.replay()
        return self.logits.clone()

    def _capture(self) -> None:
        if self.pixels.device.type != "cuda":
            _need_gpu(self.pixels)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate and choose their algorithms before the capture
            for _ in range(3):
                self.forward(self.pixels)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self.forward(self.pixels)
        self.graph = graph


def _need_gpu(pixels: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(f"needs a GPU, got a batch on {pixels.device}")


# Micro-batches


def measure_micro_batches(subject: Subject, arguments: argparse.Namespace) -> None:
    largest = 32 if subject.device.type == "cuda" else 2
    clips = [clip[None] for clip in subject.host_batch(largest)]  # (1, T, C, h, w) each
    size = 1
    while size <= largest:
        options = HandlerOptions(dtype=subject.dtype_name, micro_batch_clips=size)
        classifier = VideoClassifier.from_pretrained(subject.checkpoint, options=options, device=subject.device)
        call = functools.partial(classifier.logits, clips)
        subject.measure(MICRO_BATCHES, size, {f"{largest} clips, served": call}, clips=largest)
        size *= 2


# Copies


def measure_copies(subject: Subject, arguments: argparse.Namespace) -> None:
    batch = max(subject.batches)
    copies = Copies(subject, batch)
    copy_calls = {
        "copy, pageable": lambda: copies.pageable(0),
        "copy, page-locked": lambda: copies.page_locked(0),
    }
    subject.measure_alone(COPIES, batch, copy_calls, size_bytes=sum(clip.nbytes for clip in copies.batches[0]))
    subject.measure(
        COPIES,
        batch,
        {
            "model, clips on the device": lambda: copies.run(copies.resident),
            "model, pageable": lambda: copies.run(copies.pageable),
            "model, page-locked": lambda: copies.run(copies.page_locked),
            "model, page-locked, overlapped": copies.run_overlapped,
        },
        clips=BATCHES_IN_A_ROW * batch,
    )


class Copies:
    """Ways to bring BATCHES_IN_A_ROW batches from the host to the device, before or during the forward pass."""

    def __init__(self, subject: Subject, batch: int):
        self.subject = subject
        clips = subject.host_batch(BATCHES_IN_A_ROW * batch)
        self.batches = [clips[start : start + batch] for start in range(0, len(clips), batch)]
        self.on_device = [self.pageable(number) for number in range(BATCHES_IN_A_ROW)]
        self.streams = torch.get_device_module(subject.device)
        self.copy_stream = self.streams.Stream()

    def resident(self, number: int) -> torch.Tensor:
        return self.on_device[number]  # (B, T, C, h, w)

    def pageable(self, number: int) -> torch.Tensor:
        return torch.from_numpy(np.stack(self.batches[number])).to(self.subject.device)  # (B, T, C, h, w)

    def page_locked(self, number: int) -> torch.Tensor:
        on_gpu = self.subject.device.type == "cuda"
        clips = self.batches[number]
        pixels = torch.empty((len(clips), *clips[0].shape), dtype=torch.uint8, pin_memory=on_gpu)
        np.stack(clips, out=pixels.numpy())
        return pixels.to(self.subject.device, non_blocking=True)  # (B, T, C, h, w)

    def run(self, copy: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """Copies a batch, waits for its logits, copies the next one."""
        return torch.cat([self.subject.forward(copy(number)).float().cpu() for number in range(BATCHES_IN_A_ROW)])

    def run_overlapped(self) -> torch.Tensor:
        """Copies a batch in a stream of its own while the device computes the batch before."""
        logits, pixels = [], self._copy_in_own_stream(0)
        for following in range(1, BATCHES_IN_A_ROW + 1):
            self.streams.current_stream().wait_stream(self.copy_stream)
            if pixels.is_cuda:
                pixels.record_stream(self.streams.current_stream())
            result = self.subject.forward(pixels)
            if following < BATCHES_IN_A_ROW:
                pixels = self._copy_in_own_stream(following)
            logits.append(result.float().cpu())
        return torch.cat(logits)

    def _copy_in_own_stream(self, number: int) -> torch.Tensor:
        with self.streams.stream(self.copy_stream):
            return self.page_locked(number)


# Resizing


def measure_resizing(checkpoint: Path, arguments: argparse.Namespace, repetitions: int, report: Report) -> None:
    """Measures how long a clip's decoded frames take to the model's size, and how the pixels differ from exact ones."""
    resize_crop = VivitImageProcessor.from_pretrained(checkpoint).resize_crop
    device = torch.device(arguments.device)
    num_frames = checkpoints.load_config(arguments.size).num_frames
    threads = available_cores()
    for height in arguments.frame_heights:
        report.progress(f"resize, {height}p")
        frames = draw_clip(num_frames, height=height, width=VideoSpec(height, 1).width)  # (T, H, W, 3)
        on_device = torch.from_numpy(frames).to(device)
        candidates = [
            Candidate("exact, CPU, 1 thread", functools.partial(resize_crop.resize_and_crop, frames, threads=1)),
            Candidate(
                f"exact, CPU, {threads} threads",
                functools.partial(resize_crop.resize_and_crop, frames, threads=threads),
            ),
            Candidate("device, frames there", functools.partial(resize_on_device, on_device, resize_crop)),
            Candidate(
                "device, page-locked frames copied", functools.partial(copy_and_resize, frames, resize_crop, device)
            ),
        ]
        results: dict[str, np.ndarray] = {}

        def inspect(name: str, pixels: np.ndarray | torch.Tensor, results: dict[str, np.ndarray] = results) -> None:
            results[name] = np.asarray(pixels.cpu() if isinstance(pixels, torch.Tensor) else pixels)

        timings, failures = time_interleaved(candidates, repetitions=repetitions, inspect=inspect)
        for name, reason in failures.items():
            report.note(f"{name} failed at {height}p: {reason}")
        rows = []
        for name, timing in timings.items():
            spread = Spread.of(timing.wall_ms)
            distance = np.abs(results[name].astype(int) - results[candidates[0].name])
            rows.append(
                {
                    "what": name,
                    "size": f"{frames.shape[2]}x{height}",
                    **spread.to_row("wall", "ms"),
                    "clips_per_s": 1e3 / spread.median,
                    "largest_difference": int(distance.max()),
                    "differing_share": float((distance > 0).mean()),
                }
            )
        report.table(RESIZE, RESIZE_COLUMNS, rows, title=f"{RESIZE}, {height}p")


def resize_on_device(frames: torch.Tensor, resize_crop: ResizeCrop) -> torch.Tensor:
    """Resizes and crops frames, uint8 (T, H, W, 3), with torch's antialiased bilinear filter: uint8 (T, 3, h, w)."""
    images = frames.permute(0, 3, 1, 2).float()  # (T, 3, H, W)
    height, width = resize_crop.resized_size(*images.shape[2:])
    images = F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)
    crop_height, crop_width = resize_crop.crop_to or (height, width)
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return images[:, :, top : top + crop_height, left : left + crop_width].round().clamp(0, 255).to(torch.uint8)


def copy_and_resize(frames: np.ndarray, resize_crop: ResizeCrop, device: torch.device) -> torch.Tensor:
    on_gpu = device.type == "cuda"
    staged = torch.empty(frames.shape, dtype=torch.uint8, pin_memory=on_gpu)
    np.copyto(staged.numpy(), frames)
    return resize_on_device(staged.to(device, non_blocking=on_gpu), resize_crop)


# 8-bit floats


def measure_fp8(subject: Subject, arguments: argparse.Namespace) -> None:
    """Measures the largest batch, then the answers of the demo model."""
    batch = max(subject.batches)
    pixels = subject.device_batch(batch)
    reduced = with_fp8_layers(subject.model)
    subject.measure(
        FP8,
        batch,
        {
            subject.dtype_name: functools.partial(subject.forward, pixels),
            "fp8": functools.partial(subject.forward, pixels, model=reduced),
            f"{subject.dtype_name}, compiled": functools.partial(compile_forward(subject), pixels),
            "fp8, compiled": functools.partial(compile_forward(subject, model=reduced), pixels),
        },
    )
    report_fp8_accuracy(subject, arguments.accuracy_clips)


def report_fp8_accuracy(subject: Subject, count: int) -> None:
    """Compares the answers of the demo model with and without 8-bit layers with those in float32."""
    from demo.evaluate import draw_independent_clip

    demo = checkpoints.save_checkpoint("demo", subject.checkpoint)
    options = [HandlerOptions(dtype=dtype) for dtype in ("float32", subject.dtype_name, subject.dtype_name)]
    classifiers = [VideoClassifier.from_pretrained(demo, options=each, device=subject.device) for each in options]
    if subject.device.type == "cpu":  # layers that the CPU's kernels replace take no other weights
        model = VivitForVideoClassification.from_pretrained(demo, torch_dtype=subject.dtype).eval()
        classifiers[2].model = with_fp8_layers(model)
    else:
        classifiers[2].model = with_fp8_layers(classifiers[2].model)
    drawn = [draw_independent_clip(0, number) for number in range(count)]
    clips = [classifiers[0].load_clip(clip.video).pixels for clip in drawn]
    labels = torch.tensor([classifiers[0].config.label2id[clip.label] for clip in drawn])  # (count,)
    logits = [classifier.logits(clips) for classifier in classifiers]  # 3 x (count, labels)
    expected = logits[0]
    rows = [
        {
            "what": name,
            "clips": count,
            "right_share": float((each.argmax(-1) == labels).float().mean()),
            "agreeing_share": float((each.argmax(-1) == expected.argmax(-1)).float().mean()),
            "error": float((each - expected).norm() / expected.norm()),
        }
        for name, each in zip(("float32", subject.dtype_name, f"fp8, else {subject.dtype_name}"), logits)
    ]
    subject.report.table(FP8_ACCURACY, ACCURACY_COLUMNS, rows)


def with_fp8_layers(model: VivitForVideoClassification) -> nn.Module:
    """Returns a copy of the model whose encoder layers compute their linear layers with 8-bit floats."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, (Attention, MLP)):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Float8Linear(child))
    return model


class Float8Linear(nn.Module):
    """A linear layer with weights and inputs in float8_e4m3fn, with one scale each; the inputs' scale is dynamic."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        self.register_buffer("scale", weight.abs().amax() / torch.finfo(FP8_DTYPE).max)
        self.register_buffer("weight", (weight / self.scale).to(FP8_DTYPE))  # (out, in)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes (..., out) from (..., in)."""
        rows = x.flatten(0, -2)  # (rows, in)
        scale = rows.abs().amax().float().clamp(min=1e-12) / torch.finfo(FP8_DTYPE).max
        product = torch._scaled_mm(
            (rows.float() / scale).to(FP8_DTYPE),
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )  # (rows, out)
        return product.unflatten(0, x.shape[:-1])


# Serving


def measure_serving(checkpoint: Path, arguments: argparse.Namespace, report: Report) -> None:
    """Measures TorchServe's throughput for all combinations of workers and decoder processes."""
    batch_size = default_settings()["batchSize"]
    specs = [VideoSpec(height, arguments.seconds_a_clip) for height in arguments.heights]
    with (
        video_files(arguments, specs, report) as files,
        tempfile.TemporaryDirectory(prefix="vivit-serving-") as temporary,
    ):
        folder = Path(temporary)
        report.progress("serving: the model alone, decoding alone")
        workload = Workload(checkpoint, read_options(MODEL_CONFIG), tuple(files), batch_size, arguments.device)
        model_per_s = measure_model(workload, workers=1, seconds=arguments.seconds)
        decode_per_s = measure_decoding(workload, seconds=arguments.seconds)
        bound_per_s = min(model_per_s, decode_per_s)
        report.note(f"serving: the model alone {model_per_s:.1f} clips/s, decoding alone {decode_per_s:.1f} clips/s")
        for decoders in arguments.decoders:
            build_archive(
                checkpoint=str(checkpoint),
                name=archive_name(decoders),
                version="1.0",
                export_path=folder,
                config=write_config(folder, decoders),
            )
        with serve.make_server(folder) as server:
            for decoders in arguments.decoders:
                serve.register_model(server, archive_name(decoders))
                for workers in arguments.workers:
                    report.progress(f"serving: {workers} workers, {decoders} decoders each")
                    row = measure_workers(server, files, workers, decoders, arguments)
                    row |= {"limit_share": row["clips_per_s"] / bound_per_s, "bound_per_s": bound_per_s}
                    report.table(SERVING, SERVING_COLUMNS, [row])


def measure_workers(
    server: serve.Server, files: Sequence[Path], workers: int, decoders: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Starts the workers of an archive, puts them under load, stops them; returns a row of the table."""
    name = archive_name(decoders)
    statistics = serve.WorkerStatistics(name)
    with statistics.running(server, workers):
        load = generate_load(
            serve.make_sender(server, name, list(files)),
            clients=arguments.clients,
            seconds=arguments.seconds,
            warm_up_s=arguments.warm_up_s,
        )
    return {
        "workers": workers,
        "decoders": decoders,
        "clients": arguments.clients,
        "clips_per_s": load.clips_per_s,
        **latency_percentiles_ms(load.latencies_ms),
        "answers": len(load.latencies_ms),
        "errors": sum(load.errors.values()),
        "start_s": statistics.starts_s[0],
    }


def archive_name(decoders: int) -> str:
    return f"decoders{decoders}"


def write_config(folder: Path, decoders: int) -> Path:
    """Writes the shipped model-config.yaml with another number of decoder processes; returns its path."""
    config = yaml.safe_load(MODEL_CONFIG.read_text())
    config["handler"] = {**(config.get("handler") or {}), "decode_processes": decoders}
    path = folder / f"{archive_name(decoders)}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


MODEL_EXPERIMENTS = {
    ATTENTION: measure_attention,
    MICRO_BATCHES: measure_micro_batches,
    COPIES: measure_copies,
    LAUNCHES: measure_launches,
    FP8: measure_fp8,
}
EXPERIMENTS = (*MODEL_EXPERIMENTS, RESIZE, SERVING)


def plot(report: Report):
    from benchmarks.plots import panels

    groups: dict[str, dict[str, Spread]] = {}
    for table in (*MODEL_EXPERIMENTS, RESIZE):
        for row in report.tables.get(table, []):
            rates = [row["clips_per_s"] * row["wall_ms"] / row[f"wall{end}_ms"] for end in ("", "_high", "_low")]
            what, group = row["what"], table
            if table in (ATTENTION, COPIES):  # one layer and the model, and copies and the model, differ in scale
                part, _, what = what.partition(", ")
                group += f": {part}"
            if table == MICRO_BATCHES:
                group, what = f"{group}, {row['dtype']}", f"{what}, {row['batch']} per forward pass"
            elif "batch" in row:
                group += f", {row['dtype']}, batch {row['batch']}"
            else:
                group += f", {row['size']}"
            groups.setdefault(group, {})[what] = Spread(*rates)
    for row in report.tables.get(SERVING, []):
        name = f"workers: {row['workers']}, decoders of each: {row['decoders'] or 'one per core'}"
        groups.setdefault(SERVING, {})[name] = Spread.of([row["clips_per_s"]])
    return panels(groups, title="Alternatives (higher is better)", unit="clips/s")
