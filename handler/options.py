"""What one deployment chooses: the `handler:` section of model-config.yaml. The model's shape is in config.py.

    OptionError (ValueError)    an unknown option, or a value that breaks a rule
"""
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

DTYPES = ("auto", "float32", "float16", "bfloat16")
ATTENTIONS = ("sdpa", "eager")
NORMALIZATIONS = ("checkpoint", "paper")


class OptionError(ValueError):
    """An unknown option, or a value that breaks a rule."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HandlerOptions:
    """The defaults of the server are these and are written nowhere else.

    dtype                what the model computes in, one of DTYPES; `auto` is float16 on CUDA and float32 elsewhere
    attn_implementation  one of ATTENTIONS
    normalization        `checkpoint`: as its preprocessor_config.json says. `paper`: pixels in [-1, 1], what the
                         original was trained on; the published preprocessor_config.json normalises a second time
    top_k                predictions in an answer whose request does not say (a model with fewer classes returns all)
    micro_batch_clips    clips that go through the model at once: bounds the memory of a forward pass
    decode_processes     files that a worker decodes at the same time, each in a process of its own; 0: one for each
                         core that the worker may use
    max_decode_s         seconds that sampling, decoding and resizing one file may take
    max_decode_memory_bytes  address space of a decoder process, its libraries (about 0.3 GB) included

    Raises OptionError.
    """

    dtype: str = "auto"
    attn_implementation: str = "sdpa"
    normalization: str = "checkpoint"
    top_k: int = 5
    micro_batch_clips: int = 8
    decode_processes: int = 0
    max_decode_s: float = 30.0
    max_decode_memory_bytes: int = 2 * 2**30

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", DTYPES), ("attn_implementation", ATTENTIONS), ("normalization", NORMALIZATIONS)
        ):
            if getattr(self, name) not in allowed:
                raise OptionError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, least in (
            ("top_k", 1), ("micro_batch_clips", 1), ("decode_processes", 0), ("max_decode_memory_bytes", 2**29)
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise OptionError(f"{name} must be a whole number, {least} or more, got {value!r}")
        seconds = self.max_decode_s
        if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 < seconds <= 3600:
            raise OptionError(f"max_decode_s must be a number above 0 and up to 3600, got {seconds!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HandlerOptions":
        """From YAML. Raises OptionError; an unknown key is answered with the nearest that there is."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
                raise OptionError(f"unknown option {key!r}: {hint}")
        return cls(**values)
