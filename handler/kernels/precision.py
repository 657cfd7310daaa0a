"""Chooses between float32 and half precision for a model on a CPU.

Half precision is faster on processors with units for it only, and by a factor that depends on the processor and on the
model. So one layer is timed. The times are cached, because a worker measures while it starts.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from handler.kernels.cpuinfo import CPU_NAME, HALF_PRECISION_FEATURES, half_precision_features
from handler.kernels.parallel import MIN_PARALLEL_TOKENS
from handler.kernels.prepare import prepare_for_inference
from handler.models.layers import Layer

# Less is not worth the rounding.
MIN_SPEEDUP = 1.3

# float16 rounds eight times as finely as bfloat16, so it may take this much longer.
ROUNDING_ALLOWANCE = 1.15

# A clip may have larger activations than the noise that they are estimated with.
FLOAT16_MARGIN = 8

MEASUREMENT_S = 0.1
MIN_ROUNDS, MAX_ROUNDS = 2, 20

CACHE_FILE = Path("vivit", "layer-times.json")
MAX_CACHED_MACHINES = 32


@dataclasses.dataclass(frozen=True)
class DtypeChoice:
    """The dtype that a model computes in, and why."""

    dtype: torch.dtype
    reason: str


def choose_dtype(layer: Layer, *, tokens: int, has_float16_range: Callable[[], bool]) -> DtypeChoice:
    """Chooses the dtype for a float32 model on this CPU.

    Args:
        layer: one of the model's layers.
        tokens: number of tokens that a token attends to.
        has_float16_range: whether the model's weights and activations are in the range of float16. Called at most once.
    """
    candidates = [dtype for dtype in HALF_PRECISION_FEATURES if half_precision_features(dtype)]
    if not candidates:
        return DtypeChoice(torch.float32, "auto: this CPU has no units for half precision")
    times_s = layer_times_s(layer, dtypes=[torch.float32, *candidates], tokens=tokens)
    excluded = ""
    if _fastest(times_s) is torch.float16 and not has_float16_range():
        del times_s[torch.float16]
        excluded = "; the model exceeds the range of float16"
    dtype = _fastest(times_s)
    if dtype is torch.float32:
        return DtypeChoice(dtype, f"auto: half precision is not {MIN_SPEEDUP}x as fast on this CPU{excluded}")
    features = ", ".join(sorted(half_precision_features(dtype)))
    ratio = times_s[dtype] / times_s[torch.float32]
    return DtypeChoice(dtype, f"auto: a layer takes {ratio:.2f} of its time in float32 ({features}){excluded}")


def _fastest(times_s: Mapping[torch.dtype, float]) -> torch.dtype:
    """The dtype with the finest rounding among those that are about as fast as the fastest one."""
    half_times_s = {dtype: times_s[dtype] for dtype in HALF_PRECISION_FEATURES if dtype in times_s}
    fastest_s = min(half_times_s.values(), default=math.inf)
    if times_s[torch.float32] < MIN_SPEEDUP * fastest_s:
        return torch.float32
    return next(dtype for dtype, time_s in half_times_s.items() if time_s <= ROUNDING_ALLOWANCE * fastest_s)


def layer_times_s(layer: Layer, *, dtypes: Iterable[torch.dtype], tokens: int) -> dict[torch.dtype, float]:
    """Returns the time that a part of a layer takes in each dtype, from the cache if it was measured before."""
    machine = _describe_machine(layer, tokens)
    names = {str(dtype).removeprefix("torch."): dtype for dtype in dtypes}
    times_s = _valid_times_s(_read_cache().get(machine), names)
    if times_s is None:
        measured_s = measure_layer_s(layer, dtypes=names.values(), tokens=tokens)
        # Workers that start together measure together. Those that finish later use the first one's times, so that all
        # of them choose the same dtype.
        cache = _read_cache()
        times_s = _valid_times_s(cache.pop(machine, None), names)
        if times_s is None:
            times_s = {name: measured_s[dtype] for name, dtype in names.items()}
            cache[machine] = times_s
            _write_cache(dict(list(cache.items())[-MAX_CACHED_MACHINES:]))
    return {dtype: times_s[name] for name, dtype in names.items()}


@torch.inference_mode()
def measure_layer_s(layer: Layer, *, dtypes: Iterable[torch.dtype], tokens: int) -> dict[torch.dtype, float]:
    """Returns the shortest time of several in each dtype, for all parts of a layer in their usual proportions.

    A bounded number of tokens passes through the layer, but each attends to `tokens` tokens.
    """
    parts = {dtype: _LayerPart(layer, dtype=dtype, tokens=tokens) for dtype in dtypes}
    for part in parts.values():
        part.run()  # packs the weights and compiles oneDNN's primitives
    times_s = dict.fromkeys(parts, math.inf)
    start_s = time.perf_counter()
    for round_number in itertools.count(1):
        for dtype, part in parts.items():
            before_s = time.perf_counter()
            part.run()
            times_s[dtype] = min(times_s[dtype], time.perf_counter() - before_s)
        is_enough = round_number >= MIN_ROUNDS and time.perf_counter() - start_s >= MEASUREMENT_S
        if is_enough or round_number == MAX_ROUNDS:
            break
    return times_s


class _LayerPart:
    """A copy of a layer in another dtype, and its inputs: the queries of some tokens, keys and values of all."""

    def __init__(self, layer: Layer, *, dtype: torch.dtype, tokens: int) -> None:
        self.layer = copy.deepcopy(layer).to(dtype).eval()
        prepare_for_inference(self.layer)
        queries = min(tokens, MIN_PARALLEL_TOKENS)
        clips = math.ceil(MIN_PARALLEL_TOKENS / queries)
        width = layer.layernorm_after.normalized_shape[0]
        heads = layer.attentions[0][1].heads
        # The values do not matter, and random ones would take longer than the measurement.
        self.x = torch.ones(clips, queries, width, dtype=dtype)  # (B, M, D)
        keys_and_values = torch.ones(clips, tokens, 2, heads, width // heads, dtype=dtype)  # (B, N, 2, h, d)
        self.keys, self.values = keys_and_values.permute(2, 0, 3, 1, 4)  # 2 x (B, h, N, d)

    def run(self) -> None:
        x = self.x  # (B, M, D)
        for layernorm, attention in self.layer.attentions:
            qkv = attention.qkv(layernorm(x)).unflatten(-1, (3, attention.heads, -1))
            q = qkv[:, :, 0].transpose(1, 2)  # (B, h, M, d)
            attended, _ = attention.attention_function(q, self.keys, self.values, dropout_prob=0.0, training=False)
            x = x + attention.output(attended.transpose(1, 2).flatten(2))  # (B, M, D)
        self.layer.mlp(self.layer.layernorm_after(x))


@torch.inference_mode()
def has_float16_range(model: nn.Module, pixel_values: torch.Tensor) -> bool:
    """Whether the weights of a float32 model fit into float16, and all its activations for some input with a margin.

    Args:
        model: called with `pixel_values`, which may have other frames and sizes than usual.
        pixel_values: (B, T, C, H, W).
    """
    limit = torch.finfo(torch.float16).max
    if any(not parameter.abs().amax() <= limit for parameter in model.parameters() if parameter.numel()):
        return False
    largest = [0.0]

    def record(module: nn.Module, inputs: object, output: object) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        largest.extend(float(tensor.abs().amax()) for tensor in outputs if isinstance(tensor, torch.Tensor))

    handles = [module.register_forward_hook(record) for module in model.modules()]
    try:
        model(pixel_values, interpolate_pos_encoding=True)
    finally:
        for handle in handles:
            handle.remove()
    return all(value * FLOAT16_MARGIN <= limit for value in largest)  # also False for nan


def _describe_machine(layer: Layer, tokens: int) -> str:
    """Everything that the times depend on."""
    features = sorted(frozenset().union(*map(half_precision_features, HALF_PRECISION_FEATURES)))
    mlp, attentions = layer.mlp, [attention for _, attention in layer.attentions]
    implementation = getattr(attentions[0].attention_function, "__name__", "")
    shape = (tokens, *mlp.up.weight.T.shape, attentions[0].heads, mlp.hidden_act, implementation, len(attentions))
    facts = (CPU_NAME, *features, f"torch {torch.__version__}", f"{torch.get_num_threads()} threads", *shape)
    return " | ".join(map(str, facts))


def _valid_times_s(entry: object, names: Iterable[str]) -> dict[str, float] | None:
    """An entry of the cache if it has a positive, finite time for each name, otherwise None."""
    if not isinstance(entry, dict):
        return None
    is_valid = all(isinstance(entry.get(name), float) and 0 < entry[name] < math.inf for name in names)
    return entry if is_valid else None


def _cache_path() -> Path:
    """The cache file of this user.

    Raises:
        RuntimeError: the user has no home directory.
    """
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(folder) if os.path.isabs(folder) else Path.home() / ".cache") / CACHE_FILE


def _read_cache() -> dict[str, object]:
    """The times by machine; empty if there is no valid file."""
    try:
        content = json.loads(_cache_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError also for nesting that is too deep
        return {}
    return content if isinstance(content, dict) else {}


def _write_cache(content: Mapping[str, object]) -> None:
    """Replaces the file at once, as other workers read and write it at the same time. Does nothing if that fails."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _cache_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            try:
                json.dump(content, file, indent=1)
                file.flush()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise
