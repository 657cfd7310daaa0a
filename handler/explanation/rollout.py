"""Gradient-weighted attention rollout: which tubelets of a clip support a label.

Rollout (Chefer, Gur and Wolf, arXiv 2103.15679) weights each attention weight by the gradient of the label's logit,
keeps what increases the logit, takes the mean over heads, and follows it through the layers, each of which adds to its
input: R = (I + A_L) ... (I + A_2) (I + A_1).

Only one row of R is needed: that of the token which the classifier reads. It is multiplied from the left, i.e. from the
last layer to the first. The backward pass has the same order, so the attention weights of a layer are needed only while
its gradients are computed. They are recomputed there a block at a time and are never in memory as a whole.

T'  time steps: tubelets along time          S  tokens of a time step, including CLS if it has its own
N  tokens of a sequence, including CLS       M  queries: N, or 1 if only CLS attends
G  sequences times heads                     d  channels of a head
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from handler.kernels.int8 import Int8Linear
from handler.kernels.onednn import OnednnLinear, linear
from handler.kernels.parallel import run_parallel
from handler.models.layers import Attention, AttentionFunction, sdpa_attention
from handler.models.vivit import VivitForVideoClassification

# Attention weights that are recomputed at a time: on a CPU so few, of so few keys, that they stay in a core's cache.
CPU_BLOCK_WEIGHTS, GPU_BLOCK_WEIGHTS = 2**17, 2**24
CPU_BLOCK_KEYS = 512

# Gradients are this many times larger during the backward pass, because small ones are zero in float16.
GRADIENT_SCALE = 1024.0


def rollout(
    model: VivitForVideoClassification,
    pixel_values: torch.Tensor,
    choose_labels: Callable[[torch.Tensor], Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the relevance of each tubelet of a clip.

    The modules of `model` are shared, not modified, so other threads may use them at the same time.

    Args:
        model: in eval mode; possibly prepared for inference, see `handler.kernels`.
        pixel_values: (1, T, C, H, W), normalized, of the model's dtype.
        choose_labels: called with the logits, float32 (labels,) on the CPU. Returns the indices of the labels to
            explain; their logits are added.

    Returns:
        The logits, float32 (labels,), and the relevance, float32 (T', H', W') >= 0, both on the CPU.

    Raises:
        FloatingPointError: the logits or gradients are not finite.
    """
    config = model.config
    relevance = _Relevance(has_cls_token=config.has_cls_token)
    with torch.inference_mode(False), torch.enable_grad():
        copied = _differentiable_copy(model, relevance)
        embedded = copied.vivit.embedding(pixel_values.clone()).requires_grad_()  # (1, N, D), (1, T', S, D)
        copied.vivit.embedding = _Constant(embedded)  # type: ignore[assignment]  # what a clip is embedded to
        logits = copied(pixel_values).logits[0]  # (labels,)
        result = logits.detach().float().cpu()
        target = logits[list(choose_labels(result))].float().sum()
        torch.autograd.grad(target * GRADIENT_SCALE, embedded)
    tokens = relevance.finish()  # (1, N), (1, T', S)
    if config.has_cls_token:
        tokens = tokens[..., 1:]
    heat = tokens.float().cpu().reshape(config.grid)  # (T', H', W')
    if not (result.isfinite().all() and heat.isfinite().all()):
        raise FloatingPointError("expected finite logits and gradients, got inf or nan: use dtype float32 or bfloat16")
    return result, heat


class _Relevance:
    """Relevance of the tokens while the backward pass goes from the last layer to the first.

    Attributes:
        tokens: float32 (1, N) or (1, T', S), of the tokens that the latest attention returned.
    """

    def __init__(self, *, has_cls_token: bool) -> None:
        self._has_cls_token = has_cls_token
        self._tokens: torch.Tensor | None = None
        self._attention: nn.Module | None = None
        self._added: torch.Tensor | None = None  # what the latest attention adds to its inputs

    def of_queries(self, attention: nn.Module, *, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Returns the relevance of the tokens that an attention returns: (1, M) or (1, T', M).

        Args:
            attention: attends along one axis or several, so this is called once or several times in a row.
            shape: of the result.
        """
        if attention is not self._attention:
            self._tokens = self._start(shape, device) if self._tokens is None else self._unpool(self.finish(), shape)
            self._attention, self._added = attention, None
        assert self._tokens is not None
        return self._tokens

    def add(self, relevance: torch.Tensor) -> None:
        """Adds what the latest attention gives to the tokens that it reads, along one axis: (1, N) or (1, T', S)."""
        self._added = relevance if self._added is None else self._added + relevance

    def finish(self) -> torch.Tensor:
        """Returns the relevance of the tokens that the latest attention read: (1, N) or (1, T', S)."""
        assert self._tokens is not None and self._added is not None
        tokens = self._added.clone()
        tokens[..., : self._tokens.shape[-1]] += self._tokens  # only CLS if only CLS attended
        return tokens

    def _start(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """The classifier reads CLS, or the mean of the tokens."""
        if self._has_cls_token:
            tokens = torch.zeros(shape, device=device)
            tokens[..., 0] = 1
            return tokens
        return torch.full(shape, 1 / math.prod(shape), device=device)

    def _unpool(self, tokens: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Gives the relevance of time steps (1, [1 +] T') to the tokens that they were pooled from, (1, T', M)."""
        if tokens.dim() == len(shape):
            return tokens
        if not self._has_cls_token:
            return (tokens[..., None] / shape[-1]).expand(shape)
        of_cls = torch.zeros(shape, device=tokens.device)
        of_cls[..., 0] = tokens[:, 1:]
        return of_cls


def _differentiable_copy(model: VivitForVideoClassification, relevance: _Relevance) -> VivitForVideoClassification:
    """Copies the modules, which is fast, but not the parameters. The copy's attention updates `relevance`."""
    memo: dict[int, Any] = {id(parameter): parameter.detach() for parameter in model.parameters()}
    memo |= {id(module): _FrozenLinear(module) for module in model.modules() if isinstance(module, _LINEARS)}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if isinstance(module, Attention):
            module.__class__ = _TracedAttention
            cast(_TracedAttention, module).trace(relevance)
    return copied


class _Constant(nn.Module):
    """Returns the same tensor for every input."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.output


_LINEARS = (nn.Linear, Int8Linear)


class _FrozenLinear(nn.Module):
    """A linear layer with gradients of its input only, computed by the same kernels as in inference."""

    def __init__(self, served: nn.Module) -> None:
        super().__init__()
        self.served = [served]  # in a list, so that it is not a submodule and not copied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _FrozenLinearFunction.apply(x, self.served[0])  # type: ignore[no-untyped-call]
        return output


class _FrozenLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, served: nn.Module) -> torch.Tensor:
        ctx.served = served
        output: torch.Tensor = served(x)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        served = ctx.served
        if isinstance(served, Int8Linear):
            return gradient @ served.packed.unpack()[0].dequantize(), None
        if isinstance(served, OnednnLinear) and served.is_supported(gradient):
            return linear(gradient, served.weight.detach().t().contiguous()), None
        return gradient @ served.weight.detach(), None


class _TracedAttention(Attention):
    """An attention whose backward pass updates the relevance of tokens.

    Attributes:
        relevance: what is updated.
        served_function: the attention function in inference.
    """

    relevance: _Relevance
    served_function: AttentionFunction

    def trace(self, relevance: _Relevance) -> None:
        self.relevance, self.served_function = relevance, self.attention_function

    def _attend(self, qkv: torch.Tensor, axis: int, *, cls_only: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        grid = tuple(qkv.shape[:-3])  # (1, N), (1, T', S)
        queries = (*grid[:-1], 1) if cls_only else grid

        def attend(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout_prob: float, training: bool
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            values: torch.Tensor = _TracedAttentionFunction.apply(q, k, v, self, axis, queries)  # type: ignore[no-untyped-call]
            return values, None

        self.attention_function = attend
        return super()._attend(qkv, axis, cls_only=cls_only)


class _TracedAttentionFunction(torch.autograd.Function):
    """Attention from q (sequences, h, M, d) to k and v (sequences, h, N, d)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention: _TracedAttention,
        axis: int,
        queries: tuple[int, ...],
    ) -> torch.Tensor:
        ctx.attention, ctx.axis, ctx.queries = attention, axis, queries
        output, log_sums = None, None
        if attention.served_function is sdpa_attention and q.device.type == "cpu":
            output, log_sums = _flash_attention(q, k, v)
        if output is None:
            output = attention.served_function(q, k, v, dropout_prob=0.0, training=False)[0]  # (sequences, h, M, d)
        ctx.save_for_backward(q, k, v, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        attention, axis = ctx.attention, ctx.axis
        relevance = attention.relevance.of_queries(attention, shape=ctx.queries, device=gradient.device)
        rows = relevance.movedim(axis, -1)  # (1, M), (1, T' or S, M)
        added, *gradients = attention_backward(
            *ctx.saved_tensors, gradient=gradient, relevance=rows.flatten(0, -2), heads=attention.heads
        )
        attention.relevance.add(added.view(*rows.shape[:-1], -1).movedim(-1, axis))
        return (*gradients, None, None, None)


def _flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """SDPA on a CPU with the logarithms of the sums of exponentials, (sequences, h, M); None if torch cannot do it."""
    try:
        output, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    except (AttributeError, RuntimeError, TypeError):
        return None, None
    return output, log_sums


def attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    log_sums: torch.Tensor | None,
    *,
    gradient: torch.Tensor,
    relevance: torch.Tensor,
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients of scaled dot-product attention, and `relevance` times its gradient-weighted weights.

    Args:
        q, output, gradient: (sequences, h, M, d).
        k, v: (sequences, h, N, d).
        log_sums: logarithm of the sum of exponentials of each query's scores, (sequences, h, M). None: not known.
        relevance: of the queries, float32 (sequences, M).
        heads: the number of heads that the mean is taken over; larger than h if others attend along another axis.

    Returns:
        Relevance that the keys get, float32 (sequences, N), and the gradients of q, k and v.
    """
    sequences, own_heads, queries, width = q.shape
    keys, dtype, scale = k.shape[-2], q.dtype, width**-0.5
    # The sums over keys of gradient times weight.
    sums = (gradient.float() * output.float()).sum(-1, keepdim=True).flatten(0, 1)  # (G, M, 1)
    q, k, v, gradient = (tensor.flatten(0, 1).contiguous() for tensor in (q * scale, k, v, gradient))  # (G, M or N, d)
    relevance = relevance.repeat_interleave(own_heads, dim=0)[:, None]  # (G, 1, M)
    added = relevance.new_zeros(len(q), 1, keys)  # (G, 1, N)
    q_gradient, k_gradient, v_gradient = (torch.zeros_like(tensor) for tensor in (q, k, v))

    on_cpu = q.device.type == "cpu"
    max_weights = CPU_BLOCK_WEIGHTS if on_cpu else GPU_BLOCK_WEIGHTS
    block_keys = min(keys, CPU_BLOCK_KEYS) if on_cpu else keys
    block_queries = min(queries, max(1, max_weights // block_keys))
    query_blocks = list(_slices(queries, size=block_queries))
    key_blocks = list(_slices(keys, size=block_keys))
    all_log_sums = q.new_empty(len(q), queries, 1, dtype=torch.float32)
    if log_sums is not None:
        all_log_sums[:, :, 0] = log_sums.flatten(0, 1)

    def compute(group: slice) -> None:
        if log_sums is None:
            for rows in query_blocks:
                scores = (q[group, rows] @ k[group].mT).float()  # (g, m, N)
                all_log_sums[group, rows] = scores.logsumexp(-1, keepdim=True)
        for columns in key_blocks:
            part_k, part_v = k[group, columns], v[group, columns]  # (g, n, d)
            for rows in query_blocks:
                part_q, received = q[group, rows], gradient[group, rows]  # (g, m, d)
                weights = (part_q @ part_k.mT).float().sub_(all_log_sums[group, rows]).exp_()  # (g, m, n)
                weighted = (received @ part_v.mT).float().mul_(weights)  # (g, m, n), gradient times weight
                v_gradient[group, columns].baddbmm_(weights.to(dtype).mT, received)  # (g, n, d)
                of_scores = torch.addcmul(weighted, weights, sums[group, rows], value=-1, out=weights).to(dtype)
                q_gradient[group, rows].baddbmm_(of_scores, part_k)  # (g, m, d)
                k_gradient[group, columns].baddbmm_(of_scores.mT, part_q)  # (g, n, d)
                added[group, :, columns].baddbmm_(relevance[group, :, rows], weighted.relu_())  # (g, 1, n)

    groups = _slices(len(q), size=max(1, max_weights // (block_keys * block_queries)))
    tasks = [(group,) for group in groups]
    if on_cpu:
        run_parallel(compute, tasks)
    else:
        for task in tasks:
            compute(*task)
    added = added.view(sequences, own_heads, keys).sum(1) / (GRADIENT_SCALE * heads)  # (sequences, N)
    shape = (sequences, own_heads, -1, width)
    return added, q_gradient.mul_(scale).view(shape), k_gradient.view(shape), v_gradient.view(shape)


def _slices(length: int, *, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))
