"""HandlerOptions: the settings of one deployment, from the `handler:` section of model-config.yaml.

A new option needs a field with its default, a description in the docstring of HandlerOptions, a check in
`__post_init__`, and a row in scripts/README.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from handler.clips import ClipSettings
from handler.models import ATTENTION_IMPLEMENTATIONS
from handler.processing.resize import ResizeCrop
from handler.validation import (
    ConfigError,
    broken_rule,
    check_bool,
    check_choice,
    check_integer,
    check_number,
    describe_unknown,
)
from handler.video import VIDEO_STREAMS, Limits
from handler.views import SAMPLINGS, ViewDefaults

DTYPES = ("auto", "float32", "float16", "bfloat16", "int8")
NORMALIZATIONS = ("checkpoint", "paper")
RESIZES = ("exact", "fast")
SANDBOXES = ("auto", "required")

OptionError = ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class HandlerOptions:
    """The settings of one deployment. The defaults are defined here only.

    Attributes:
        dtype: compute dtype, one of DTYPES. `auto` is float16 on CUDA. On a CPU with units for half precision it is
            float16, bfloat16 or float32, depending on how fast a layer is in each (kernels/precision.py); float32
            elsewhere. `int8` is for CPUs: linear layers with 8-bit weights and activations, everything else in float32.
        attn_implementation: `sdpa` or `eager`, see VivitModel.
        normalization: `checkpoint` applies the checkpoint's preprocessor_config.json. `paper` scales pixels to [-1, 1],
            the range that the original model was trained on; the published file normalizes a second time.
        top_k: predictions per answer unless the request specifies it; limited to the number of labels.
        micro_batch_clips: clips per forward pass, which bounds its memory. On a CPU a forward pass takes fewer clips if
            they have many tokens.
        compile: whether to compile the model with torch.compile. Several sizes of micro-batches are compiled before the
            worker is ready, and each micro-batch is padded to the next larger one.
        inference_threads: threads per worker for a model on the CPU. 0: the available cores divided by the server's
            workers, fewer for small models.
        decode_processes: videos that a worker decodes concurrently, each in a process of its own. 0: one per core
            available to the worker.
        sampling: `uniform` samples frames at uniform intervals over the whole video. `segment` takes frames near those
            that are faster to decode, see `handler.video.sampling.sample_segments`. `keyframes` takes the keyframes
            closest to those. `dense` takes frames at the distance `stride_frames`, as the evaluation of the paper. The
            answer contains the times. `even` is the former name of `uniform`.
        views: clips in time x crops along the longer side of a video, whose logits are averaged, unless the request
            specifies them. `4x3` are those of the paper.
        stride_frames: distance between the frames of a clip for `dense`, unless the request specifies it.
        max_views: number of views that a request may ask for.
        video_stream: the stream to use if a file has several video streams: `first`, or `best`, FFmpeg's choice
            (av_find_best_stream: the default track, then the highest bit rate).
        resize: `exact` matches transformers bit for bit. `fast` uses torch, see ResizeCrop.is_fast; decoder processes
            then load torch.
        max_videos_per_decoder: videos after which a decoder process is replaced, which takes about 0.3 s of one
            core. 1 separates all videos from each other. 0: no limit.
        sandbox: `auto` confines decoder processes with what the kernel offers. `required` fails to start if a part is
            missing, see handler/sandbox/confinement.py.
        max_upload_bytes: size of a video file.
        max_video_s: duration of a video in seconds.
        max_frame_pixels: width times height of a frame.
        max_frames: frames in a video. If its index is unreliable, all of them are decoded.
        max_decode_gigapixels: work of decoding a video: 10^9 pixels of decoded frames, times the factor of the codec
            (video/cost.py).
        max_decode_s: time for sampling, decoding and resizing a video, in seconds.
        max_batch_decode_s: time for decoding the videos of a batch, if it has several, in seconds. The cheap ones are
            decoded first.
        max_batch_explain_s: time in seconds after which no further explanation of a batch is started, which the other
            requests of the batch wait for. One explanation is always computed.
        max_decode_memory_bytes: address space of a decoder process for one video, in addition to its libraries.

    Raises:
        ConfigError: A value is invalid.
    """

    dtype: str = "auto"
    attn_implementation: str = "sdpa"
    normalization: str = "checkpoint"
    top_k: int = 5
    micro_batch_clips: int = 8
    compile: bool = False
    inference_threads: int = 0
    decode_processes: int = 0
    sampling: str = "uniform"
    views: str = "1x1"
    stride_frames: int = 2
    max_views: int = 12
    video_stream: str = "first"
    resize: str = "exact"
    max_videos_per_decoder: int = 0
    sandbox: str = "auto"
    max_upload_bytes: int = 128 * 2**20
    max_video_s: float = 3600.0
    max_frame_pixels: int = 4096 * 4096
    max_frames: int = 250_000
    max_decode_gigapixels: float = 16.0
    max_decode_s: float = 30.0
    max_batch_decode_s: float = 10.0
    max_batch_explain_s: float = 10.0
    max_decode_memory_bytes: int = 2 * 2**30

    def __post_init__(self) -> None:
        if self.sampling == "even":
            object.__setattr__(self, "sampling", "uniform")  # plain assignment fails because the class is frozen
        for name, choices in (
            ("dtype", DTYPES),
            ("attn_implementation", ATTENTION_IMPLEMENTATIONS),
            ("normalization", NORMALIZATIONS),
            ("sampling", SAMPLINGS),
            ("video_stream", VIDEO_STREAMS),
            ("resize", RESIZES),
            ("sandbox", SANDBOXES),
        ):
            check_choice(name, getattr(self, name), choices)
        _ = self.view_defaults  # checks its fields
        check_bool("compile", self.compile)
        if self.compile and self.dtype == "int8":
            raise broken_rule("compile", self.compile, "false if dtype is int8, which torch.compile does not support")
        for name, minimum, maximum in (
            ("top_k", 1, 10**6),
            ("micro_batch_clips", 1, 1024),
            ("inference_threads", 0, 1024),
            ("decode_processes", 0, 1024),
            ("max_videos_per_decoder", 0, 10**9),
            ("max_upload_bytes", 1, 2**31 - 1),  # TorchServe's limit
            ("max_frame_pixels", 1, 2**28),
            ("max_frames", 1, 10**8),
            ("max_decode_memory_bytes", 2**26, 2**40),
        ):
            check_integer(name, getattr(self, name), minimum=minimum, maximum=maximum)
        for name, largest in (
            ("max_video_s", math.inf),
            ("max_decode_gigapixels", math.inf),
            ("max_decode_s", 3600),
            ("max_batch_decode_s", 3600),
            ("max_batch_explain_s", 3600),
        ):
            check_number(name, getattr(self, name), minimum=0, maximum=largest, exclude_minimum=True)

    @property
    def view_defaults(self) -> ViewDefaults:
        """The views of videos unless a request specifies them."""
        return ViewDefaults(
            views=self.views, stride_frames=self.stride_frames, sampling=self.sampling, max_views=self.max_views
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HandlerOptions:
        """Creates options from the content of a `handler:` section.

        Raises:
            ConfigError: An option is unknown, or a value is invalid.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}: {describe_unknown(name, known)}")
        return cls(**values)

    def clip_settings(self, *, num_frames: int, resize_crop: ResizeCrop) -> ClipSettings:
        """Returns the clips that a model takes, and the videos that are accepted.

        Args:
            num_frames: of the model.
            resize_crop: of the checkpoint's image processor.
        """
        return ClipSettings(
            num_frames=num_frames,
            resize_crop=dataclasses.replace(resize_crop, is_fast=self.resize == "fast"),
            limits=Limits(
                max_duration_s=self.max_video_s,
                max_frame_pixels=self.max_frame_pixels,
                max_frames=self.max_frames,
                max_decode_gigapixels=self.max_decode_gigapixels,
            ),
            video_stream=self.video_stream,
        )
