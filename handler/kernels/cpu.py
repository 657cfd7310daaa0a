"""What the model computes on a CPU in other ways than torch would by itself. For inference only.

    Linear, attention    float32, by oneDNN where torch's own choice leaves half of the processor idle
    by_rows              several steps over a part of the rows at a time
    quantize_linears     8-bit weights and activations

B clips, h heads, N tokens, d a head's width.
"""

import math
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


def _processor_words() -> frozenset[str]:
    """What Linux says of the processor, its features among them; nothing elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    return frozenset(cpuinfo.read_text().split()) if cpuinfo.is_file() else frozenset()


PROCESSOR = _processor_words()
# Torch multiplies float32 by MKL, which has AVX-512 for Intel's processors only. OneDNN, a part of torch as well, has
# it for AMD's, too, and is twice as fast there.
ONEDNN_IS_FASTER = (
    {"AuthenticAMD", "avx512f"} <= PROCESSOR
    and all(library.is_available() for library in (torch.backends.mkl, torch.backends.mkldnn))
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)  # its name is torch's own business, and may go
# Attention scores of so many rows (3 MB for ViViT-B/16x2) stay in a core's cache between their three uses.
ROWS = 256
# For fewer tokens starting so many small products takes longer than it saves.
MIN_TOKENS = 512


class Linear(nn.Linear):
    """nn.Linear, by oneDNN where that is faster."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return multiply(x, self.weight, self.bias) if _by_onednn(x) else super().forward(x)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout_prob: float = 0.0) -> torch.Tensor:
    """(B, h, N, d) each to the same: torch's scaled_dot_product_attention, by oneDNN where that is faster."""
    if dropout_prob or q.shape[2] < MIN_TOKENS or not _by_onednn(q):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_prob)
    batch, heads, tokens, width = q.shape
    k = (k * width**-0.5).contiguous()  # (B, h, N, d)
    v = v.transpose(2, 3).contiguous()  # (B, h, d, N)
    attended = q.new_empty(batch, tokens, heads, width)  # as the layer that follows wants it

    def attend(clip: int, head: int) -> None:
        for start in range(0, tokens, ROWS):
            some = slice(start, start + ROWS)
            weights = multiply(q[clip, head, some], k[clip, head]).softmax(-1)  # (rows, N)
            attended[clip, some, head] = multiply(weights, v[clip, head])  # (rows, d)

    _side_by_side(attend, product(range(batch), range(heads)))
    return attended.transpose(1, 2)  # (B, h, N, d)


def by_rows(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function(x)`, of the shape (..., D) that x has, for a function that treats every row of D values by itself.

    Some rows at a time where that is faster: what comes between its steps stays in a core's cache.
    """
    rows = x.numel() // x.shape[-1]
    if rows < MIN_TOKENS or not _is_plain(x):
        return function(x)
    x = x.contiguous()
    made = torch.empty_like(x)
    parts = torch.get_num_threads() * math.ceil(rows / (2 * ROWS) / torch.get_num_threads())
    sources, targets = (tensor.view(-1, x.shape[-1]).tensor_split(parts) for tensor in (x, made))
    _side_by_side(lambda source, target: target.copy_(function(source)), zip(sources, targets))
    return made


def _side_by_side(function: Callable[..., object], tasks: Iterable[tuple]) -> None:
    """function(*task) of every task, as many at a time as torch has threads, in the mode that this thread is in."""
    count = torch.get_num_threads()
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad
    run = _threads(count).map if count > 1 else map
    list(run(mode()(function), *zip(*tasks)))


@lru_cache
def _threads(count: int) -> ThreadPoolExecutor:
    """So many threads in each of which torch computes with that one alone.

    Torch's own threads would meet after every product, thousands of times a clip, and wait there spinning: several
    times slower as soon as another program wants one of the cores.
    """
    started = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # the first question sets a thread to what all have: what it is told before is lost
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="torch", initializer=start)
    for _ in range(count):
        pool.submit(int)  # a thread starts when it has something to do
    started.wait()
    torch.set_num_threads(count)  # what was said last counts for threads that torch has not seen yet
    return pool


def _by_onednn(x: torch.Tensor) -> bool:
    return ONEDNN_IS_FASTER and _is_plain(x)


def _is_plain(x: torch.Tensor) -> bool:
    """Whether nobody would miss the record of what is computed, which other functions and threads do not keep."""
    is_recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not is_recorded and x.is_cpu and x.dtype == torch.float32


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear by oneDNN, for a contiguous weight."""
    # With gaps between its rows oneDNN would take a path that is hundreds of times slower.
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def quantize_linears(module: nn.Module) -> None:
    """Makes every Linear layer inside of `module` an Int8Linear."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantize_linears(child)


class Int8Linear(nn.Module):
    """A Linear layer of 8-bit weights, with a scale for each output, and of inputs rounded to 8 bits as they come."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.abs().amax(1).clamp(min=torch.finfo(weight.dtype).tiny).double() / 127
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Torch means to give these tensors up, some day.
            weight = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(weight, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Without VNNI the sum of two products must fit 16 bits: inputs get 7 bits.
        return torch.ops.quantized.linear_dynamic(x, self.packed, reduce_range="avx512_vnni" not in PROCESSOR)
