"""What one deployment chooses: the `handler:` section of model-config.yaml. The model's shape is in config.py.

OptionError (ValueError)    an unknown option, or a value that breaks a rule
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from handler.validation import describe_unknown

DTYPES = ("auto", "float32", "float16", "bfloat16", "int8")
ATTENTIONS = ("sdpa", "eager")
NORMALIZATIONS = ("checkpoint", "paper")
SAMPLINGS = ("uniform", "keyframes")
VIDEO_STREAMS = ("first", "best")
RESIZES = ("exact", "fast")


class OptionError(ValueError):
    """An unknown option, or a value that breaks a rule."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HandlerOptions:
    """The defaults of the server are these and are written nowhere else.

    dtype                what the model computes in, one of DTYPES; `auto` is float16 on CUDA and float32 elsewhere.
                         `int8` is for CPUs: layers with 8-bit weights and inputs, all between them in float32
    attn_implementation  one of ATTENTIONS
    normalization        `checkpoint`: as its preprocessor_config.json says. `paper`: pixels in [-1, 1], what the
                         original was trained on; the published preprocessor_config.json normalises a second time
    top_k                predictions in an answer whose request does not say (a model with fewer classes returns all)
    micro_batch_clips    clips that go through the model at once: bounds the memory of a forward pass
    compile              whether torch compiles the model, for a few sizes of micro-batch, before the worker is ready;
                         micro-batches are padded to the next size
    inference_threads    of one worker, for a model on the CPU; 0: the cores, shared out over the server's workers,
                         or fewer for a small model
    decode_processes     files that a worker decodes at the same time, each in a process of its own; 0: one for each
                         core that the worker may use
    sampling             `uniform`: frames evenly over the whole video. `keyframes`: the keyframes nearest to those, many
                         times quicker; answers tell the times that were taken
    video_stream         the stream to use of a file with several video streams: `first`, or `best`, which FFmpeg chooses
                         (av_find_best_stream, usually the largest)
    resize               `exact`: to the bit as transformers does it. `fast`: see ResizeCrop.is_fast; each decoder process
                         then loads torch
    max_upload_bytes     of a video file
    max_video_s          seconds that a video may last
    max_frame_pixels     width times height of its pictures
    max_frames           in a video: where its index cannot be trusted, all of them are decoded
    max_decode_s         seconds that sampling, decoding and resizing one file may take
    max_decode_memory_bytes  address space that a decoder process may take for a file, beyond its libraries'

    Raises OptionError.
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
    video_stream: str = "first"
    resize: str = "exact"
    max_upload_bytes: int = 128 * 2**20
    max_video_s: float = 3600.0
    max_frame_pixels: int = 4096 * 4096
    max_frames: int = 250_000
    max_decode_s: float = 30.0
    max_decode_memory_bytes: int = 2 * 2**30

    def __post_init__(self) -> None:
        if self.sampling == "even":  # the name of `uniform` until version 0.1
            object.__setattr__(self, "sampling", "uniform")
        for name, allowed in (
            ("dtype", DTYPES),
            ("attn_implementation", ATTENTIONS),
            ("normalization", NORMALIZATIONS),
            ("sampling", SAMPLINGS),
            ("video_stream", VIDEO_STREAMS),
            ("resize", RESIZES),
        ):
            if getattr(self, name) not in allowed:
                raise OptionError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not isinstance(self.compile, bool):
            raise OptionError(f"compile must be true or false, got {self.compile!r}")
        if self.compile and self.dtype == "int8":
            raise OptionError("compile must be false where dtype is int8, which torch cannot compile")
        for name, least, most in (
            ("top_k", 1, 10**6),
            ("micro_batch_clips", 1, 1024),
            ("inference_threads", 0, 1024),
            ("decode_processes", 0, 1024),
            ("max_upload_bytes", 1, 2**31 - 1),  # TorchServe takes no larger request
            ("max_frame_pixels", 1, 2**28),
            ("max_frames", 1, 10**8),
            ("max_decode_memory_bytes", 2**26, 2**40),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise OptionError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
        for name, most in (("max_video_s", math.inf), ("max_decode_s", 3600)):
            seconds = getattr(self, name)
            if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 < seconds <= most:
                raise OptionError(f"{name} must be a number above 0 and up to {most}, got {seconds!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HandlerOptions":
        """From YAML. Raises OptionError; an unknown key is answered with the nearest that there is."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise OptionError(f"unknown option {key!r}: {describe_unknown(key, known)}")
        return cls(**values)
